"""Make a loader's batches, in the order in which they are scheduled, with one DALI graph or, on a CPU, two.

DALI's antialiased resize is slow on a CPU: it took 1.1 of the 2.3 ms of a random crop of an ImageNet picture
(bicubic, 160 px, one core). torch's uint8 kernel takes 0.17 ms, in fixed-point arithmetic as Pillow's. So on
a CPU one graph decodes, torch resizes in a pool of threads, and another graph augments.
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

Pixels = NDArray[np.uint8]
# From the decoded images of a batch, (h, w, 3) each, and the other inputs of the step, to (B, H, W, 3).
Resize = Callable[[Sequence[Any], Sequence[Any]], Pixels]

# The operators behind F.interpolate(antialias=True), for their `out`: without it 0.09 ms an image go into a
# copy.
_KERNELS = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}
CHUNK = 8  # images in a task: few, so that all threads finish together


class Stages(Protocol):
    """Batches in the making, at most `Execution.prefetch_batches` of them."""

    def schedule(self) -> None:
        """Begin the next batch, without waiting; the very first call begins prefetch_batches."""
        ...

    def fetch(self) -> torch.Tensor:
        """Return the oldest batch in the making, (B, H, W, 3), in memory of its own.

        Raises RuntimeError or OSError for a file that DALI cannot read.
        """
        ...

    def skip(self) -> None:
        """Wait for the oldest batch as `fetch`, and drop its images."""
        ...


def train_stages(spec: AugmentSpec, run: Execution) -> Callable[[Source], Stages]:
    """Return a maker of a training loader's stages from a source as of `graphs.train_graph`."""
    if run.device == "gpu":
        return lambda source: OneGraph(graphs.train_graph(source, spec, run), run)

    def resize_image(out: Pixels, image: Pixels) -> None:
        resize_into(out, image, spec.interpolation)

    resize = _parallel(resize_image, spec.image_px, run.threads)
    return lambda source: TwoGraphs(
        source,
        lambda files_and_windows: graphs.decode_graph(files_and_windows, run, windows=True),
        resize,
        lambda resized, params: graphs.augment_graph(resized, params, spec, run),
        num_inputs=(2, 0),
    )


def eval_stages(spec: EvalSpec, run: Execution) -> Callable[[Source], Stages]:
    """Return a maker of an evaluation loader's stages from a source as of `graphs.eval_graph`."""
    if run.device == "gpu":
        return lambda source: OneGraph(graphs.eval_graph(source, spec, run), run)

    def resize_and_crop(
        out: Pixels, image: Pixels, size: NDArray[np.float32], offset: NDArray[np.int32]
    ) -> None:
        resized = np.empty((*size.astype(int), 3), np.uint8)
        resize_into(resized, image, spec.interpolation)
        top, left = offset
        out[:] = resized[top : top + spec.image_px, left : left + spec.image_px]

    resize = _parallel(resize_and_crop, spec.image_px, run.threads)
    return lambda source: TwoGraphs(
        source,
        lambda files: graphs.decode_graph(files, run, windows=False),
        resize,
        lambda resized, params: graphs.normalise_graph(resized, spec, run),
        num_inputs=(1, 2),
    )


def decode_stages(run: Execution, *, windows: bool) -> Callable[[Source], Stages]:
    """Return a maker of stages that decode one batch at a time and can only be skipped, for test-decoding."""
    run = replace(run, prefetch_batches=1)
    num_inputs = 2 if windows else 1
    return lambda source: OneGraph(
        graphs.decode_graph(lambda: source()[:num_inputs], run, windows=windows), run
    )


def resize_into(out: Pixels, image: Pixels, interpolation: Interpolation) -> None:
    """Resize `image` (h, w, 3) into `out` (H, W, 3) with an antialiasing filter, as Pillow does."""
    source, target = (torch.from_numpy(pixels[None]).permute(0, 3, 1, 2) for pixels in (image, out))
    _KERNELS[interpolation](source, out.shape[:2], False, None, None, out=target)


def _parallel(resize_image: Callable[..., None], image_px: int, threads: int) -> Resize:
    """Call `resize_image(out, image, *inputs)` for every image, in tasks, which cost the caller 20 us each."""
    pool = ThreadPoolExecutor(threads)

    def resize(images: Sequence[Any], inputs: Sequence[Any]) -> Pixels:
        resized = np.empty((len(images), image_px, image_px, 3), np.uint8)

        def resize_chunk(begin: int) -> None:
            for i in range(begin, min(begin + CHUNK, len(images))):
                resize_image(resized[i], np.asarray(images[i]), *(given[i] for given in inputs))

        tuple(pool.map(resize_chunk, range(0, len(images), CHUNK)))
        return resized

    return resize


class OneGraph:
    """A graph from files to normalised images."""

    def __init__(self, pipeline: Pipeline, run: Execution) -> None:
        self._pipeline, self._device_id = pipeline, run.device_id

    def schedule(self) -> None:
        self._pipeline.schedule_run()

    def fetch(self) -> torch.Tensor:
        return _fetch_output(self._pipeline, self._device_id)

    def skip(self) -> None:
        self._pipeline.share_outputs()
        self._pipeline.release_outputs()


class TwoGraphs:
    """A graph that decodes ahead of time, and a second one that finishes its images when they are fetched.

    Args:
        source: returns the inputs of decoding, of resizing and of the second graph, in this order.
        decode, finish: makers of the graphs; `finish` gets a source of its images and a source of its other
            inputs.
        num_inputs: number of inputs of decoding and of resizing.
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
        self._later_inputs: deque[Sequence[Any]] = (
            deque()
        )  # inputs of the later steps, per batch being decoded
        self._resized: Sequence[Pixels] = ()  # lent to the second graph, not copied
        self._params: Sequence[Any] = ()
        self._decoder = decode(self._pull)
        self._finisher = finish(lambda: self._resized, lambda: self._params)

    def schedule(self) -> None:
        self._decoder.schedule_run()

    def fetch(self) -> torch.Tensor:
        (decoded,) = self._decoder.share_outputs()
        given = self._later_inputs.popleft()
        self._resized = [self._resize(decoded, given[: self._num_resize])]
        self._params = given[self._num_resize :]
        self._decoder.release_outputs()
        self._finisher.schedule_run()
        return _fetch_output(self._finisher, None)

    def skip(self) -> None:
        self._decoder.share_outputs()
        self._decoder.release_outputs()
        self._later_inputs.popleft()

    def _pull(self) -> Sequence[Any]:
        inputs = self._source()
        self._later_inputs.append(inputs[self._num_decode :])
        return inputs[: self._num_decode]


def _fetch_output(pipeline: Pipeline, device_id: int | None) -> torch.Tensor:
    """Return the pipeline's next output as a tensor that DALI will not write to again, (B, H, W, 3).

    On a CPU it is DALI's own memory where DALI gives that away. On a GPU it is a copy, 79 MB for 512 images,
    50 us on an H100 (computed). To get memory back from torch, DALI 2.x calls cudaDeviceSynchronize in a
    thread of its own. That breaks a CUDA graph that is being recorded, and it ends the process without a
    message after any CUDA error.
    """
    stream = None if device_id is None else torch.cuda.current_stream(device_id)
    options = {"cuda_stream": stream} if graphs.OUTPUTS_OWN_MEMORY else {}
    (output,) = pipeline.share_outputs(**options)
    shared = output.as_tensor()
    if graphs.OUTPUTS_OWN_MEMORY and device_id is None:
        images = torch.from_dlpack(shared)
    else:
        device = "cpu" if device_id is None else f"cuda:{device_id}"
        images = torch.empty(shared.shape(), dtype=to_torch_type[shared.dtype], device=device)
        feed_ndarray(shared, images, cuda_stream=stream)
    pipeline.release_outputs()
    return images
