"""What makes a loader's batches, in the order in which they were asked for: one DALI graph, or on a CPU two.

DALI's antialiased resize is slow on a CPU: it took 1.1 of the 2.3 ms of a random crop of an ImageNet picture (bicubic,
160 px, one core). torch's uint8 kernel takes 0.17 ms, in fixed-point arithmetic as Pillow's. So on a CPU one graph
decodes, torch resizes in a pool of threads, and another graph augments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type

from pipelines.dali import graphs
from pipelines.dali.graphs import Execution, Source
from pipelines.spec import AugmentSpec, EvalSpec, Interpolation

# The decoded images of a batch, uint8 (h, w, 3) each, and what else the step needs; gives them as (B, H, W, 3).
Pixels = NDArray[np.uint8]
Resize = Callable[[Sequence[Any], Sequence[Any]], Pixels]

# The operators behind F.interpolate(antialias=True), for their `out`: without it 0.09 ms an image go into a copy.
_KERNELS = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}


CHUNK = 8  # images: a short task, so that all threads finish together


class Stages(Protocol):
    """Batches in the making, at most `Execution.prefetch_batches` of them."""

    def schedule(self) -> None:
        """Begin the next batch, without waiting. The very first call begins all that may be in the making."""
        ...

    def take(self) -> torch.Tensor:
        """The oldest batch in the making, (B, H, W, 3), in memory of its own. What DALI cannot read fails here."""
        ...

    def skip(self) -> None:
        """As `take`, for a batch whose images nobody wants."""
        ...


def train_stages(spec: AugmentSpec, run: Execution) -> Callable[[Source], Stages]:
    """Makes the stages of a training loader from a source as of `graphs.train_graph`."""
    if run.device == "gpu":
        return lambda source: OneGraph(graphs.train_graph(source, spec, run), run)

    def one(out: Pixels, image: Pixels) -> None:
        resize_into(out, image, spec.interpolation)

    resize = _parallel(one, spec.image_px, run.threads)
    return lambda source: TwoGraphs(
        source,
        lambda files_and_windows: graphs.decode_graph(files_and_windows, run, windows=True),
        resize,
        lambda resized, params: graphs.augment_graph(resized, params, spec, run),
        num_inputs=(2, 0),
    )


def eval_stages(spec: EvalSpec, run: Execution) -> Callable[[Source], Stages]:
    """Makes the stages of an evaluation loader from a source as of `graphs.eval_graph`."""
    if run.device == "gpu":
        return lambda source: OneGraph(graphs.eval_graph(source, spec, run), run)

    def one(out: Pixels, image: Pixels, size: NDArray[np.float32], offset: NDArray[np.int32]) -> None:
        resized = np.empty((*size.astype(int), 3), np.uint8)
        resize_into(resized, image, spec.interpolation)
        top, left = offset
        out[:] = resized[top : top + spec.image_px, left : left + spec.image_px]

    resize = _parallel(one, spec.image_px, run.threads)
    return lambda source: TwoGraphs(
        source,
        lambda files: graphs.decode_graph(files, run, windows=False),
        resize,
        lambda resized, params: graphs.normalise_graph(resized, spec, run),
        num_inputs=(1, 2),
    )


def decode_stages(run: Execution, *, windows: bool) -> Callable[[Source], Stages]:
    """Makes stages that can only be skipped: they decode, one batch at a time, to find out whether DALI can."""
    run = replace(run, prefetch_batches=1)
    num_inputs = 1 + windows
    return lambda source: OneGraph(
        graphs.decode_graph(lambda: source()[:num_inputs], run, windows=windows), run
    )


def resize_into(out: Pixels, image: Pixels, interpolation: Interpolation) -> None:
    """Resizes `image` (h, w, 3) to the size of `out` (H, W, 3) with an antialiasing filter, as Pillow does."""
    source, target = (torch.from_numpy(pixels[None]).permute(0, 3, 1, 2) for pixels in (image, out))
    _KERNELS[interpolation](source, out.shape[:2], False, None, None, out=target)


def _parallel(one: Callable[..., None], image_px: int, threads: int) -> Resize:
    """`one(out, image, *inputs)` for every image of a batch, a few a task: a task costs the caller 20 us."""
    pool = ThreadPoolExecutor(threads)

    def resize(images: Sequence[Any], inputs: Sequence[Any]) -> Pixels:
        resized = np.empty((len(images), image_px, image_px, 3), np.uint8)

        def work_on(chunk: range) -> None:
            for i in chunk:
                one(resized[i], np.asarray(images[i]), *(given[i] for given in inputs))

        chunks = (range(begin, min(begin + CHUNK, len(images))) for begin in range(0, len(images), CHUNK))
        tuple(pool.map(work_on, chunks))
        return resized

    return resize


class OneGraph:
    """A graph from files to normalised images."""

    def __init__(self, pipeline: Pipeline, run: Execution) -> None:
        self._pipeline, self._device_id = pipeline, run.device_id

    def schedule(self) -> None:
        self._pipeline.schedule_run()

    def take(self) -> torch.Tensor:
        return _take_output(self._pipeline, self._device_id)

    def skip(self) -> None:
        self._pipeline.share_outputs()
        self._pipeline.release_outputs()


class TwoGraphs:
    """A graph that decodes ahead of time, and what is done with its images when they are wanted.

    Args:
        source: gives the inputs of decoding, of resizing and of the second graph, in this order.
        decode, finish: make the graphs; `finish` is given where its images and its other inputs come from.
        num_inputs: of decoding and of resizing.
    """

    def __init__(
        self,
        source: Source,
        decode: Callable[[Source], Pipeline],
        resize: Resize,
        finish: Callable[[Source, Source], Pipeline],
        num_inputs: tuple[int, int],
    ) -> None:
        self._source, self._resize = source, resize
        self._num_decode, self._num_resize = num_inputs
        self._decoder_given: deque[Sequence[Any]] = (
            deque()
        )  # what later steps get for the batches being decoded
        self._resized: Sequence[Pixels] = ()  # lent to the second graph, not copied
        self._params: Sequence[Any] = ()
        self._decoder = decode(self._pull)
        self._finisher = finish(lambda: self._resized, lambda: self._params)

    def schedule(self) -> None:
        self._decoder.schedule_run()

    def take(self) -> torch.Tensor:
        (decoded,) = self._decoder.share_outputs()
        given = self._decoder_given.popleft()
        self._resized = [self._resize(decoded, given[: self._num_resize])]
        self._params = given[self._num_resize :]
        self._decoder.release_outputs()
        self._finisher.schedule_run()
        return _take_output(self._finisher, None)

    def skip(self) -> None:
        self._decoder.share_outputs()
        self._decoder.release_outputs()
        self._decoder_given.popleft()

    def _pull(self) -> Sequence[Any]:
        inputs = self._source()
        self._decoder_given.append(inputs[self._num_decode :])
        return inputs[: self._num_decode]


def _take_output(pipeline: Pipeline, device_id: int | None) -> torch.Tensor:
    """The pipeline's next output as a tensor that DALI will not write to again, (B, H, W, 3).

    On a CPU it is DALI's own memory where DALI gives that away. On a GPU it is a copy, 79 MB for 512 images, 50 us on
    an H100 (computed): to take memory back from torch, DALI 2.x has a thread call cudaDeviceSynchronize, which breaks a
    CUDA graph that is being recorded, and which ends the process, without a word, after any CUDA error.
    """
    stream = None if device_id is None else torch.cuda.current_stream(device_id)
    (output,) = (
        pipeline.share_outputs(cuda_stream=stream) if graphs.OUTPUTS_OWN_MEMORY else pipeline.share_outputs()
    )
    shared = output.as_tensor()
    if graphs.OUTPUTS_OWN_MEMORY and device_id is None:
        images = torch.from_dlpack(shared)
    else:
        device = "cpu" if device_id is None else f"cuda:{device_id}"
        images = torch.empty(shared.shape(), dtype=to_torch_type[shared.dtype], device=device)
        feed_ndarray(shared, images, cuda_stream=stream)
    pipeline.release_outputs()
    return images
