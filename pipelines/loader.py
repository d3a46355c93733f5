"""Make batches with DALI in the order of a plan, replacing what cannot be decoded."""

import functools
import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.checks.bad_list import BadFile
from pipelines.checks.decode_one import is_trouble, patiently
from pipelines.dali import graphs
from pipelines.files.manifest import Manifest
from pipelines.files.shards import SliceReader
from pipelines.plan import MicroBatch, Plan, augment_params
from pipelines.spec import UNREADABLE, AugmentSpec, Batch, DataError, EvalSpec, Placement
from pipelines.stand_ins import StandIns

MAX_RATIO = 100  # of the sides of an image in evaluation; a longer one is squeezed to this
_FIRST_PIXEL = np.array([[0, 0, 1, 1]], np.int32)  # top, left, height, width


def train_loader(
    manifest: Manifest, plan: Plan, spec: AugmentSpec, place: Placement | None = None, **placement: Any
) -> "DaliLoader":
    """Return a loader of this rank's augmented micro-batches, in the plan's order.

    Another sample, with its own label and draws, replaces an undecodable one. `placement` overrides fields
    of `place`. Raises DataError for "mixed" without a CUDA device. `epoch` raises DataError for too many bad
    files, ValueError for a world that does not divide the plan or a wrong RandAugment string.
    """
    place = replace(place or Placement(), **placement)
    read = file_reader(manifest, place.threads)

    def inputs(batch: MicroBatch) -> Sequence[Any]:
        indices = batch.indices
        params = augment_params(plan, batch, manifest.heights[indices], manifest.widths[indices], spec)
        return [read(indices), params.windows, params.flips, *(params.jitter or ()), *(params.layers or ())]

    micro_batches = functools.partial(plan.micro_batches, rank=place.rank, world=place.world)

    return DaliLoader(manifest, spec, place, plan.micro_batch_size, micro_batches, inputs, plan.order)


def eval_loader(
    manifest: Manifest, spec: EvalSpec, place: Placement | None = None, *, batch_size: int, **placement: Any
) -> "DaliLoader":
    """Return a loader of every image once over all ranks: this rank's are `[rank::world]`.

    Its last batch may be smaller. An image that cannot be decoded keeps its place, with another one's pixels
    and the label `UNREADABLE`. `epoch` ignores the epoch's number and accepts no `start`. Arguments and
    errors as for `train_loader`; ValueError also when the crop is larger than the resized image.
    """
    if spec.resize_px < spec.image_px:
        raise ValueError(f"resize_px {spec.resize_px} is below image_px {spec.image_px}")
    place = replace(place or Placement(), **placement)
    read = file_reader(manifest, place.threads)

    def micro_batches(epoch: int, start: int) -> Iterator[MicroBatch]:
        if start:
            raise ValueError(f"evaluation begins at 0, not at {start}")
        mine = np.arange(place.rank, len(manifest), place.world)
        for step, begin in enumerate(range(0, len(mine), batch_size)):
            indices = mine[begin : begin + batch_size]
            # Always epoch 0: all evaluations are alike, so the batches in flight fit the next one.
            yield MicroBatch(0, step, place.rank, indices, np.zeros_like(indices))

    def inputs(batch: MicroBatch) -> Sequence[Any]:
        heights, widths = manifest.heights[batch.indices], manifest.widths[batch.indices]
        sizes, offsets = eval_windows(heights, widths, spec.resize_px, spec.image_px)
        return [read(batch.indices), sizes.astype(np.float32), offsets]

    every = np.arange(len(manifest))
    return DaliLoader(manifest, spec, place, batch_size, micro_batches, inputs, lambda _: every)


def eval_windows(
    heights: NDArray[np.int32], widths: NDArray[np.int32], resize_px: int, image_px: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return sizes (B, 2) of torchvision's Resize(resize_px) and offsets (B, 2) of its CenterCrop(image_px).

    The longer side is truncated, and at most `MAX_RATIO` times the shorter: 1 x 60,000 pixels would become
    184 x 11 million, 6 GB. Halves of an offset round to even, as in Python's `round`.
    """
    stored = np.stack([heights, widths], axis=1).astype(np.int64)  # (B, 2)
    sizes = np.minimum(resize_px * stored // stored.min(axis=1, keepdims=True), MAX_RATIO * resize_px)
    return sizes.astype(np.int32), np.rint((sizes - image_px) / 2).astype(np.int32)


class DaliLoader:
    """A DALI pipeline fed from a plan, built at the first batch. `train_loader` and `eval_loader` make one.

    An undecodable file ends the pipeline. Then the files of all batches in flight are checked, and a new
    pipeline starts at the first undelivered batch. Whether a sample is replaced depends on its file and
    draws alone: a file cut in the middle still gives the crops above the cut.
    `micro_batches` yields those of (epoch, start); `inputs` returns the graphs' inputs for a micro-batch.
    `order` returns the samples of an epoch, those of all ranks.
    """

    def __init__(
        self, manifest: Manifest, spec: AugmentSpec | EvalSpec, place: Placement, batch_size: int,
        micro_batches: Callable[[int, int], Iterator[MicroBatch]],
        inputs: Callable[[MicroBatch], Sequence[Any]],
        order: Callable[[int], NDArray[np.int64]],
    ) -> None:  # fmt: skip
        self._run = graphs.execution(place, batch_size, reads_files=manifest.packed is None)
        self._stand_ins = StandIns(manifest, place.max_bad_fraction, place.threads)
        self._manifest, self._micro_batches = manifest, micro_batches
        self._inputs, self._order = inputs, order
        stages = graphs.TwoGraphs if self._run.device == "cpu" else graphs.OneGraph
        self._build = functools.partial(stages, spec=spec, run=self._run)
        self._trains = isinstance(spec, AugmentSpec)
        device_id = self._run.device_id
        self._device = torch.device("cpu" if device_id is None else f"cuda:{device_id}")
        self._stages: graphs.OneGraph | graphs.TwoGraphs | None = None
        self._upcoming: Iterator[MicroBatch] = iter(())
        self._undelivered: deque[MicroBatch] = deque()  # taken from `_upcoming`, as planned
        self._in_flight: deque[MicroBatch] = deque()  # the first of these as DALI was given them
        self._num_bytes = 0
        self._undecodable: set[bytes] = set()  # digests of contents of which not even one pixel decodes

    def __len__(self) -> int:
        """Return the number of this rank's batches in an epoch."""
        return sum(1 for _ in self._micro_batches(0, 0))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches after `start` consumed samples. A batch owns its memory.

        With an epoch's last batches the first of the next one are made; another request throws those away.
        Raises DataError, and can then be called again: too many bad files, or a batch failed twice although
        Pillow can read its files. RuntimeError: this epoch was left for another one and then continued.
        """
        for position, planned in enumerate(self._micro_batches(epoch, start)):
            if not self._undelivered or self._undelivered[0].identity != planned.identity:
                if position:
                    raise RuntimeError(f"epoch {epoch} cannot go on: another epoch was begun on this loader")
                starts = itertools.chain([start], itertools.repeat(0))  # of this epoch and all later ones
                epochs = map(self._micro_batches, itertools.count(epoch), starts)
                self._upcoming = itertools.chain.from_iterable(epochs)
                if (packed := self._manifest.packed) and packed.mirror:
                    # What the rest of this epoch leaves out, a later one wants.
                    rest = self._order(epoch)[start:]
                    packed.mirror.begin(packed, np.append(rest, np.arange(len(self._manifest))))
                self._rewind()
                self._undelivered.clear()
            try:
                images, given = self._receive()
            except DataError:
                self.close()
                raise
            self._num_bytes += int(self._manifest.size_bytes[given.indices].sum())
            labels, indices = self._manifest.labels[given.indices], given.indices
            if not self._trains:
                labels = np.where(given.indices == planned.indices, labels, UNREADABLE)
                indices = planned.indices
            # (B, H, W, 3) -> (B, 3, H, W)
            images = images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
            yield Batch(images, self._to_device(labels), self._to_device(indices))

    def take_bad_files(self) -> list[BadFile]:
        """Return the files found to be bad since the last call, each once in the life of this loader."""
        return self._stand_ins.take_new()

    def take_num_bytes(self) -> int:
        """Return the encoded bytes of the images delivered since the last call."""
        num_bytes, self._num_bytes = self._num_bytes, 0
        return num_bytes

    def close(self) -> None:
        """Free the pipeline: threads, memory and the batches in flight. The next epoch builds a new one."""
        self._rewind()
        if self._device.type == "cuda":
            graphs.release_memory()
        self._undelivered.clear()
        self._stand_ins.close()

    def _receive(self) -> tuple[torch.Tensor, MicroBatch]:
        """Return the next images and the batch that they are, stand-ins included."""
        tried_again = False
        while True:
            try:
                self._fill()
                assert self._stages is not None
                images = self._stages.fetch()
                break
            except (RuntimeError, OSError) as error:
                # DALI seldom names the file, and with several batches in flight not even the batch.
                batches = list(self._in_flight)
                self._rewind()
                found = self._stand_ins.check(index for batch in batches for index in batch.indices.tolist())
                if tried_again and not found:
                    self._stand_ins.find_undecodable(batches, self._decode, error)
                tried_again = not found
        given = self._in_flight.popleft()
        self._undelivered.popleft()
        try:
            self._fill()
        except (RuntimeError, OSError):  # the next call meets it again
            self._rewind()
        return images, given

    def _fill(self) -> None:
        """Keep the queue full; the very first call schedules all of it at once."""
        if not self._undelivered:
            self._undelivered.append(next(self._upcoming))
        if self._stages is None:
            self._stages = self._build(self._pull)
        while len(self._in_flight) < self._run.prefetch_batches:
            self._stages.schedule()

    def _rewind(self) -> None:
        """Drop the pipeline, which fails for ever after a failure; a new one repeats what is undelivered."""
        self._stages = None
        self._in_flight.clear()

    def _pull(self) -> Sequence[Any]:
        """Return DALI's inputs for the next batch; DALI calls it on the thread that schedules a run."""
        if len(self._in_flight) == len(self._undelivered):
            self._undelivered.append(next(self._upcoming))
        planned = self._undelivered[len(self._in_flight)]
        self._in_flight.append(planned)  # a suspect from here on
        indices = planned.indices.copy()
        for place in self._stand_ins.bad_places(indices):
            if not self._decodes(planned.part(slice(place, place + 1))):
                indices[place] = self._stand_ins.stand_in(int(indices[place]))
        self._in_flight[-1] = given = planned._replace(indices=indices)
        return self._inputs(given)

    def _decodes(self, sample: MicroBatch) -> bool:
        """Return whether DALI decodes a sample of a bad file: its crop may lie in the part that is whole.

        DALI decodes from the top: contents without a first pixel have no crop either. They are remembered,
        for a pipeline ends with its failure and takes up to a second to build on a GPU (estimated).
        """
        index, packed = int(sample.indices[0]), self._manifest.packed
        path = Path(self._manifest.file(index))
        try:
            content = patiently(path.read_bytes) if packed is None else packed.read(index)
        except OSError as error:
            if is_trouble(error):  # another sample must not take the place of a good one
                raise DataError.of(error, path) from error
            return False
        digest = hashlib.sha256(content).digest()
        if not content or digest in self._undecodable:
            return False
        try:
            self._decode(sample)
        except (RuntimeError, OSError):
            try:
                self._decode(sample, content)
            except RuntimeError:
                self._undecodable.add(digest)
            return False
        return True

    def _decode(self, batch: MicroBatch, content: bytes | None = None) -> None:
        """Test-decode a part of a batch, or the first pixel of `content`.
        Raises RuntimeError or OSError when DALI cannot.
        """
        inputs, run = [[np.frombuffer(content or b"", np.uint8)], _FIRST_PIXEL], self._run
        if content is None:
            inputs = list(self._inputs(batch))
        run = replace(run, reads_files=run.reads_files and content is None, prefetch_batches=1)
        graphs.decode_graph(lambda: inputs[: 1 + self._trains], run, windows=self._trains).run()

    def _to_device(self, values: NDArray[np.int64]) -> torch.Tensor:
        host = torch.from_numpy(values)
        # Only from pinned memory does a copy not wait for the device.
        return host if self._device.type == "cpu" else host.pin_memory().to(self._device, non_blocking=True)


def file_reader(manifest: Manifest, threads: int) -> Callable[[NDArray[np.int64]], Any]:
    """Return a function from indices to a graph's first input: paths if DALI can read them, else bytes."""
    if manifest.packed is not None:
        return SliceReader(manifest.packed)
    if graphs.READS_FILES:
        prefix = os.fsencode(os.path.join(manifest.root, ""))
        paths = manifest.paths.encoded
        # One row of bytes per path, padded with zeros: no Python loop over samples.
        return lambda indices: np.char.add(prefix, paths[indices]).view(np.uint8).reshape(len(indices), -1)
    pool = ThreadPoolExecutor(threads)
    return lambda indices: list(pool.map(lambda i: np.fromfile(manifest.file(int(i)), np.uint8), indices))
