"""Draw a progress bar for long scans; silent for the first two seconds."""

import sys
import time
from collections.abc import Generator, Iterable
from contextlib import ExitStack
from typing import Any, TypeVar

from pipelines.spec import print_lines, visible

T = TypeVar("T")

QUIET_SECONDS = 2.0
REDRAW_SECONDS, LINE_SECONDS = 0.2, 10.0


def tracked(
    steps: Iterable[T], what: str, total: int, done: int = 0, per_step: int = 1
) -> Generator[T, None, None]:
    """Pass `steps` on; after two seconds draw a bar on stderr or, without a terminal, print lines.
    `what` is as in "reading image headers"; `total`, `done` before and `per_step` are numbers of samples.
    """
    began = time.monotonic()
    next_report = began + QUIET_SECONDS
    with ExitStack() as stack:
        bar: Any = None
        for step in steps:
            yield step
            done, now = min(done + per_step, total), time.monotonic()
            if now < next_report:
                continue
            if sys.stderr.isatty():
                bar = bar or stack.enter_context(_bar(what, total))
                bar.update(bar.task_ids[0], completed=done)
                next_report = now + REDRAW_SECONDS
            else:
                print_lines(f"{what}: {done:,} of {total:,}, {now - began:.0f} s")
                next_report = now + LINE_SECONDS


def _bar(what: str, total: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    count = TextColumn("{task.completed:,} of {task.total:,}")
    columns = TextColumn(visible(what), markup=False), BarColumn(), count, TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(what, total=total)
    return bar
