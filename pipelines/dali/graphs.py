"""Build the DALI graphs. Every input comes from a `source`; the graphs hold no state and draw nothing.

One code base serves DALI 1.34 and 2.x: it looks for features and never compares versions.
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import backend, fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from pipelines.dali import augment
from pipelines.rand_augment import parse
from pipelines.spec import AugmentSpec, DataError, EvalSpec, Placement

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
        for k in range(policy.num_layers):
            numbers = matrices[k], bits[k], factors[k], kernels[k]
            image = augment.rand_augment_layer(image, branches[k], numbers, background, policy.blurs)
    if spec.color_jitter:
        image = augment.color_jitter(image, params[1], params[2])
    return augment.normalise(image, spec.mean, spec.std, spec.fp16, flips)


@augment.do_not_convert
def _external_source(source: Source, inputs: list[tuple[Any, int]], no_copy: bool = False) -> Any:
    dtypes, ndims = [dtype for dtype, _ in inputs], [ndim for _, ndim in inputs]
    layout = ["HWC" if given == _IMAGES else "" for given in inputs]
    return fn.external_source(
        source, len(inputs), batch=True, no_copy=no_copy, dtype=dtypes, ndim=ndims, layout=layout
    )


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
    pipeline = pipeline_def(graph, enable_conditionals=branches)(
        batch_size=run.batch_size, num_threads=run.threads, device_id=run.device_id, **options
    )
    with warnings.catch_warnings():
        # DALI 2.x asks for NPP, which no operator here needs, and names the wrong package.
        warnings.filterwarnings("ignore", message=".*NPP is typically provided", category=Warning)
        pipeline.build()
    return pipeline
