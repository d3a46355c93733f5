"""Test that every operation gives the same levels on a GPU as on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.photographs import squares

pytest.importorskip("nvidia.dali")

from nvidia.dali import fn, pipeline_def, types

from pipelines.dali import augment
from pipelines.rand_augment import op_params, parse

DEVICES = ("cpu", "gpu") if torch.cuda.is_available() else ("cpu", "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIDE = 160
POLICY = parse("rand-m9-mstd0.5-inc1")
# Mean and largest absolute difference in levels. Operations on bits are exact. Elsewhere a float may round
# the other way, and a warp may take the neighbour of a pixel that lies half-way.
EXACT, ROUNDING, HALF_WAY = (0.0, 0), (0.05, 1), (0.1, 255)
LIMITS = {
    "Invert": EXACT,
    "Posterize": EXACT,
    "Solarize": EXACT,
    "SolarizeAdd": EXACT,
    "Brightness": ROUNDING,
    "Contrast": ROUNDING,
    "Color": ROUNDING,
    "AutoContrast": ROUNDING,
    "Sharpness": ROUNDING,
    "Equalize": (0.3, 3),
    "Rotate": HALF_WAY,
    "ShearX": HALF_WAY,
    "ShearY": HALF_WAY,
    "TranslateX": HALF_WAY,
    "TranslateY": HALF_WAY,
}
TYPES = {"uint8": types.UINT8, "int32": types.INT32, "float32": types.FLOAT}


def run(device: str, body, images: np.ndarray, params: list[np.ndarray]) -> np.ndarray:
    """Run body(image on `device`, *params on the CPU) on one batch."""
    arrays = [images, *params]

    def graph():
        image, *rest = fn.external_source(
            source=lambda: arrays,
            num_outputs=len(arrays),
            batch=True,
            dtype=[TYPES[str(array.dtype)] for array in arrays],
            ndim=[array.ndim - 1 for array in arrays],
            layout=["HWC", *([""] * len(params))],
        )
        return body(image.gpu() if device == "gpu" else image, *rest)

    pipeline = pipeline_def(graph, enable_conditionals=True)(
        batch_size=len(images),
        num_threads=2,
        device_id=0 if device == "gpu" else None,
        prefetch_queue_depth=1,
    )
    pipeline.build()
    (output,) = pipeline.run()
    return np.array((output.as_cpu() if device == "gpu" else output).as_array())


def differences(body, images: np.ndarray, params: list[np.ndarray]) -> np.ndarray:
    cpu, gpu = (run(device, body, images, params) for device in DEVICES)
    return np.abs(cpu.astype(np.float64) - gpu)


@pytest.mark.parametrize("name", LIMITS)
def test_an_operation(name):
    photos = squares(SIDE)
    magnitudes = np.array([0.37, 0.74, 0.9, 0.9])
    images = np.repeat(photos, len(magnitudes), axis=0)
    magnitude = np.tile(magnitudes, len(photos))[:, None]
    sign = np.tile([1.0, -1.0, 1.0, -1.0], len(photos))[:, None]
    params = op_params(POLICY, np.full(magnitude.shape, POLICY.ops.index(name)), magnitude, sign, SIDE)
    background = np.full((SIDE, SIDE, 3), (124, 116, 104), np.uint8)

    def layer(image, branches, matrices, bits, factors, kernels):
        numbers = matrices[0], bits[0], factors[0], kernels[0]
        return augment.rand_augment_layer(image, branches[0], numbers, background)

    apart = differences(layer, images, list(params))
    print(f"\n{name}: mean {apart.mean():.4f}, largest {apart.max():.0f} levels")
    assert apart.mean() <= LIMITS[name][0]
    assert apart.max() <= LIMITS[name][1]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing(interpolation):
    apart = differences(lambda image: augment.resize(image, [96, 112], interpolation), squares(SIDE), [])
    assert apart.mean() < 0.05
    assert apart.max() <= 1


@pytest.mark.parametrize("flips", [0, 1])
def test_normalising_and_mirroring(flips):
    def body(image):
        return augment.normalise(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), False, flips)

    assert differences(body, squares(SIDE), []).max() < 1e-5
