"""Test-decode one image file with Pillow: return its size as stored, or why it cannot be used.

Run as a program, this file checks every path that it reads from standard input, one JSON string per line,
and answers with one JSON line each. A file that crashes the decoder ends only this process, and the memory
is limited. It imports nothing of ours: started by its path, it is ready in a few hundredths of a second.
"""

import contextlib
import errno
import io
import json
import os
import resource
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar, get_args

from PIL import ExifTags, Image, UnidentifiedImageError

Kind = Literal["truncated", "not_an_image", "too_large", "missing", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # Pillow and every DALI decode these alike
MAX_PIXELS = 64_000_000  # a header can promise gigabytes; ImageNet's largest image has 38 megapixels
_TOO_MANY_PIXELS = f"more than {MAX_PIXELS // 1_000_000} million pixels"
MAX_MEMORY_BYTES = 1_000_000_000  # 64 megapixels: 256 MB as RGBA, a progressive JPEG's coefficients 384 MB
MAX_SECONDS = 60
READY = "ready"

# A file is at fault if it is not there or its name leads nowhere. Every other error of the operating system
# (EIO, ESTALE, EACCES, EMFILE, ENOMEM, ETIMEDOUT, ...) is the machine's, and no verdict on the file.
_ERRORS_OF_A_FILE = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO,
    errno.EINVAL,  # a header that sends Pillow to a negative place
}  # fmt: skip
WAIT_SECONDS = 0.1, 0.4, 1.0  # before another try, when the machine is at fault

T = TypeVar("T")

# Pillow warns from 89 megapixels on and raises from 179 on; both are over our limit anyway.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Fault(NamedTuple):
    """Why a file cannot be used."""

    kind: Kind  # the label of a metric
    reason: str  # for people: its wording may change


class CheckResult(NamedTuple):
    """Size in pixels of a good file; 0 x 0 and the fault of a bad one."""

    height: int
    width: int
    fault: Fault | None
    rotated: bool = False  # its EXIF block asks for rotation; looked at when it is decoded only


def is_trouble(error: BaseException) -> bool:
    """Return whether a file could not be read because of the machine: the file itself may be good."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _ERRORS_OF_A_FILE


def patiently(read: Callable[[], T], path: object = None) -> T:
    """Return `read()`, tried for two seconds while the machine is in trouble. Errors get `path`."""
    for seconds in (*WAIT_SECONDS, None):
        try:
            return read()
        except OSError as error:
            if seconds is None or not is_trouble(error):
                if error.errno and not error.filename:  # Pillow's have no number, and would lose their text
                    error.filename = path
                raise
            time.sleep(seconds)
    raise AssertionError


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
    if str(error) == "cannot load this image":
        return Fault("other", "damaged: has a header, but no pixels")
    # Pillow raises one class for all damage: only its message shows that a file was cut short.
    kind: Kind = "truncated" if "truncated" in str(error).lower() else "other"
    return Fault(kind, str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}")


def check_file(path: str, decode: bool, limit_seconds: int = 0) -> CheckResult:
    """Read the header and, if `decode` and unless the header shows that it is too large, the whole image.
    SIGALRM ends the process after `limit_seconds`, unless 0. Raises OSError if the machine cannot read it.
    """
    try:
        return patiently(lambda: _check(path, decode, limit_seconds), path)
    except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
        if isinstance(error, MemoryError) and not decode:  # a header needs none
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), path) from error
        if is_trouble(error):
            raise
        return CheckResult(0, 0, fault_of(error))


def may_rotate(image: Image.Image) -> bool:
    """Return whether the EXIF block of an image asks for rotation, or cannot be read by Pillow."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # another reader may be able to, and rotate
        return True


def _check(path: str, decode: bool, limit_seconds: int) -> CheckResult:
    if fault := fault_in_stat(os.stat(path)):  # opening a pipe would wait for its writer
        return CheckResult(0, 0, fault)
    with open(path, "rb") as file, contextlib.ExitStack() as stack:
        # All of it is read before it is decoded: the limit is the decoder's, not the file server's.
        source = io.BytesIO(file.read()) if decode else file
        if limit_seconds:  # else the process may have an alarm of its own
            signal.alarm(limit_seconds)  # its default action ends the process, even inside a decoder
            stack.callback(signal.alarm, 0)
        with Image.open(source, formats=FORMATS) as image:
            width, height = image.size
            if height * width > MAX_PIXELS:
                return CheckResult(0, 0, Fault("too_large", f"{height}x{width} pixels, {_TOO_MANY_PIXELS}"))
            if decode:
                image.load()
            return CheckResult(height, width, None, decode and may_rotate(image))


def _answer_requests() -> None:
    with contextlib.suppress(ValueError, OSError):  # a tighter limit is set already, or none can be
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    print(json.dumps(READY), flush=True)  # noqa: T201
    for line in sys.stdin:
        try:
            answer: tuple[object, ...] = check_file(json.loads(line), True, MAX_SECONDS)
        except OSError as error:
            answer = error.errno, error.strerror
        print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    _answer_requests()
