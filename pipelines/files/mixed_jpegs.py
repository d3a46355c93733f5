"""Make JPEGs that ask of a decoder what ImageNet's do: about 500 x 375 pixels and 110 KB, of every kind.

Small pictures of one kind show neither the faults nor the speed of decoders, which have a path for each.
"""

import functools
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT = 500, 375
_TEXTURE_PX = 1024

# Kind of JPEG -> how many of a hundred, Pillow's mode, and how it is saved, so that it takes about 110 KB.
KINDS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "4:2:0": (70, "RGB", {"quality": 94, "subsampling": "4:2:0"}),
    "4:4:4": (25, "RGB", {"quality": 92, "subsampling": "4:4:4"}),
    "4:2:2": (1, "RGB", {"quality": 93, "subsampling": "4:2:2"}),
    "grey": (2, "L", {"quality": 95}),
    "progressive": (1, "RGB", {"quality": 95, "subsampling": "4:2:0", "progressive": True}),
    "CMYK": (1, "CMYK", {"quality": 62, "subsampling": "4:4:4"}),
}


def mixed_jpegs(count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield `count` encoded images in the shares of KINDS, in random order; of six or more, each kind."""
    rng = np.random.default_rng(seed)
    numbers = np.maximum(np.array([per_hundred for per_hundred, *_ in KINDS.values()]) * count // 100, 1)
    numbers[0] += count - numbers.sum()
    for number in rng.permutation(np.repeat(np.arange(len(KINDS)), np.maximum(numbers, 0))[:count]):
        _, mode, options = list(KINDS.values())[number]
        top, left = rng.integers(_TEXTURE_PX - HEIGHT), rng.integers(_TEXTURE_PX - WIDTH)
        image = Image.fromarray(_texture()[top : top + HEIGHT, left : left + WIDTH]).convert(mode)
        yield to_jpeg(image, **options)


def to_jpeg(image: Image.Image, **options: Any) -> bytes:
    """Return the image as a JPEG, with Pillow's `options`."""
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@functools.cache
def _texture() -> NDArray[np.uint8]:
    """Return noise whose amplitude falls with frequency as in photographs, in colour: (1024, 1024, 3)."""
    rng = np.random.default_rng(0)
    # Colour is smoother than brightness, which keeps different ways of upsampling it comparable.
    y, cb, cr = (deviation * _noise(power, rng) for deviation, power in ((50, 1.2), (18, 1.5), (18, 1.5)))
    rgb = np.stack([y + 1.402 * cr, y - 0.344 * cb - 0.714 * cr, y + 1.772 * cb], axis=2)  # JFIF's matrix
    return (128 + rgb).clip(0, 255).astype(np.uint8)


def _noise(power: float, rng: np.random.Generator) -> NDArray[np.float64]:
    down, right = np.fft.fftfreq(_TEXTURE_PX)[:, None], np.fft.rfftfreq(_TEXTURE_PX)
    frequency = np.hypot(down, right)
    frequency[0, 0] = np.inf  # no mean
    spectrum = np.fft.rfft2(rng.standard_normal((_TEXTURE_PX, _TEXTURE_PX))) / frequency**power
    noise = np.fft.irfft2(spectrum, (_TEXTURE_PX, _TEXTURE_PX))
    return noise / noise.std()
