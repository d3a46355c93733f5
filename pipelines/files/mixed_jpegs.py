"""Make JPEGs that ask of a decoder what ImageNet's do: about 500 x 375 pixels and 110 KB, of every kind.

Small pictures of one kind show neither the faults nor the speed of decoders, which have a path for each.
"""

import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT = 500, 375
_TEXTURE_PX = 1024


@dataclass(frozen=True)
class JpegKind:
    """A kind of JPEG. `subsampling` is Pillow's: 0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0."""

    name: str
    per_hundred: int
    quality: int  # so that a file takes about 110 KB
    subsampling: int = 2
    mode: str = "RGB"
    progressive: bool = False


KINDS = (
    JpegKind("4:2:0", 70, 94), JpegKind("4:4:4", 25, 92, subsampling=0),
    JpegKind("4:2:2", 1, 93, subsampling=1), JpegKind("grey", 2, 95, mode="L"),
    JpegKind("progressive", 1, 95, progressive=True), JpegKind("CMYK", 1, 62, subsampling=0, mode="CMYK"),
)  # fmt: skip


def mixed_jpegs(count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield `count` encoded images in the shares of KINDS, in random order; of six or more, each kind."""
    rng = np.random.default_rng(seed)
    shares = np.array([kind.per_hundred for kind in KINDS])
    numbers = np.maximum(shares * count // 100, 1)
    numbers[0] += count - numbers.sum()
    kinds = np.repeat(np.arange(len(KINDS)), np.maximum(numbers, 0))[:count]
    for number in rng.permutation(kinds):
        yield _encode(KINDS[number], rng)


def _encode(kind: JpegKind, rng: np.random.Generator) -> bytes:
    top, left = rng.integers(_TEXTURE_PX - HEIGHT), rng.integers(_TEXTURE_PX - WIDTH)
    image = Image.fromarray(_texture()[top : top + HEIGHT, left : left + WIDTH]).convert(kind.mode)
    options = {} if kind.mode == "L" else {"subsampling": kind.subsampling}
    file = io.BytesIO()
    image.save(file, "JPEG", quality=kind.quality, progressive=kind.progressive, **options)
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
