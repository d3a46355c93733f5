"""Write image files, good and bad, and read what a loader makes of them."""

from __future__ import annotations

import hashlib
import io
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from helpers.photographs import photographs
from pipelines.files.demo_images import mixed_jpegs
from pipelines.files.manifest import Manifest
from pipelines.plan import Plan
from pipelines.spec import AugmentSpec, Loader


def write_tree(root: Path, num_train: int, num_val: int, num_classes: int = 3, side: int = 48) -> Path:
    """Write <root>/{train,val}/<class>/*.jpg; classes differ in colour and direction, to be learnt."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    for split, count in (("train", num_train), ("val", num_val)):
        for index in range(count):
            label = index % num_classes
            wave = np.sin(8 * np.pi * (x if label % 2 else y) + rng.uniform(0, 6))
            pixels = np.stack([wave * (1.0 if channel == label else 0.3) for channel in range(3)], -1)
            pixels = np.clip(128 + 80 * pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)
            path = root / split / f"class{label}" / f"{index:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=92)
    return root


@cache
def _jpegs(count: int) -> tuple[bytes, ...]:
    return tuple(mixed_jpegs(count))


def write_jpegs(root: Path, count: int, num_classes: int = 3) -> Path:
    """Write root/c<class>/<number>.jpg: 500 x 375 pixels, of every kind of JPEG (see `mixed_jpegs`)."""
    for number, encoded in enumerate(_jpegs(count)):
        path = root / f"c{number % num_classes}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    return root


def vanish(path: Path) -> None:
    path.unlink()


def garble(path: Path) -> None:
    """Overwrite a file as a failing disk does: neither its size nor its time of change differ."""
    info = path.stat()
    path.write_bytes(b"<html>not found</html>" * 999)
    os.truncate(path, info.st_size)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def shrink(path: Path) -> None:
    Image.new("RGB", (20, 10)).save(path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


SIDE = 48
SPEC = AugmentSpec(SIDE, rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4)


def plan_for(manifest: Manifest, **options) -> Plan:
    sizes = {"num_samples": len(manifest), "global_batch_size": 12, "micro_batch_size": 1}
    return Plan(**{"seed": 3} | sizes | options)


def digest(image: torch.Tensor) -> str:
    return hashlib.md5(image.contiguous().numpy().tobytes()).hexdigest()


def pixels(loader: Loader, epoch: int, start: int = 0) -> list[tuple[int, str]]:
    """Return (sample, digest of its pixels), in the order of the loader."""
    return [
        (index, digest(image))
        for batch in loader.epoch(epoch, start)
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
    ]


def save(image: Image.Image, path: Path, fmt: str = "JPEG", **options) -> None:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    path.write_bytes(buffer.getvalue())


def write_awkward_files(folder: Path) -> None:
    """Write odd files that occur in real data sets and can be used."""
    folder.mkdir(parents=True)
    photo = Image.fromarray(photographs()[1][:300, :400])
    exif = Image.Exif()
    exif[0x0112] = 6
    noisy = np.random.default_rng(0).integers(0, 256, (300, 4, 3), dtype=np.uint8)
    save(photo, folder / "na\u00efve \u732b \U0001f408.jpg")
    save(photo.convert("L"), folder / "grey.jpg")
    save(photo.convert("CMYK"), folder / "cmyk.jpg")
    save(photo, folder / "png_named.jpg", "PNG")
    save(photo, folder / "webp_named.jpeg", "WEBP", lossless=True)
    save(photo.convert("RGBA"), folder / "alpha.png", "PNG")
    save(photo.convert("P"), folder / "palette.png", "PNG")
    save(photo, folder / "bitmap.bmp", "BMP")
    save(photo, folder / "rotated.jpg", exif=exif)
    save(photo, folder / "progressive.jpg", progressive=True)
    save(photo.resize((1, 1)), folder / "one_pixel.jpg")
    save(Image.fromarray(noisy), folder / "narrow.jpg", subsampling=0)
    (folder / "trailing.jpg").write_bytes((folder / "grey.jpg").read_bytes() + b"trailing garbage" * 40)
