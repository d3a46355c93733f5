"""Encode image files for shards: their own bytes where possible, else a JPEG of the decoded pixels."""

import io
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple, cast

from PIL import Image

from pipelines.checks.decode_one import FORMATS, Fault, fault_of, is_trouble, may_rotate, patiently
from pipelines.checks.pixels import grey_or_rgb
from pipelines.files.demo_images import to_jpeg
from pipelines.spec import DataError

_BLOCK = 16  # files that a worker takes at a time
_BLOCKS_AHEAD = 4  # of every worker: what is encoded and not yet written is in memory
MAX_JPEG_PX = 65_500  # of a side, in libjpeg


class PackSpec(NamedTuple):
    """Encoding and size of shards."""

    resize_shorter: int | None
    quality: int
    shard_bytes: int  # a shard is closed at this size


class Encoded(NamedTuple):
    """A JPEG file and its size in pixels, or the fault of an image that cannot be used."""

    data: bytes
    height: int
    width: int
    fault: Fault | None


def encode(path: str, resize_shorter: int | None, quality: int) -> Encoded:
    """Return one image as a JPEG whose shorter side is at most `resize_shorter`.

    Every image is decoded, which finds files that are cut short. A JPEG that is small enough keeps its
    bytes. Everything else becomes a baseline JPEG of `quality`, grey or RGB, 4:4:4 (docs/data.md has the
    measurements). EXIF orientation is not applied, as elsewhere here and in timm, but removed, so that no
    reader applies it. Raises DataError when the machine cannot read the file or has no memory for it.
    """
    try:
        data = patiently(Path(path).read_bytes)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            shorter = min(width, height)
            wanted = min(shorter, resize_shorter or shorter)
            shrink = wanted < shorter
            if not shrink and image.format in ("JPEG", "MPO"):
                image.load()
                stored = _without_exif(data, image) if may_rotate(image) else data
                return Encoded(stored, height, width, None)
            # The longer side is truncated, as torchvision's Resize does.
            size = wanted * width // shorter, wanted * height // shorter
            if shrink:
                # libjpeg halves for nothing. The filter gets twice the size (MAE 1.083, without 1.082).
                image.draft(None, (2 * size[0], 2 * size[1]))
            pixels = grey_or_rgb(image)
        if shrink:
            pixels = pixels.resize(size, Image.Resampling.LANCZOS)
        if max(pixels.size) > MAX_JPEG_PX:
            reason = f"{pixels.height}x{pixels.width} pixels; a JPEG has at most {MAX_JPEG_PX:,} a side"
            return Encoded(b"", 0, 0, Fault("too_large", reason))
        jpeg = to_jpeg(pixels, quality=quality, subsampling="4:4:4")
    except MemoryError as error:
        raise DataError(f"{path}: not enough memory to encode it; try fewer --processes") from error
    except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
        if is_trouble(error):
            raise DataError.of(cast(OSError, error), path) from error
        return Encoded(b"", 0, 0, fault_of(error))
    return Encoded(jpeg, pixels.height, pixels.width, None)


def encode_all(
    path_of: Callable[[int], str], places: list[int], spec: PackSpec, processes: int
) -> Generator[Encoded, None, None]:
    """Yield `encode` of the files at `places`, in order, from processes that stay a little ahead."""
    # Not forked: a lock that another thread of the program holds would never be released.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_end_with_parent)
    ahead: deque[Future[list[Encoded]]] = deque()
    try:
        for begin in range(0, len(places), _BLOCK):
            paths = [path_of(place) for place in places[begin : begin + _BLOCK]]
            ahead.append(pool.submit(_encode_block, paths, spec))
            if len(ahead) > processes * _BLOCKS_AHEAD:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_block(paths: list[str], spec: PackSpec) -> list[Encoded]:
    return [encode(path, spec.resize_shorter, spec.quality) for path in paths]


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()  # a killed parent closes nothing: its workers would wait for work for ever
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _without_exif(jpeg: bytes, image: Any) -> bytes:
    """Return the JPEG of an opened image without its EXIF segments; the coded pixels stay as they are."""
    for marker, content in image.applist:
        if marker == "APP1" and content.startswith(b"Exif\0\0"):
            length = len(content) + 2  # with the two bytes that hold it
            jpeg = jpeg.replace(b"\xff\xe1" + length.to_bytes(2, "big") + content, b"", 1)
    return jpeg
