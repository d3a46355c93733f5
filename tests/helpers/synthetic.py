"""Make batches of noise in the order of a plan, without files and without DALI."""

import torch

from pipelines.plan import Plan
from pipelines.spec import Batch, Placement

POOL_SIZE = 64  # images


def noise_batches(plan: Plan, image_px: int, num_classes: int, place: Placement, *, fp16: bool):
    """Yield a rank's batches, epoch after epoch: label = index % num_classes, image = pool[label % 64]."""
    pool = torch.randn(POOL_SIZE, 3, image_px, image_px, generator=torch.Generator().manual_seed(0))
    pool = pool.to(place.device, torch.float16 if fp16 else torch.float32)
    epoch = 0
    while True:
        for batch in plan.micro_batches(epoch, 0, place.rank, place.world):
            indices = torch.from_numpy(batch.indices).to(place.device, non_blocking=True)
            labels = indices % num_classes
            images = pool[labels % POOL_SIZE].contiguous(memory_format=torch.channels_last)
            yield Batch(images, labels, indices)
        epoch += 1
