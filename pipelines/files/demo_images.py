"""Write the demo data: JPEG folders of images that ship inside PyPI wheels or are made, without a download.

`demo:digits`  scikit-learn's 1,797 handwritten digits (UCI, CC BY 4.0), 64 px; a fifth of them held out.
`demo:photos`  12 colour photographs from scikit-image and scikit-learn (public domain, CC0, CC BY), 150
               crops each. The left 65 % of every photograph is for training, the right 35 % is held out.
`demo:jpegs`   2,000 JPEGs of noise, in ImageNet's sizes and kinds, to measure decoding; 200 are held out.
"""

import functools
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.atomic import locked, new_folder
from pipelines.spec import DataError

PHOTOS = (
    "astronaut", "cat", "coffee", "rocket", "hubble_deep_field", "retina", "immunohistochemistry", "grass",
    "gravel", "brick",
)  # fmt: skip


def demo_folder(name: str, cache: Path) -> Path:
    """Return the image folder of `demo:<name>` under `cache`, written first if it is not there.

    One process writes, and others wait; without locks each writes its own, and the first rename wins. Raises
    DataError: no such demo data, its packages are not installed, or `cache` cannot be written.
    """
    writers = {"digits": _digits, "photos": _photos, "jpegs": _jpegs}
    if name not in writers:
        known = ", ".join(f"demo:{writer}" for writer in writers)
        raise DataError(f"demo:{name}: no such demo data; there are {known}")
    folder = cache / f"demo-{name}"
    try:
        with locked(folder, "writes the demo images"):
            if os.path.exists(folder):  # not Path.exists, which raises where the cache cannot be entered
                return folder
            with new_folder(folder) as temporary:
                for relative, encoded in writers[name]():
                    path = temporary / relative
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(encoded)
    except ImportError as error:
        raise DataError(f"demo:{name}: needs {error.name}; pip install 'cmtrain[demo]'") from error
    except OSError as error:
        if not os.path.exists(folder):  # else another process was faster
            advice = "set data.cache_dir to another"
            raise DataError(f"{cache}: cannot be written: {error.strerror}; {advice}") from error
    return folder


def _digits() -> Iterator[tuple[str, bytes]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for position, index in enumerate(np.random.default_rng(0).permutation(len(digits.target))):
        split = "train" if position < 1437 else "val"
        pixels = (digits.images[index] * 255 / 16).astype(np.uint8)  # (8, 8), 0..16 in the source
        image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).convert("RGB")
        yield f"{split}/{digits.target[index]}/{index:04d}.jpg", to_jpeg(image, quality=90)


def _photos() -> Iterator[tuple[str, bytes]]:
    from skimage import data
    from sklearn.datasets import load_sample_image

    photographs = {name: getattr(data, name)() for name in PHOTOS}
    photographs |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    rng = np.random.default_rng(0)
    for name, photograph in photographs.items():
        pixels = photograph if photograph.ndim == 3 else np.repeat(photograph[:, :, None], 3, axis=2)
        height, width = pixels.shape[:2]
        border = int(width * 0.65)
        for split, left, right, count in (("train", 0, border, 120), ("val", border, width, 30)):
            for index in range(count):
                side = int(rng.integers(96, min(160, right - left, height) + 1))
                x = int(rng.integers(left, right - side + 1))
                y = int(rng.integers(0, height - side + 1))
                crop = Image.fromarray(pixels[y : y + side, x : x + side])
                yield f"{split}/{name}/{index:03d}.jpg", to_jpeg(crop, quality=90)


def _jpegs() -> Iterator[tuple[str, bytes]]:
    for seed, (split, count) in enumerate((("train", 2000), ("val", 200))):
        for index, encoded in enumerate(mixed_jpegs(count, seed)):
            yield f"{split}/{index % 10}/{index:04d}.jpg", encoded  # ten classes


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
    """Yield `count` JPEGs in the shares of KINDS, in random order; of six or more, each kind. They ask of a
    decoder what ImageNet's do: small pictures of one kind show neither its faults nor its speed.
    """
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
