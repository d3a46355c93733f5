"""How far a long look at files has come, for the person who waits for it: nothing at all while it is quick."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")

QUIET_SECONDS = 2.0
REDRAW_SECONDS, LINE_SECONDS = 0.2, 10.0


def tracked(
    steps: Iterable[T], what: str, total: int, done: int = 0, per_step: int = 1
) -> Generator[T, None, None]:
    """Passes `steps` on; after two seconds a bar on a terminal, else a line every ten seconds, both on stderr.

    Args:
        what: the work, as in "reading image headers".
        total, done: samples of all of it and those done before.
        per_step: samples that one step stands for.
    """
    bar: tuple[Progress, TaskID] | None = None
    began = time.monotonic()
    next_report = began + QUIET_SECONDS
    try:
        for step in steps:
            yield step
            done, now = min(done + per_step, total), time.monotonic()
            if now < next_report:
                continue
            if sys.stderr.isatty():
                bar = bar or _started_bar(what, total)
                bar[0].update(bar[1], completed=done)
                next_report = now + REDRAW_SECONDS
            else:
                sys.stderr.write(f"{what}: {done:,} of {total:,}, {now - began:.0f} s\n")
                sys.stderr.flush()
                next_report = now + LINE_SECONDS
    finally:
        if bar is not None:
            bar[0].stop()


def _started_bar(what: str, total: int) -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        TextColumn("{task.completed:,} of {task.total:,}"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=total)
    bar.start()
    return bar, task
