"""The two DALI graphs. Every input comes from `source`; the graphs hold no state and draw nothing.

One code base for DALI 1.34 and 2.x: features are looked for, versions are never compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import backend, fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from pipelines import augment
from pipelines.policy import parse
from pipelines.spec import AugmentSpec, DataError, Decode, EvalSpec

# Called once per batch; returns the graph's inputs, whole arrays (B, ...) in the order the graph names them.
Source = Callable[[], Sequence[Any]]

# DALI reads files itself, outside Python's lock, when it is given paths; 1.34 has to be given their bytes.
READS_FILES = hasattr(fn, "io")
# With the dynamic executor an output owns its memory; without it the memory is written again two batches later.
OUTPUTS_OWN_MEMORY = "exec_dynamic" in inspect.signature(Pipeline.__init__).parameters

# Type and number of dimensions of one sample of an input.
_FILES = (types.UINT8, 1)
_WINDOWS_AND_FLIPS = [(types.INT32, 1), (types.INT32, 0)]
_JITTER = [(types.INT32, 1), (types.FLOAT, 2)]
_LAYERS = [(types.INT32, 1), (types.FLOAT, 3), (types.UINT8, 2), (types.FLOAT, 2), (types.FLOAT, 3)]
_EVAL_WINDOWS = [(types.FLOAT, 1), (types.INT32, 1)]


@dataclass(frozen=True)
class Execution:
    """Where and how a graph runs. `decode` "mixed" decodes JPEG on the GPU and needs `device` "gpu".

    `hw_decoder_load` is the share of a batch that goes to the GPU's JPEG engine, where it has one (A100 and later); the
    rest is decoded by its general cores. None is DALI's default, 0.65 in 1.34 and 2.4.
    """

    device: Literal["gpu", "cpu"]
    decode: Literal["mixed", "cpu"]
    device_id: int | None
    batch_size: int
    threads: int
    prefetch_batches: int
    reads_files: bool = READS_FILES  # False: the graph is given the bytes of images, not the paths of files
    hw_decoder_load: float | None = None


def execution(
    device: torch.device,
    decode: Decode,
    batch_size: int,
    threads: int,
    prefetch_batches: int,
    *,
    reads_files: bool,
    hw_decoder_load: float | None,
) -> Execution:
    """What `device` and `decode` mean on this machine. Raises DataError for "mixed" without a CUDA device."""
    if decode == "mixed" and device.type != "cuda":
        raise DataError("data.decode: mixed decodes on a GPU, and there is none; use auto or cpu")
    on_gpu = device.type == "cuda"
    return Execution(
        device="gpu" if on_gpu else "cpu",
        decode="mixed" if on_gpu and decode != "cpu" else "cpu",
        device_id=(torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None,
        batch_size=batch_size,
        threads=threads,
        prefetch_batches=prefetch_batches,
        reads_files=READS_FILES and reads_files,
        # DALI takes the load for any decoder, but only the one on a GPU has an engine.
        hw_decoder_load=hw_decoder_load if on_gpu and decode != "cpu" else None,
    )


def train_graph(source: Source, spec: AugmentSpec, run: Execution) -> Pipeline:
    """Crop window, resize, flip, RandAugment, colour jitter, normalise: one output, (B, H, W, 3).

    `source` yields files (see `Execution.reads_files`), windows, flips, then JitterParams and LayerParams if the spec
    has them.
    """
    # The background colour of warps: the mean of the data for timm's presets, mid-grey for DALI's.
    policy = parse(spec.rand_augment) if spec.rand_augment is not None else None
    fill = [128 if policy and policy.severity == "dali" else round(255 * value) for value in spec.mean]
    background = np.full((spec.image_px, spec.image_px, 3), fill, np.uint8)
    num_layers = policy.num_layers if policy else 0
    jitters = bool(spec.color_jitter)
    inputs = [_FILES, *_WINDOWS_AND_FLIPS, *(_JITTER if jitters else []), *(_LAYERS if policy else [])]

    def graph() -> Any:
        files, windows, flips, *rest = _external_source(source, inputs)
        image = _decode(fn.decoders.image_slice, files, run, start=windows[:2], shape=windows[2:], axes=[0, 1])
        image = augment.resize(image, [spec.image_px, spec.image_px], spec.interpolation)
        if num_layers:  # what follows warps; otherwise normalising mirrors for nothing
            image = fn.flip(image, horizontal=flips)
        image = _on_device(image, run)
        if num_layers:
            branches, matrices, bits, factors, kernels = rest[-5:]
            for k in range(num_layers):
                image = augment.rand_augment_layer(
                    image, branches[k], matrices[k], bits[k], factors[k], kernels[k], background
                )
        if jitters:
            image = augment.color_jitter(image, rest[0], rest[1])
        return augment.normalise(image, spec.mean, spec.std, spec.fp16, 0 if num_layers else flips)

    return _pipeline(graph, run, conditionals=jitters or num_layers > 0)


def eval_graph(source: Source, spec: EvalSpec, run: Execution) -> Pipeline:
    """Resize, centre crop, normalise: one output, (B, H, W, 3).

    `source` yields files, sizes (B, 2) after resizing and offsets (B, 2) of the crop, height first.
    """

    def graph() -> Any:
        files, sizes, offsets = _external_source(source, [_FILES, *_EVAL_WINDOWS])
        image = _decode(fn.decoders.image, files, run)
        image = augment.resize(image, sizes, spec.interpolation)
        image = fn.slice(image, start=offsets, shape=[spec.image_px, spec.image_px], axes=[0, 1])
        return augment.normalise(_on_device(image, run), spec.mean, spec.std, spec.fp16)

    return _pipeline(graph, run, conditionals=False)


def decode_graph(source: Source, run: Execution) -> Pipeline:
    """Decodes whole images and keeps one pixel of each, (B, 1, 1, 3), to time nothing else. `source` yields files."""

    def graph() -> Any:
        (files,) = _external_source(source, [_FILES])
        image = _decode(fn.decoders.image, files, run)
        return fn.slice(image, start=[0, 0], shape=[1, 1], axes=[0, 1])

    return _pipeline(graph, run, conditionals=False)


def release_memory() -> None:
    """Gives back GPU memory that no pipeline uses: DALI's pools never shrink by themselves (DALI issues 5087, 278)."""
    backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]


def _external_source(source: Source, inputs: list[tuple[Any, int]]) -> Any:
    return fn.external_source(
        source=source,
        num_outputs=len(inputs),
        batch=True,
        dtype=[dtype for dtype, _ in inputs],
        ndim=[ndim for _, ndim in inputs],
    )


def _decode(decoder: Callable[..., Any], files: Any, run: Execution, **window: Any) -> Any:
    # Mapping a file that is then cut short ends the process; reading it ends one batch.
    contents = fn.io.file.read(files, dont_use_mmap=True) if run.reads_files else files
    # Pillow, torchvision and timm do not rotate by EXIF; the sizes in the manifest are those of the stored image.
    unrotated = {"adjust_orientation": False} if "adjust_orientation" in inspect.signature(decoder).parameters else {}
    on_engine = {} if run.hw_decoder_load is None else {"hw_decoder_load": run.hw_decoder_load}
    # Without fancy upsampling a GPU interpolates colour more coarsely than libjpeg, and so than Pillow.
    return decoder(contents, device=run.decode, jpeg_fancy_upsampling=True, **unrotated, **on_engine, **window)


def _on_device(image: Any, run: Execution) -> Any:
    return image.gpu() if run.device == "gpu" and run.decode == "cpu" else image


def _pipeline(graph: Callable[[], Any], run: Execution, conditionals: bool) -> Pipeline:
    executor = {"exec_dynamic": True} if OUTPUTS_OWN_MEMORY else {}
    pipeline = pipeline_def(graph, enable_conditionals=conditionals)(
        batch_size=run.batch_size,
        num_threads=run.threads,
        device_id=run.device_id,
        prefetch_queue_depth=run.prefetch_batches,
        seed=0,
        **executor,
    )
    pipeline.build()
    return pipeline
