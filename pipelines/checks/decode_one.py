"""One image file, judged by Pillow: its size as stored, or why it cannot be used.

Run as a program, this file judges the paths it is sent on standard input, one JSON string a line, and answers each with
a line of its own. So a file that kills the decoder kills only this process, and its memory is limited. It imports
nothing of ours, because it is started by its path, in a few hundredths of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import stat
import sys
import warnings
from typing import Literal, NamedTuple, get_args

from PIL import Image, UnidentifiedImageError

Kind = Literal["truncated", "not_an_image", "too_large", "missing", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # what Pillow and every DALI decode alike
# A header can promise gigabytes; ImageNet's largest image has 38 megapixels.
MAX_PIXELS = 64_000_000
# 64 megapixels take 256 MB as RGBA; a progressive JPEG's coefficients take another 384 MB.
MAX_MEMORY_BYTES = 1_000_000_000
MAX_SECONDS = 60
READY = "ready"

# The words of a reason that tell its kind, the first that fits; Pillow says "truncated" itself.
_WORDS: dict[str, Kind] = {
    "empty file": "truncated",
    "truncated": "truncated",
    "not a": "not_an_image",
    "million pixels": "too_large",
    "MB to decode": "too_large",
    "cannot be opened": "missing",
}


class Verdict(NamedTuple):
    """`reason` is "" for a good file; else height and width are 0."""

    height: int
    width: int
    reason: str


def read_header(path: str) -> Verdict:
    """Looks at the header only."""
    return _judge(path, load=False)


def decode(path: str) -> Verdict:
    """Decodes the whole image, unless its header already says that it is too large."""
    return _judge(path, load=True)


def kind_of(reason: str) -> Kind:
    """The kind of a reason given here or by the listing of files."""
    return next((kind for words, kind in _WORDS.items() if words in reason.lower()), "other")


def _judge(path: str, load: bool) -> Verdict:
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # to open a pipe would wait for its writer
            return Verdict(0, 0, "not a file")
        if not info.st_size:
            return Verdict(0, 0, "empty file")
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if height * width > MAX_PIXELS:
                reason = f"{height}x{width} pixels, more than {MAX_PIXELS // 1_000_000} million pixels"
                return Verdict(0, 0, reason)
            if load:
                image.load()
    except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
        return Verdict(0, 0, _reason(error))
    return Verdict(height, width, "")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG, BMP or WebP image"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {MAX_PIXELS // 1_000_000} million pixels"
    if isinstance(error, MemoryError):
        return f"needs more than {MAX_MEMORY_BYTES // 1_000_000} MB to decode"
    if isinstance(error, OSError):
        return str(error) if error.errno is None else f"cannot be opened: {error.strerror}"
    return f"{type(error).__name__}: {error}"


def _answer_requests(load: bool) -> None:
    with contextlib.suppress(
        ValueError, OSError
    ):  # a tighter limit is set already, or the platform has none
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    # Pillow warns from 89 megapixels on and raises from 179 on; both are over our limit anyway.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    _say(READY)
    for line in sys.stdin:
        signal.alarm(MAX_SECONDS)  # its default action ends the process, even inside a decoder
        verdict = _judge(json.loads(line), load)
        signal.alarm(0)
        _say(verdict)


def _say(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _answer_requests(load="decode" in sys.argv[1:])
