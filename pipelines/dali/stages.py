"""Make a loader's batches, in the order in which they are scheduled, with one DALI graph or, on a CPU, two.

On a CPU one graph decodes, torch resizes in a pool of threads, and another graph augments: of the 2.3 ms of
a random crop of an ImageNet picture (bicubic, 160 px, one core) DALI's antialiased resize took 1.1; torch's
uint8 kernel takes 0.17, in fixed-point arithmetic as Pillow's.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type

from pipelines.dali import graphs
from pipelines.dali.augment import Pixels
from pipelines.spec import AugmentSpec, EvalSpec, Interpolation

CHUNK = 8  # images in a task: few, so that all threads finish together


def resize_into(out: Pixels, image: Pixels, interpolation: Interpolation) -> None:
    """Resize `image` (h, w, 3) into `out` (H, W, 3) with an antialiasing filter, as Pillow does."""
    source, target = (torch.from_numpy(pixels[None]).permute(0, 3, 1, 2) for pixels in (image, out))
    # The operator behind F.interpolate(antialias=True), for its `out`: it saves a copy of 0.09 ms an image.
    resize = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa").out
    resize(source, out.shape[:2], False, None, None, out=target)


class OneGraph:
    """A `graphs.file_graph`, from files to normalised images; prefetch_batches at most are in the making."""

    def __init__(self, source: graphs.Source, spec: AugmentSpec | EvalSpec, run: graphs.Execution) -> None:
        self._pipeline, self._device_id = graphs.file_graph(source, spec, run), run.device_id

    def schedule(self) -> None:
        """Begin the next batch, without waiting; the very first call begins prefetch_batches."""
        self._pipeline.schedule_run()

    def fetch(self) -> torch.Tensor:
        """Return the oldest batch, (B, H, W, 3), in its own memory. Raises RuntimeError or OSError."""
        return _fetch_output(self._pipeline, self._device_id)


class TwoGraphs:
    """As `OneGraph`, but the graph decodes only; torch resizes what is fetched, a second one finishes it."""

    def __init__(self, source: graphs.Source, spec: AugmentSpec | EvalSpec, run: graphs.Execution) -> None:
        self._source, self._spec = source, spec
        self._later_inputs: deque[Sequence[Any]] = deque()  # of the later steps, per batch being decoded
        self._resized: Sequence[Pixels] = ()  # lent to the second graph, not copied
        self._params: Sequence[Any] = ()
        self._threads = ThreadPoolExecutor(run.threads)
        self._decoder = graphs.decode_graph(self._pull, run, windows=isinstance(spec, AugmentSpec))
        self._finisher = graphs.finish_graph(lambda: self._resized, lambda: self._params, spec, run)

    def schedule(self) -> None:
        self._decoder.schedule_run()

    def fetch(self) -> torch.Tensor:
        (decoded,) = self._decoder.share_outputs()
        self._params = self._later_inputs.popleft()
        self._resized = [self._resize(decoded, self._params)]
        self._decoder.release_outputs()
        self._finisher.schedule_run()
        return _fetch_output(self._finisher, None)

    def _pull(self) -> Sequence[Any]:
        inputs = self._source()
        num_decode = 2 if isinstance(self._spec, AugmentSpec) else 1
        self._later_inputs.append(inputs[num_decode:])
        return inputs[:num_decode]

    def _resize(self, images: Any, inputs: Sequence[Any]) -> Pixels:
        """Resize, and for evaluation crop, images (h, w, 3) to (B, H, W, 3) in threads."""
        px, interpolation = self._spec.image_px, self._spec.interpolation
        resized = np.empty((len(images), px, px, 3), np.uint8)

        def resize_chunk(begin: int) -> None:  # a task costs the caller 20 us
            for index in range(begin, min(begin + CHUNK, len(images))):
                image = np.asarray(images[index])
                if isinstance(self._spec, AugmentSpec):
                    resize_into(resized[index], image, interpolation)
                    continue
                size, (top, left) = inputs[0][index].astype(int), inputs[1][index]
                whole = np.empty((*size, 3), np.uint8)
                resize_into(whole, image, interpolation)
                resized[index] = whole[top : top + px, left : left + px]

        tuple(self._threads.map(resize_chunk, range(0, len(images), CHUNK)))
        return resized


def _fetch_output(pipeline: Pipeline, device_id: int | None) -> torch.Tensor:
    """Return the pipeline's next output as a tensor that DALI will not write to again, (B, H, W, 3).

    On a CPU it is DALI's own memory where DALI gives that away. On a GPU it is a copy: to get memory back
    from torch, DALI 2.x calls cudaDeviceSynchronize in a thread of its own. That breaks a CUDA graph that is
    being recorded, and ends the process without a message after any CUDA error.
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
