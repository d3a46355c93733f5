"""Image sizes from file headers, read once and remembered."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # what Pillow and every DALI decode alike
# A header can promise gigabytes; ImageNet's largest image has 38 megapixels.
_MAX_PIXELS = 64_000_000
_CACHE_FORMAT = "1"


class FileStat(NamedTuple):
    """A candidate file; `reason` says why it cannot be an image, if that is known without opening it."""

    path: str  # relative
    size_bytes: int
    mtime_ns: int
    reason: str


def scan_sizes(
    root: Path, files: list[FileStat], cache_dir: Path, threads: int | None
) -> tuple[NDArray[np.int32], list[str]]:
    """Height and width (N, 2) of every file as stored, (0, 0) where a file is unusable, and the reasons ("" if none).

    The result is kept in one file of `cache_dir`, named after root and every file's path, size and time of change.
    """
    digest = hashlib.sha256(f"{_CACHE_FORMAT}\0{root}".encode("utf-8", "surrogateescape"))
    for file in files:
        digest.update(f"\0{file.path}\0{file.size_bytes}\0{file.mtime_ns}".encode("utf-8", "surrogateescape"))
    cache_file = cache_dir / f"sizes-{digest.hexdigest()[:32]}.npz"
    cached = _load(cache_file, len(files))
    if cached is not None:
        return cached
    sizes, reasons = _scan(root, files, threads)
    _store(cache_file, sizes, reasons)
    return sizes, reasons


def verify(path: str) -> str:
    """Decodes one image with Pillow; returns what is wrong with it, or "" when it is whole."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
        return _reason(error)
    return ""


def _scan(root: Path, files: list[FileStat], threads: int | None) -> tuple[NDArray[np.int32], list[str]]:
    sizes = np.zeros((len(files), 2), np.int32)
    reasons = [file.reason for file in files]
    pending = [index for index, reason in enumerate(reasons) if not reason]
    with warnings.catch_warnings(), ThreadPoolExecutor(threads or 4 * (os.cpu_count() or 1)) as pool:
        # Pillow warns from 89 megapixels on and raises from 179 on; both are over our limit anyway.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        headers = pool.map(_read_header, [os.path.join(root, files[index].path) for index in pending])
        for index, (height, width, reason) in zip(pending, headers, strict=True):
            sizes[index] = height, width
            reasons[index] = reason
    return sizes, reasons


def _read_header(path: str) -> tuple[int, int, str]:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
    except Exception as error:  # as in verify
        return 0, 0, _reason(error)
    if height * width > _MAX_PIXELS:
        return 0, 0, f"{height}x{width} pixels, more than {_MAX_PIXELS // 1_000_000} million"
    return height, width, ""


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG, BMP or WebP image"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {_MAX_PIXELS // 1_000_000} million pixels"
    return f"{type(error).__name__}: {error}"


def _load(cache_file: Path, num_files: int) -> tuple[NDArray[np.int32], list[str]] | None:
    try:
        with cache_file.open("rb") as file, np.load(file, allow_pickle=False) as data:
            sizes, indices, texts = data["sizes"], data["bad_indices"], data["bad_reasons"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # absent or damaged: scan again
        return None
    reasons = [""] * num_files
    for index, text in zip(indices.tolist(), texts.tolist(), strict=True):
        reasons[index] = text
    return sizes, reasons


def _store(cache_file: Path, sizes: NDArray[np.int32], reasons: Iterable[str]) -> None:
    bad = {index: reason for index, reason in enumerate(reasons) if reason}
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache_file.parent, delete=False) as partial:
            np.savez(
                partial,
                sizes=sizes,
                bad_indices=np.array(list(bad), np.int64),
                bad_reasons=np.array(list(bad.values()), np.str_),
            )
        os.replace(partial.name, cache_file)
    except OSError as error:
        warnings.warn(f"image sizes are not cached: {error}; set data.cache_dir to a writable folder", stacklevel=2)
