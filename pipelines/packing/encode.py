"""What a file becomes in a shard: its own bytes where possible, else a JPEG of the pixels that Pillow decodes."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.checks.decode_one import FORMATS

_BLOCK = 16  # files that a worker takes at a time
_BLOCKS_AHEAD = 4  # of every worker: what is encoded and not yet written is in memory
_ORIENTATION = 0x0112


class Encoded(NamedTuple):
    """A JPEG file and its size in pixels, or why there is none."""

    data: bytes
    height: int
    width: int
    reason: str


def encode(path: str, resize_shorter: int | None, quality: int) -> Encoded:
    """One image as a JPEG whose shorter side is at most `resize_shorter`; never enlarged. Never raises.

    Every image is decoded, so a file that is cut short is found here. A JPEG that is small enough keeps its bytes; all
    else becomes a baseline JPEG of `quality` with full-resolution colour (4:4:4), grey if it was grey, RGB otherwise.
    On 63 ImageNet photographs resized to 256, 4:4:4 at quality 90 is 38 KB and 2.0 levels (mean absolute error after
    the evaluation transform at 160 px) from the original; 4:2:0 is 30 KB and 2.7, and so it is at equal bytes: 2.3
    against 2.7 at 30 KB. Lanczos is nearest to the original (1.08 before JPEG; bicubic 1.31).

    Pixels mean what they mean in the file: an EXIF orientation is not applied, as elsewhere here and in timm, and none
    survives, so that no other reader turns some images and not others.
    """
    try:
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            shrink = resize_shorter is not None and min(width, height) > resize_shorter
            if not shrink and image.format in ("JPEG", "MPO"):
                image.load()
                return Encoded(_without_exif(data) if _may_rotate(image) else data, height, width, "")
            size = width, height
            if shrink:
                assert resize_shorter is not None
                # The longer side is truncated, as torchvision's Resize does.
                shorter = min(width, height)
                size = resize_shorter * width // shorter, resize_shorter * height // shorter
                # libjpeg halves for nothing; twice the wanted size is left for the filter (MAE 1.083, without 1.082).
                image.draft(None, (2 * size[0], 2 * size[1]))
            pixels = _grey_or_rgb(image)
    except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
        return Encoded(b"", 0, 0, f"{type(error).__name__}: {error}")
    if shrink:
        pixels = pixels.resize(size, Image.Resampling.LANCZOS)
    jpeg = io.BytesIO()
    pixels.save(jpeg, "JPEG", quality=quality, subsampling="4:4:4")
    return Encoded(jpeg.getvalue(), pixels.height, pixels.width, "")


def encode_all(
    path_of: Callable[[int], str],
    places: list[int],
    resize_shorter: int | None,
    quality: int,
    processes: int,
) -> Generator[Encoded, None, None]:
    """`encode` of the files at `places`, in their order, by `processes` processes that stay a little ahead."""
    blocks = (places[begin : begin + _BLOCK] for begin in range(0, len(places), _BLOCK))
    # Not forked: the program may have threads by now, and a lock that one of them holds would never be released.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_live_and_die_with_the_parent)
    ahead: deque[Future[list[Encoded]]] = deque()
    try:
        for block in blocks:
            ahead.append(
                pool.submit(_encode_block, [path_of(place) for place in block], resize_shorter, quality)
            )
            if len(ahead) > processes * _BLOCKS_AHEAD:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_block(paths: list[str], resize_shorter: int | None, quality: int) -> list[Encoded]:
    return [encode(path, resize_shorter, quality) for path in paths]


def _live_and_die_with_the_parent() -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent ends its workers
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()  # a killed parent closes nothing: its workers would wait for work for ever
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("1", "L", "LA"):
        return image.convert("L")
    return image.convert("RGB")


def _may_rotate(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # an EXIF block that Pillow cannot read may still tell another reader to rotate
        return True


def _without_exif(jpeg: bytes) -> bytes:
    """The same JPEG without its EXIF segments (ITU-T T.81, B.1.1.4); the coded pixels stay as they are."""
    kept, at = [jpeg[:2]], 2
    while jpeg[at] == 0xFF and jpeg[at + 1] != 0xDA:  # up to the start of the scan
        if jpeg[at + 1] == 0xFF:  # padding
            at += 1
            continue
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if not (jpeg[at + 1] == 0xE1 and jpeg[at + 4 : at + 10] == b"Exif\0\0"):
            kept.append(jpeg[at:end])
        at = end
    return b"".join([*kept, jpeg[at:]])
