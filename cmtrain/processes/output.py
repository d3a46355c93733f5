"""Keep what is printed from ending the program: a full disk behind a redirect, a dead `tee`, no terminal.

Python raises an error from print where nobody reads any more. A run, which prints for people, goes on.
"""

import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any

from cmtrain.errors import EXIT_DATA, EXIT_PIPE

NUMBERS = {"stdout": 1, "stderr": 2}


class _Stream(io.FileIO):
    """A standard stream. `error`: why the first line was lost; `raises`: whether write raises it."""

    def __init__(self, number: int, *, raises: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self.raises, self.error, self.is_news = raises, None, False  # type: tuple[bool, OSError | None, bool]

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # another program made it non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            self.is_news = self.is_news or self.error is None
            self.error = self.error or error  # the one raised is looked for: what is buffered is tried again
            if self.raises:
                self.raises = False  # not a second time, when the interpreter flushes at its end
                raise
            return len(data)


def with_guarded_output(work: Callable[[], int], *, stdout_raises: bool) -> int:
    """Return the exit code of `work`, in which no print raises.
    If `stdout_raises`, it ends quietly when the reader has gone (141), and with a line on a full disk (3).
    """
    guard_output(stdout_raises=stdout_raises)
    try:
        try:
            return work()
        finally:
            sys.stdout.flush()
    except OSError as error:
        stream = _raw("stdout")
        if stream is None or stream.error is not error:
            raise
        if error.errno == errno.EPIPE:
            return EXIT_PIPE
        sys.stderr.write(f"stdout: {error.strerror}\n")
        return EXIT_DATA


def guard_output(*, stdout_raises: bool) -> None:
    """Make stderr, and stdout unless `stdout_raises`, lose what cannot be printed instead of raising.
    Also opens what was closed (`>&-`): else the next file to be opened gets its number, and its lines.
    Streams that something else has replaced are left alone.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, number in NUMBERS.items():
        old = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__"):
            continue
        old = old or io.TextIOWrapper(io.BytesIO(), "utf-8", line_buffering=True)  # it was closed
        old.flush()
        errors = "backslashreplace" if old.errors == "strict" else old.errors  # for names of any bytes
        file = io.BufferedWriter(_Stream(number, raises=stdout_raises and name == "stdout"))
        stream = io.TextIOWrapper(
            file, old.encoding, errors, line_buffering=old.line_buffering, write_through=old.write_through
        )
        setattr(sys, name, stream)


def lost_output() -> Iterator[str]:
    """Yield a line for each stream that has begun to lose what is printed since the last call."""
    for name in NUMBERS:
        if (stream := _raw(name)) and stream.is_news and stream.error:
            stream.is_news = False
            yield f"{name}: {stream.error.strerror}"


def _raw(name: str) -> _Stream | None:
    raw = getattr(getattr(getattr(sys, name), "buffer", None), "raw", None)
    return raw if isinstance(raw, _Stream) else None
