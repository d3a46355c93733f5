"""Evaluation that counts every image exactly once, whatever the number of ranks and the batch size."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cmtrain.guard import running_statistics
from pipelines.spec import UNREADABLE, Batch


@dataclass(frozen=True)
class Evaluation:
    """`top1`, `top5`: shares 0..1 of all images, of which `num_unreadable` could not be read and count as wrong.

    `loss`: mean cross entropy (nats) of those that were read. With fewer than 5 classes top5 is top-all: 1.
    """

    top1: float
    top5: float
    loss: float
    num_images: int
    num_unreadable: int = 0


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    autocast: AbstractContextManager,
    device: torch.device,
    num_images: int,
) -> Evaluation:
    """Evaluate `model` on this rank's share of the images and add up over ranks.

    Args:
        model: unwrapped; left in the mode it was in.
        batches: this rank's share, each image once; may be empty.
        num_images: how many images all ranks together must have seen.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(5, dtype=torch.float64, device=device)  # as in _count
    with torch.no_grad(), autocast:
        for images, labels, _ in batches:
            totals += _count(model(images).float(), labels)
    model.train(was_training)
    all_reduce_sum(totals)
    top1, top5, loss, seen, unreadable = totals.tolist()
    assert seen == num_images, f"evaluated {seen:.0f} images of {num_images}"
    return Evaluation(top1 / seen, top5 / seen, loss / max(seen - unreadable, 1), num_images, int(unreadable))


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K), (B,) -> (5,) float64: correct at 1, correct at 5, summed loss, images, unreadable images."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (B, 5)
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=UNREADABLE)
    images = torch.full((), len(labels), device=logits.device)
    unreadable = (labels == UNREADABLE).sum()
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss, images, unreadable]).double()


def all_reduce_sum(values: Tensor) -> None:
    """Sum `values` over all ranks, in place; nothing to do in a single process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)


@torch.no_grad()
def average_running_statistics(*models: nn.Module) -> None:
    """Give every rank the mean over ranks of the BatchNorm running statistics, before they are used or saved.

    The update of running statistics is linear, so averaging now equals having averaged after every step.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for model in models:
        statistics = running_statistics(model)
        if statistics:
            flat = torch.cat(statistics)
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            torch._foreach_copy_(statistics, list(flat.split([t.numel() for t in statistics])))
