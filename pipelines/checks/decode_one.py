"""Test-decode one image file with Pillow: return its size as stored, or why it cannot be used.

Run as a program, this file checks every path that it reads from standard input, one JSON string per line,
and answers with one JSON line each. A file that crashes the decoder ends only this process, and the memory
is limited. It imports nothing of ours: started by its path, it is ready in a few hundredths of a second.
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

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # Pillow and every DALI decode these alike
# A header can promise gigabytes; ImageNet's largest image has 38 megapixels.
MAX_PIXELS = 64_000_000
_TOO_MANY_PIXELS = f"more than {MAX_PIXELS // 1_000_000} million pixels"
# 64 megapixels take 256 MB as RGBA; a progressive JPEG's coefficients take another 384 MB.
MAX_MEMORY_BYTES = 1_000_000_000
MAX_SECONDS = 60
READY = "ready"


class Fault(NamedTuple):
    """Why a file cannot be used."""

    kind: Kind  # the label of a metric
    reason: str  # for people: its wording may change


class CheckResult(NamedTuple):
    """Size in pixels of a good file; 0 x 0 and the fault of a bad one."""

    height: int
    width: int
    fault: Fault | None


def fault_in_stat(info: os.stat_result) -> Fault | None:
    """Return why the file cannot be used, if its stat shows it already."""
    if not stat.S_ISREG(info.st_mode):
        return Fault("not_an_image", "not a file")
    return None if info.st_size else Fault("truncated", "empty file")


def fault_of(error: Exception) -> Fault:
    """Return what an error of `os.stat`, of opening or of Pillow means for the file."""
    if isinstance(error, UnidentifiedImageError):
        return Fault("not_an_image", "not a JPEG, PNG, BMP or WebP image")
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return Fault("too_large", _TOO_MANY_PIXELS)
    if isinstance(error, MemoryError):
        return Fault("too_large", f"needs more than {MAX_MEMORY_BYTES // 1_000_000} MB to decode")
    if isinstance(error, OSError) and error.errno is not None:
        return Fault("missing", f"cannot be opened: {error.strerror}")
    # Pillow raises one class for all damage: only its message shows that a file was cut short.
    kind: Kind = "truncated" if "truncated" in str(error).lower() else "other"
    return Fault(kind, str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}")


def check_file(path: str, decode: bool) -> CheckResult:
    """Read the header and, if `decode` and unless the header shows that it is too large, the whole image."""
    try:
        fault = fault_in_stat(os.stat(path))
        if fault is None:  # opening a pipe would wait for its writer
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if height * width <= MAX_PIXELS:
                    if decode:
                        image.load()
                    return CheckResult(height, width, None)
            fault = Fault("too_large", f"{height}x{width} pixels, {_TOO_MANY_PIXELS}")
    except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
        fault = fault_of(error)
    return CheckResult(0, 0, fault)


def _answer_requests(decode: bool) -> None:
    with contextlib.suppress(ValueError, OSError):  # a tighter limit is set already, or none can be
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    # Pillow warns from 89 megapixels on and raises from 179 on; both are over our limit anyway.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    print(json.dumps(READY), flush=True)  # noqa: T201
    for line in sys.stdin:
        signal.alarm(MAX_SECONDS)  # its default action ends the process, even inside a decoder
        result = check_file(json.loads(line), decode)
        signal.alarm(0)
        print(json.dumps(result), flush=True)  # noqa: T201


if __name__ == "__main__":
    _answer_requests(decode="decode" in sys.argv[1:])
