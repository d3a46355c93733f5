"""Build the DALI  Every input comes from a `source`; the graphs hold no state and draw nothing.

One code base serves DALI 1.34 and 2.x: it looks for features and never compares versions.
"""

import inspect
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import backend, fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type

from pipelines.dali import augment
from pipelines.dali.augment import Pixels
from pipelines.rand_augment import parse
from pipelines.spec import AugmentSpec, DataError, EvalSpec, Interpolation, Placement

# Called once per batch; returns the graph's inputs, whole arrays (B, ...) in the graph's order.
Source = Callable[[], Sequence[Any]]

# DALI reads files itself, outside Python's lock, when it is given paths; 1.34 has to be given their bytes.
READS_FILES = hasattr(fn, "io")
# With the dynamic executor an output owns its memory; without it the memory is reused two batches later.
OUTPUTS_OWN_MEMORY = "exec_dynamic" in inspect.signature(Pipeline.__init__).parameters

# Type and number of dimensions of one sample of an input.
_FILES = (types.UINT8, 1)
_IMAGES = (types.UINT8, 3)
_WINDOWS, _FLIPS = (types.INT32, 1), (types.INT32, 0)
_JITTER = [(types.INT32, 1), (types.FLOAT, 2)]
_LAYERS = [(types.INT32, 1), (types.FLOAT, 3), (types.UINT8, 2), (types.FLOAT, 2), (types.FLOAT, 3)]
_EVAL_WINDOWS = [(types.FLOAT, 1), (types.INT32, 1)]


@dataclass(frozen=True)
class Execution:
    """Device and resources of a graph."""

    device: Literal["gpu", "cpu"]
    decode: Literal["mixed", "mixed_whole", "cpu"]  # see `spec.Placement`; whole images take more memory
    device_id: int | None
    batch_size: int
    threads: int
    prefetch_batches: int
    reads_files: bool = READS_FILES  # False: its input is the bytes of images, not the paths of files
    # Share of a batch for the GPU's JPEG engine (A100 and later), not its cores; None: DALI's default, 0.65
    hw_decoder_load: float | None = None


def execution(place: Placement, batch_size: int, *, reads_files: bool) -> Execution:
    """Return what `place` means here. Raises DataError for "mixed" without a CUDA device."""
    device = torch.device(place.device)
    common = batch_size, place.threads, place.prefetch_batches, READS_FILES and reads_files
    if device.type != "cuda":
        if place.decode in ("mixed", "mixed_whole"):
            what = f"{place.decode} decodes on a GPU, and there is none; use auto or cpu"
            raise DataError(f"data.decode: {what}")
        return Execution("cpu", "cpu", None, *common)
    device_id = torch.cuda.current_device() if device.index is None else device.index
    if place.decode == "cpu":  # only the decoder on a GPU has an engine, though DALI accepts its load here
        return Execution("gpu", "cpu", device_id, *common)
    decode = "mixed" if place.decode == "auto" else place.decode
    return Execution("gpu", decode, device_id, *common, place.hw_decoder_load)


def file_graph(source: Source, spec: AugmentSpec | EvalSpec, run: Execution) -> Pipeline:
    """Decode and resize a crop window, or resize and crop, then as `finish_graph`: one output, (B, H, W, 3).

    `source` returns files (see `Execution.reads_files`), then windows and the params of `finish_graph`. For
    evaluation: files, sizes (B, 2) after resizing and offsets (B, 2) of the crop, height first.
    """
    square = [spec.image_px, spec.image_px]

    def graph() -> Any:
        if isinstance(spec, EvalSpec):
            files, sizes, offsets = _external_source(source, [_FILES, *_EVAL_WINDOWS])
            image = augment.resize(_decode(run, files), sizes, spec.interpolation)
            return _finished(fn.slice(image, start=offsets, shape=square, axes=[0, 1]), (), spec)
        files, windows, *params = _external_source(source, [_FILES, _WINDOWS, *_augment_inputs(spec)])
        image = augment.resize(_decode(run, files, windows), square, spec.interpolation)
        return _finished(image, params, spec)

    return _pipeline(graph, run, spec)


def decode_graph(source: Source, run: Execution, *, windows: bool) -> Pipeline:
    """Decode only: one output, (h, w, 3) of every sample. `source` returns files, then `windows`."""

    def graph() -> Any:
        return _decode(run, *_external_source(source, [_FILES, _WINDOWS] if windows else [_FILES]))

    return _pipeline(graph, run, None)


def finish_graph(resized: Source, params: Source, spec: AugmentSpec | EvalSpec, run: Execution) -> Pipeline:
    """Augment if it is for training, and normalise: one output, (B, H, W, 3).

    `resized` returns uint8 images (B, H, W, 3), which must stay as they are until the output is fetched. For
    training, `params` returns flips, then JitterParams and LayerParams if the spec has them.
    """

    def graph() -> Any:
        (image,) = _external_source(resized, [_IMAGES], no_copy=True)
        given = () if isinstance(spec, EvalSpec) else _external_source(params, _augment_inputs(spec))
        return _finished(image, given, spec)

    return _pipeline(graph, replace(run, prefetch_batches=1), spec)


def release_memory() -> None:
    """Free unused GPU memory: DALI's pools never shrink by themselves (DALI issues 5087, 278)."""
    backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]


@augment.do_not_convert
def _augment_inputs(spec: AugmentSpec) -> list[tuple[Any, int]]:
    jitter = _JITTER if spec.color_jitter else []
    return [_FLIPS, *jitter, *(_LAYERS if spec.rand_augment is not None else [])]


def _finished(image: Any, params: Sequence[Any], spec: AugmentSpec | EvalSpec) -> Any:
    """Return the image normalised and, for training, flipped, augmented and jittered before."""
    if isinstance(spec, EvalSpec):
        return augment.normalise(image, spec.mean, spec.std, spec.fp16)
    policy = parse(spec.rand_augment) if spec.rand_augment is not None else None
    flips = params[0]
    if policy:
        # Before the warps; without them, normalising mirrors for nothing.
        image, flips = fn.flip(image, horizontal=flips), 0
        # The background colour of warps: the mean of the data for timm's presets, mid-grey for DALI's, black
        # for torchvision's.
        grey = {"dali": 128, "wide": 0}.get(policy.severity)
        fill = [round(255 * value) if grey is None else grey for value in spec.mean]
        background = np.full((spec.image_px, spec.image_px, 3), fill, np.uint8)
        branches, matrices, bits, factors, kernels = params[-5:]
        blurs = "GaussianBlur" in policy.ops
        for k in range(policy.num_layers):
            numbers = matrices[k], bits[k], factors[k], kernels[k]
            image = augment.rand_augment_layer(image, branches[k], numbers, background, blurs)
    if spec.color_jitter:
        image = augment.color_jitter(image, params[1], params[2])
    return augment.normalise(image, spec.mean, spec.std, spec.fp16, flips)


@augment.do_not_convert
def _external_source(source: Source, inputs: list[tuple[Any, int]], no_copy: bool = False) -> Any:
    options: Any = {"dtype": [dtype for dtype, _ in inputs], "ndim": [ndim for _, ndim in inputs]}
    options["layout"] = ["HWC" if given == _IMAGES else "" for given in inputs]
    return fn.external_source(source, len(inputs), batch=True, no_copy=no_copy, **options)


@augment.do_not_convert
def _decode(run: Execution, files: Any, windows: Any = None) -> Any:
    """Decode whole images, or of each its window: (top, left, height, width)."""
    # Mapping a file that is then cut short ends the process; reading it ends one batch.
    contents = fn.io.file.read(files, dont_use_mmap=True) if run.reads_files else files
    whole = windows is None or run.decode == "mixed_whole"
    decoder: Any = fn.decoders.image if whole else fn.decoders.image_slice
    options: dict[str, Any] = {}
    # As Pillow, torchvision and timm: no rotation by EXIF. The manifest's sizes are of the stored image.
    if "adjust_orientation" in inspect.signature(decoder).parameters:
        options["adjust_orientation"] = False
    if run.hw_decoder_load is not None:
        options["hw_decoder_load"] = run.hw_decoder_load
    region = {} if windows is None else {"start": windows[:2], "shape": windows[2:], "axes": [0, 1]}
    if not whole:
        options |= region
    # Without fancy upsampling a GPU's colour is coarser than Pillow's. nvJPEG before CUDA 12.1 ignores it.
    on_cpu = run.device == "cpu" or run.decode == "cpu"
    image = decoder(contents, device="cpu" if on_cpu else "mixed", jpeg_fancy_upsampling=True, **options)
    if whole and region:
        image = fn.slice(image, **region)
    # The GPU does the rest even where it does not decode: on a CPU DALI's resize takes nearly as long.
    return image.gpu() if run.device == "gpu" and on_cpu else image


def _pipeline(graph: Callable[[], Any], run: Execution, spec: AugmentSpec | EvalSpec | None) -> Pipeline:
    options: dict[str, Any] = {"exec_dynamic": True} if OUTPUTS_OWN_MEMORY else {}
    options |= {"prefetch_queue_depth": run.prefetch_batches, "seed": 0}
    branches = isinstance(spec, AugmentSpec) and (bool(spec.color_jitter) or spec.rand_augment is not None)
    options |= {"batch_size": run.batch_size, "num_threads": run.threads, "device_id": run.device_id}
    pipeline = pipeline_def(graph, enable_conditionals=branches)(**options)
    with warnings.catch_warnings():
        # DALI 2.x asks for NPP, which no operator here needs, and names the wrong package.
        warnings.filterwarnings("ignore", message=".*NPP is typically provided", category=Warning)
        pipeline.build()
    return pipeline


CHUNK = 8  # images in a task: few, so that all threads finish together


def resize_into(out: Pixels, image: Pixels, interpolation: Interpolation) -> None:
    """Resize `image` (h, w, 3) into `out` (H, W, 3) with an antialiasing filter, as Pillow does."""
    source, target = (torch.from_numpy(pixels[None]).permute(0, 3, 1, 2) for pixels in (image, out))
    # The operator behind F.interpolate(antialias=True), for its `out`: it saves a copy of 0.09 ms an image.
    resize = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa").out
    resize(source, out.shape[:2], False, None, None, out=target)


class OneGraph:
    """A `file_graph`, from files to normalised images; prefetch_batches at most are in the making."""

    def __init__(self, source: Source, spec: AugmentSpec | EvalSpec, run: Execution) -> None:
        self._pipeline, self._device_id = file_graph(source, spec, run), run.device_id

    def schedule(self) -> None:
        """Begin the next batch, without waiting; the very first call begins prefetch_batches."""
        self._pipeline.schedule_run()

    def fetch(self) -> torch.Tensor:
        """Return the oldest batch, (B, H, W, 3), in its own memory. Raises RuntimeError or OSError."""
        return _fetch_output(self._pipeline, self._device_id)


class TwoGraphs:
    """As `OneGraph`, but the graph decodes only; torch resizes what is fetched, a second one finishes it.
    On a CPU: of the 2.3 ms of a random crop of an ImageNet picture (bicubic, 160 px, one core) DALI's
    antialiased resize took 1.1; torch's uint8 kernel takes 0.17, in fixed-point arithmetic as Pillow's.
    """

    def __init__(self, source: Source, spec: AugmentSpec | EvalSpec, run: Execution) -> None:
        self._source, self._spec = source, spec
        self._later_inputs: deque[Sequence[Any]] = deque()  # of the later steps, per batch being decoded
        self._resized: Sequence[Pixels] = ()  # lent to the second graph, not copied
        self._params: Sequence[Any] = ()
        self._threads = ThreadPoolExecutor(run.threads)
        self._decoder = decode_graph(self._pull, run, windows=isinstance(spec, AugmentSpec))
        self._finisher = finish_graph(lambda: self._resized, lambda: self._params, spec, run)

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
    options = {"cuda_stream": stream} if OUTPUTS_OWN_MEMORY else {}
    (output,) = pipeline.share_outputs(**options)
    shared = output.as_tensor()
    if OUTPUTS_OWN_MEMORY and device_id is None:
        images = torch.from_dlpack(shared)
    else:
        device = "cpu" if device_id is None else f"cuda:{device_id}"
        images = torch.empty(shared.shape(), dtype=to_torch_type[shared.dtype], device=device)
        feed_ndarray(shared, images, cuda_stream=stream)
    pipeline.release_outputs()
    return images
