"""Make batches of noise in the order of a plan, for tests and benchmarks. Needs neither files nor DALI."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipelines.plan import Plan
from pipelines.spec import Batch, Placement

_POOL_SIZE = 64  # images


class SyntheticLoader:
    """Noise images from a small pool that stays on the device: a batch costs one gather.

    label = index % num_classes, image = pool[label % 64]: a model can learn them, on any number of ranks.
    """

    def __init__(self, plan: Plan, image_px: int, num_classes: int, place: Placement, *, fp16: bool) -> None:
        self._plan, self._num_classes, self._place = plan, num_classes, place
        pool = torch.randn(_POOL_SIZE, image_px, image_px, 3, generator=torch.Generator().manual_seed(0))
        self._pool = pool.to(place.device, torch.float16 if fp16 else torch.float32)  # (64, H, W, 3)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches as `Loader.epoch`. Raises ValueError for what `Plan.micro_batches` refuses."""
        for batch in self._plan.micro_batches(epoch, start, self._place.rank, self._place.world):
            indices = torch.from_numpy(batch.indices).to(self._place.device, non_blocking=True)
            labels = indices % self._num_classes
            images = self._pool[labels % _POOL_SIZE].permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)
            yield Batch(images, labels, indices)

    def close(self) -> None:
        """Free the pool."""
        self._pool = torch.empty(0)
