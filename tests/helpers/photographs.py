"""Load real photographs from the demo extra's packages, as arrays, and write them as JPEG files."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image

NAMES = ("astronaut", "cat", "coffee", "rocket", "hubble_deep_field", "retina", "immunohistochemistry")


@cache
def photographs() -> tuple[np.ndarray, ...]:
    """Return nine colour photographs, (H, W, 3) uint8, 300 to 1411 pixels wide."""
    samples = [sklearn.datasets.load_sample_image(f"{name}.jpg") for name in ("china", "flower")]
    return (*(getattr(skimage.data, name)() for name in NAMES), *samples)


@cache
def squares(side: int) -> np.ndarray:
    """Return the same photographs, resized to (9, side, side, 3)."""
    resized = [Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC) for x in photographs()]
    return np.stack([np.asarray(image) for image in resized])


def write_folder(root: Path, num_images: int, num_classes: int = 3) -> Path:
    """Write root/c<class>/<number>.jpg: windows of the photographs in many sizes."""
    rng = np.random.default_rng(0)
    for number in range(num_images):
        pixels = photographs()[number % len(NAMES)]
        height, width = rng.integers(80, 240, 2)
        top, left = rng.integers(0, pixels.shape[0] - height), rng.integers(0, pixels.shape[1] - width)
        path = root / f"c{number % num_classes}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[top : top + height, left : left + width]).save(path, quality=92)
    return root
