"""DALI pipelines as loaders: a batch knows its samples before DALI sees it and is checked when it comes out."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.dali import graphs
from pipelines.dali.stages import Stages, decode_stages, eval_stages, train_stages
from pipelines.files.manifest import BadFile, Manifest
from pipelines.files.shards import SliceReader
from pipelines.plan import MicroBatch, Plan, augment_params
from pipelines.spec import MAX_BAD_FRACTION, UNREADABLE, AugmentSpec, Batch, DataError, Decode, EvalSpec
from pipelines.stand_ins import BadFiles


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
    max_bad_fraction: float = MAX_BAD_FRACTION,
    hw_decoder_load: float | None = None,
) -> DaliLoader:
    """This rank's augmented micro-batches, in the plan's order.

    Args:
        decode: "mixed" decodes on the GPU, "cpu" decodes and resizes on the CPU and augments where `device` is; "auto"
            is "mixed" where there is a GPU.
        threads: of DALI in this process.
        prefetch_batches: micro-batches in flight, those of the next epoch included.
        hw_decoder_load: share of a batch that a GPU's JPEG engine decodes, 0..1; None is DALI's default.
        max_bad_fraction: more files than this share of the manifest (but always one, unless it is 0) must not turn out
            to be bad. A sample that cannot be decoded is replaced by another one, with that one's label and draws.

    Raises:
        DataError: "mixed" without a CUDA device; from `epoch`, too many bad files.
        ValueError: a world that does not divide the plan, from `epoch`; a RandAugment string that is not understood.
    """
    read = file_reader(manifest, threads)

    def inputs(batch: MicroBatch) -> Sequence[Any]:
        indices = batch.indices
        params = augment_params(plan, batch, manifest.heights[indices], manifest.widths[indices], spec)
        return [read(indices), params.windows, params.flips, *(params.jitter or ()), *(params.layers or ())]

    run = graphs.execution(
        torch.device(device),
        decode,
        plan.micro_batch_size,
        threads,
        prefetch_batches,
        reads_files=manifest.packed is None,
        hw_decoder_load=hw_decoder_load,
    )
    return DaliLoader(
        manifest,
        lambda epoch, start: plan.micro_batches(epoch, start, rank, world),
        inputs,
        train_stages(spec, run),
        decode_stages(run, windows=True),
        torch.device(device),
        prefetch_batches,
        BadFiles(manifest, max_bad_fraction, threads),
        replaces_labels=True,
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
    max_bad_fraction: float = MAX_BAD_FRACTION,
    hw_decoder_load: float | None = None,
) -> DaliLoader:
    """Every image of `manifest` once over all ranks: this rank's are `[rank::world]`, the last batch may be smaller.

    An image that cannot be decoded keeps its place, with the pixels of another one and the label `UNREADABLE`.
    `epoch` ignores the epoch's number and takes no `start`. Arguments and errors as for `train_loader`; ValueError
    also when the crop is larger than the resized image.
    """
    if spec.resize_px < spec.image_px:
        raise ValueError(f"resize_px {spec.resize_px} is below image_px {spec.image_px}")
    read = file_reader(manifest, threads)

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

    run = graphs.execution(
        torch.device(device),
        decode,
        batch_size,
        threads,
        prefetch_batches,
        reads_files=manifest.packed is None,
        hw_decoder_load=hw_decoder_load,
    )
    return DaliLoader(
        manifest,
        micro_batches,
        inputs,
        eval_stages(spec, run),
        decode_stages(run, windows=False),
        torch.device(device),
        prefetch_batches,
        BadFiles(manifest, max_bad_fraction, threads),
        replaces_labels=False,
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
    """A DALI pipeline fed from a plan. Built at the first batch; use `train_loader` or `eval_loader` to make one.

    One undecodable file fails DALI's batch and ends DALI's pipeline. Then the files of all batches in flight are
    examined, and the pipeline is built again at the first batch that was not delivered. Whether a sample is replaced
    depends on its file and its draws alone, not on the batches around it nor on what happened before: a file cut in
    the middle still gives the crops above the cut, in a resumed run as in the one that found out.
    """

    def __init__(
        self,
        manifest: Manifest,
        micro_batches: Callable[[int, int], Iterator[MicroBatch]],
        inputs: Callable[[MicroBatch], Sequence[Any]],
        build: Callable[[graphs.Source], Stages],
        probe: Callable[[graphs.Source], Stages],
        device: torch.device,
        prefetch_batches: int,
        bad_files: BadFiles,
        *,
        replaces_labels: bool,
    ) -> None:
        self._manifest = manifest
        self._micro_batches = micro_batches
        self._inputs = inputs
        self._build, self._probe = build, probe
        self._device = device
        self._prefetch_batches = prefetch_batches
        self._bad_files = bad_files
        self._replaces_labels = replaces_labels
        self._stages: Stages | None = None
        self._upcoming: Iterator[MicroBatch] = iter(())
        self._undelivered: deque[MicroBatch] = deque()  # taken from `_upcoming`, as planned
        self._in_flight: deque[MicroBatch] = deque()  # the first of these as DALI was given them
        self._num_bytes = 0

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches after `start` consumed samples.

        While an epoch's last batches are consumed, the first of the next one are already being made; any other request
        than the next epoch is served too, by throwing those away. A batch owns its memory.

        Raises:
            DataError: too many bad files, or a batch fails twice although Pillow can read all of its files. The loader
                can go on.
            RuntimeError: this epoch was left for another one and then continued.
        """
        for position, planned in enumerate(self._micro_batches(epoch, start)):
            if position == 0 and not self._is_next(planned):
                self._redirect(epoch, start)
            if position and not self._is_next(planned):
                raise RuntimeError(f"epoch {epoch} cannot go on: another epoch was begun on this loader")
            try:
                images, given = self._receive()
            except DataError:
                self.close()
                raise
            self._num_bytes += int(self._manifest.size_bytes[given.indices].sum())
            labels, indices = self._manifest.labels[given.indices], given.indices
            if not self._replaces_labels:
                labels = np.where(given.indices == planned.indices, labels, UNREADABLE)
                indices = planned.indices
            yield Batch(
                images.to(self._device, non_blocking=True).permute(
                    0, 3, 1, 2
                ),  # (B, H, W, 3) -> (B, 3, H, W)
                self._to_device(labels),
                self._to_device(indices),
            )

    def take_bad_files(self) -> list[BadFile]:
        """The files found to be bad since the last call, each once in the life of this loader."""
        return self._bad_files.take_untold()

    def take_num_bytes(self) -> int:
        """Encoded bytes of the images delivered since the last call."""
        num_bytes, self._num_bytes = self._num_bytes, 0
        return num_bytes

    def close(self) -> None:
        """Frees the pipeline: its threads, its memory and the batches in flight. The next epoch builds another one."""
        self._rewind()
        if self._device.type == "cuda":
            graphs.release_memory()
        self._undelivered.clear()
        self._bad_files.close()

    def _is_next(self, planned: MicroBatch) -> bool:
        return bool(self._undelivered) and self._undelivered[0].identity == planned.identity

    def _redirect(self, epoch: int, start: int) -> None:
        self._upcoming = self._endless(epoch, start)
        try:
            for _ in range(len(self._in_flight)):
                assert self._stages is not None
                self._stages.skip()
                self._in_flight.popleft()
        except (RuntimeError, OSError):  # a bad file that nobody asked for any more
            self._rewind()
        self._undelivered.clear()

    def _endless(self, epoch: int, start: int) -> Iterator[MicroBatch]:
        yield from self._micro_batches(epoch, start)
        for following in itertools.count(epoch + 1):
            yield from self._micro_batches(following, 0)

    def _receive(self) -> tuple[torch.Tensor, MicroBatch]:
        """The next images and the batch that they are."""
        tried_again = False
        while True:
            try:
                self._fill()
                assert self._stages is not None
                images = self._stages.take()
                break
            except (RuntimeError, OSError) as error:
                # DALI seldom says which file, and with several batches in flight not even which batch.
                batches = list(self._in_flight)
                self._rewind()
                found = self._bad_files.examine(int(index) for batch in batches for index in batch.indices)
                if tried_again and not found:
                    self._bad_files.examine_alone(batches, self._decode, error)
                tried_again = not found
        given = self._in_flight.popleft()
        self._undelivered.popleft()
        try:
            self._fill()
        except (RuntimeError, OSError):  # the next call meets it again
            self._rewind()
        return images, given

    def _fill(self) -> None:
        """Keeps the queue full; the very first call schedules all of it at once."""
        if not self._undelivered:
            self._undelivered.append(next(self._upcoming))
        if self._stages is None:
            self._stages = self._build(self._pull)
        while len(self._in_flight) < self._prefetch_batches:
            self._stages.schedule()

    def _rewind(self) -> None:
        """Drops the pipeline: one that failed once fails for ever. What is undelivered comes again from the next."""
        self._stages = None
        self._in_flight.clear()

    def _pull(self) -> Sequence[Any]:
        """Called by DALI, on the thread that schedules a run, once per batch."""
        place = len(self._in_flight)
        if place == len(self._undelivered):
            self._undelivered.append(next(self._upcoming))
        self._in_flight.append(self._undelivered[place])  # a suspect from here on
        self._in_flight[place] = self._without_bad_files(self._undelivered[place])
        return self._inputs(self._in_flight[place])

    def _without_bad_files(self, batch: MicroBatch) -> MicroBatch:
        indices = batch.indices.copy()
        for place in self._bad_files.places(batch.indices):
            if not self._is_made_alone(batch, place):
                indices[place] = self._bad_files.stand_in(int(indices[place]))
        return batch._replace(indices=indices)

    def _is_made_alone(self, batch: MicroBatch, place: int) -> bool:
        """Whether DALI can decode this one sample: a bad file's crop may lie where it is whole."""
        here = slice(place, place + 1)
        try:
            self._decode(batch._replace(indices=batch.indices[here], copies=batch.copies[here]))
        except (RuntimeError, OSError):
            return False
        return True

    def _decode(self, batch: MicroBatch) -> None:
        """Decodes a part of a batch by a graph of its own. Raises RuntimeError or OSError where DALI cannot."""
        stages = self._probe(lambda: self._inputs(batch))
        stages.schedule()
        stages.skip()

    def _to_device(self, values: NDArray[np.int64]) -> torch.Tensor:
        host = torch.from_numpy(values)
        # Only from pinned memory does a copy not wait for the device.
        return host if self._device.type == "cpu" else host.pin_memory().to(self._device, non_blocking=True)


def file_reader(manifest: Manifest, threads: int) -> Callable[[NDArray[np.int64]], Any]:
    """What the graph is given per file: its path where DALI reads files itself, else its bytes."""
    if manifest.packed is not None:
        return SliceReader(manifest.packed)
    if graphs.READS_FILES:
        prefix = os.path.join(manifest.root, "")
        return lambda indices: manifest.paths.padded(indices, prefix)
    pool = ThreadPoolExecutor(threads)
    return lambda indices: list(pool.map(lambda i: np.fromfile(manifest.file(int(i)), np.uint8), indices))
