"""DALI pipelines as loaders: a batch knows its samples before DALI sees it and is checked when it comes out."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type

from pipelines import graphs
from pipelines.dataset import Manifest
from pipelines.headers import verify
from pipelines.plan import MicroBatch, Plan, augment_params
from pipelines.spec import AugmentSpec, Batch, DataError, Decode, EvalSpec


def train_loader(
    manifest: Manifest,
    plan: Plan,
    spec: AugmentSpec,
    *,
    rank: int,
    world: int,
    device: torch.device | str,
    decode: Decode,
    threads: int,
    prefetch_batches: int,
) -> DaliLoader:
    """This rank's augmented micro-batches, in the plan's order.

    Args:
        decode: "mixed" decodes on the GPU, "cpu" decodes and resizes on the CPU and augments where `device` is; "auto"
            is "mixed" where there is a GPU.
        threads: of DALI in this process.
        prefetch_batches: micro-batches in flight, those of the next epoch included.

    Raises:
        DataError: "mixed" without a CUDA device; from `epoch`, a file that cannot be decoded.
        ValueError: a world that does not divide the plan, from `epoch`; a RandAugment string that is not understood.
    """
    read = _file_reader(manifest, threads)

    def inputs(batch: MicroBatch) -> Sequence[Any]:
        indices = batch.indices
        params = augment_params(plan, batch, manifest.heights[indices], manifest.widths[indices], spec)
        return [read(indices), params.windows, params.flips, *(params.jitter or ()), *(params.layers or ())]

    run = _execution(torch.device(device), decode, plan.micro_batch_size, threads, prefetch_batches)
    return DaliLoader(
        manifest,
        lambda epoch, start: plan.micro_batches(epoch, start, rank, world),
        inputs,
        lambda source: graphs.train_graph(source, spec, run),
        torch.device(device),
        prefetch_batches,
    )


def eval_loader(
    manifest: Manifest,
    spec: EvalSpec,
    *,
    batch_size: int,
    rank: int,
    world: int,
    device: torch.device | str,
    decode: Decode,
    threads: int,
    prefetch_batches: int,
) -> DaliLoader:
    """Every image of `manifest` once over all ranks: this rank's are `[rank::world]`, the last batch may be smaller.

    `epoch` ignores the epoch's number and takes no `start`. Arguments and errors as for `train_loader`; ValueError
    also when the crop is larger than the resized image.
    """
    if spec.resize_px < spec.image_px:
        raise ValueError(f"resize_px {spec.resize_px} is below image_px {spec.image_px}")
    read = _file_reader(manifest, threads)

    def micro_batches(epoch: int, start: int) -> Iterator[MicroBatch]:
        if start:
            raise ValueError(f"evaluation begins at 0, not at {start}")
        mine = np.arange(rank, len(manifest), world)
        for step, begin in enumerate(range(0, len(mine), batch_size)):
            indices = mine[begin : begin + batch_size]
            # Epoch 0 whatever the epoch: every evaluation is the same, so the batches in flight fit the next one.
            yield MicroBatch(0, step, rank, indices, np.zeros_like(indices))

    def inputs(batch: MicroBatch) -> Sequence[Any]:
        heights, widths = manifest.heights[batch.indices], manifest.widths[batch.indices]
        sizes, offsets = eval_windows(heights, widths, spec.resize_px, spec.image_px)
        return [read(batch.indices), sizes.astype(np.float32), offsets]

    run = _execution(torch.device(device), decode, batch_size, threads, prefetch_batches)
    return DaliLoader(
        manifest,
        micro_batches,
        inputs,
        lambda source: graphs.eval_graph(source, spec, run),
        torch.device(device),
        prefetch_batches,
    )


def eval_windows(
    heights: NDArray[np.int32], widths: NDArray[np.int32], resize_px: int, image_px: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """torchvision's Resize(resize_px) and CenterCrop(image_px): (B, 2) resized sizes and (B, 2) crop offsets.

    The longer side is truncated, not rounded, and the offset's halves go to the even number, as Python's `round`.
    """
    stored = np.stack([heights, widths], axis=1).astype(np.int64)  # (B, 2)
    sizes = resize_px * stored // stored.min(axis=1, keepdims=True)
    return sizes.astype(np.int32), np.rint((sizes - image_px) / 2).astype(np.int32)


class DaliLoader:
    """A DALI pipeline fed from a plan. Built at the first batch; use `train_loader` or `eval_loader` to make one."""

    def __init__(
        self,
        manifest: Manifest,
        micro_batches: Callable[[int, int], Iterator[MicroBatch]],
        inputs: Callable[[MicroBatch], Sequence[Any]],
        build: Callable[[graphs.Source], Pipeline],
        device: torch.device,
        prefetch_batches: int,
    ) -> None:
        self._manifest = manifest
        self._micro_batches = micro_batches
        self._inputs = inputs
        self._build = build
        self._device = device
        self._prefetch_batches = prefetch_batches
        self._pipeline: Pipeline | None = None
        self._upcoming: Iterator[MicroBatch] = iter(())
        self._in_flight: deque[MicroBatch] = deque()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches after `start` consumed samples.

        While an epoch's last batches are consumed, the first of the next one are already being made; any other request
        than the next epoch is served too, by throwing those away. A batch owns its memory.

        Raises:
            DataError: a batch failed; names the files of it that Pillow cannot read either. The loader can go on.
            RuntimeError: this epoch was left for another one and then continued.
        """
        for position, wanted in enumerate(self._micro_batches(epoch, start)):
            if position == 0 and not self._is_next(wanted):
                with self._failures_named():
                    self._redirect(epoch, start)
            if not self._is_next(wanted):
                raise RuntimeError(f"epoch {epoch} cannot go on: another epoch was begun on this loader")
            with self._failures_named():
                images = self._receive()
            yield Batch(
                images.to(self._device, non_blocking=True).permute(0, 3, 1, 2),  # (B, H, W, 3) -> (B, 3, H, W)
                self._to_device(self._manifest.labels[wanted.indices]),
                self._to_device(wanted.indices),
            )

    def close(self) -> None:
        """Frees the pipeline: its threads, its memory and the batches in flight."""
        self._pipeline = None
        self._in_flight.clear()

    def _is_next(self, wanted: MicroBatch) -> bool:
        return bool(self._in_flight) and self._in_flight[0].identity == wanted.identity

    def _redirect(self, epoch: int, start: int) -> None:
        if self._pipeline is None:
            self._pipeline = self._build(self._pull)
        self._upcoming = self._endless(epoch, start)
        while self._in_flight:
            self._pipeline.share_outputs()
            self._pipeline.release_outputs()
            self._in_flight.popleft()
        # The very first call schedules a full queue at once.
        while len(self._in_flight) < self._prefetch_batches:
            self._pipeline.schedule_run()

    def _endless(self, epoch: int, start: int) -> Iterator[MicroBatch]:
        yield from self._micro_batches(epoch, start)
        for following in itertools.count(epoch + 1):
            yield from self._micro_batches(following, 0)

    def _pull(self) -> Sequence[Any]:
        """Called by DALI, on the thread that schedules a run, once per batch."""
        self._in_flight.append(next(self._upcoming))
        return self._inputs(self._in_flight[-1])

    def _receive(self) -> torch.Tensor:
        assert self._pipeline is not None
        images = _take_images(self._pipeline, self._device)
        self._in_flight.popleft()
        self._pipeline.schedule_run()
        return images

    def _to_device(self, values: NDArray[np.int64]) -> torch.Tensor:
        host = torch.from_numpy(values)
        # Only from pinned memory does a copy not wait for the device.
        return host if self._device.type == "cpu" else host.pin_memory().to(self._device, non_blocking=True)

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        """DALI says that a batch failed but seldom which file, and with several in flight not even which batch."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            suspects = {int(index) for batch in self._in_flight for index in batch.indices}
            self.close()  # a pipeline that failed once fails for ever; the next epoch builds a new one
            reasons = {path: verify(path) for path in map(self._manifest.file, sorted(suspects))}
            bad = [f"{path}: {reason}" for path, reason in reasons.items() if reason]
            what = "; ".join(bad) or f"a batch failed, but Pillow can read all of the {len(suspects)} images in flight"
            raise DataError(f"{what}; DALI: {' '.join(str(error).split())}") from error


def _take_images(pipeline: Pipeline, device: torch.device) -> torch.Tensor:
    """The pipeline's next output as a tensor that DALI will not write to again, (B, H, W, 3)."""
    if graphs.OUTPUTS_OWN_MEMORY:
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        (output,) = pipeline.share_outputs(cuda_stream=stream)
        images = torch.from_dlpack(output.as_tensor())
    else:
        (output,) = pipeline.share_outputs()
        shared = output.as_tensor()
        images = torch.empty(shared.shape(), dtype=to_torch_type[shared.dtype], device=device)
        feed_ndarray(shared, images, cuda_stream=torch.cuda.current_stream(device) if images.is_cuda else None)
    pipeline.release_outputs()
    return images


def _execution(device: torch.device, decode: Decode, batch_size: int, threads: int, prefetch: int) -> graphs.Execution:
    if decode == "mixed" and device.type != "cuda":
        raise DataError("data.decode: mixed decodes on a GPU, and there is none; use auto or cpu")
    on_gpu = device.type == "cuda"
    return graphs.Execution(
        device="gpu" if on_gpu else "cpu",
        decode="mixed" if on_gpu and decode != "cpu" else "cpu",
        device_id=(torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None,
        batch_size=batch_size,
        threads=threads,
        prefetch_batches=prefetch,
    )


def _file_reader(manifest: Manifest, threads: int) -> Callable[[NDArray[np.int64]], Any]:
    """What the graph is given per file: its path where DALI reads files itself, else its bytes."""
    if graphs.READS_FILES:
        prefix = os.path.join(manifest.root, "")
        return lambda indices: manifest.paths.padded(indices, prefix)
    pool = ThreadPoolExecutor(threads)
    return lambda indices: list(pool.map(lambda i: np.fromfile(manifest.file(int(i)), np.uint8), indices))
