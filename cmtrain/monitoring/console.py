"""Print what a verb finds: progress and tables for people on stderr, a JSON line for programs on stdout."""

import contextlib
import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from cmtrain.monitoring.units import duration
from cmtrain.storage.records import replace_file
from pipelines.spec import visible

MIN_BAR_WIDTH = 7
SILENT_SECONDS = 9.0  # nobody waits longer for a sign of life
LINE_SECONDS = 30.0  # between two lines of a run whose log points are further apart
P = ParamSpec("P")


def _safe(show: Callable[Concatenate["Console", P], None]) -> Callable[Concatenate["Console", P], None]:
    """Go on after any error of the terminal or of rich, without the bar: it is no reason to end a run."""

    @functools.wraps(show)
    def call(console: "Console", *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            show(console, *args, **kwargs)
        except Exception:
            bar, console.bar = console.bar, None
            if bar:
                with contextlib.suppress(Exception):
                    bar.stop()

    return call


def print_result(result: dict[str, Any], *, asked: bool) -> None:
    """Print `result` as a JSON line where stdout is no terminal, or where a person has `asked` (--json)."""
    if asked or not sys.stdout.isatty():
        print(json.dumps(result), flush=True)  # noqa: T201


def write_result(result: dict[str, Any], path: str | None) -> None:
    """Write `result` as JSON, if there is a path. A kill leaves what the call before wrote, whole."""
    if path:
        replace_file(Path(path), json.dumps(result, indent=1) + "\n")


@contextlib.contextmanager
def announced_parts(total: int, *, enabled: bool = True) -> Iterator[Callable[[str], None]]:
    """Yield a function that prints `[3 of 7] resnet50 ...` at the begin of each part of a long work.
    While a part goes on, its line comes once more every SILENT_SECONDS, with the time since its begin.
    """
    begun, ended = list[tuple[float, str]](), threading.Event()

    def begin(part: str) -> None:
        begun.append((time.monotonic(), visible(f"[{len(begun) + 1} of {total}] {part} ...")))
        sys.stderr.write(f"{begun[-1][1]}\n" if enabled else "")

    def repeat() -> None:
        while enabled and not ended.wait(SILENT_SECONDS):
            for at, line in begun[-1:]:
                sys.stderr.write(f"{line} {duration(time.monotonic() - at)}\n")

    repeating = threading.Thread(target=repeat, daemon=True)
    repeating.start()
    try:
        yield begin
    finally:
        ended.set()
        repeating.join()


class ElapsedColumn(ProgressColumn):
    """The time since the bar appeared, in a column of one width up to 99 days."""

    def render(self, task: Task) -> Text:
        return Text(f"{duration(task.elapsed or 0.0):>7} elapsed")


class Console:
    """Shows a bar on a terminal, else a line per log point; nothing unless `enabled`. Never raises."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        # Only a terminal is one: CI systems set FORCE_COLOR, and their logs are files.
        terminal = sys.stderr.isatty()
        self.rich = RichConsole(stderr=True, highlight=False, soft_wrap=True, force_terminal=terminal)
        self.bar: Progress | None = None
        self.fixed_width = 0  # columns of the terminal that the parts cannot have
        self.first_step = self.total_steps = 0
        self.step_seconds = self.printed_at = 0.0
        self.parts: tuple[str, ...] = ()  # of the newest log point

    @_safe
    def start(self, step: int, total_steps: int) -> None:
        """Show the bar, if stderr is a terminal."""
        self.first_step, self.total_steps = step, total_steps
        if not (self.enabled and self.rich.is_interactive):
            return
        place, elapsed = (TextColumn("step"), MofNCompleteColumn()), ElapsedColumn(Column(no_wrap=True))
        columns = *place, BarColumn(None), elapsed, TextColumn(" {task.description}")
        self.bar = Progress(*columns, console=self.rich, transient=True)
        self.fixed_width = len(f"step {total_steps}/{total_steps} {' ' * MIN_BAR_WIDTH} 59m 59s elapsed  ")
        self.bar.add_task("", total=total_steps, completed=step)
        self.bar.start()

    @_safe
    def advance(self, step: int, seconds: float) -> None:
        """Show that `step` is done: in the bar, else by a line after the first one and every LINE_SECONDS.
        `seconds`: that it took. The first log point may be hours away, and the run take weeks.
        """
        self.step_seconds += seconds
        done = step - self.first_step
        eta = f"eta {duration(self.step_seconds / max(done, 1) * (self.total_steps - step))}"
        if self.bar:
            self.bar.update(TaskID(0), completed=step, description=None if self.parts else eta)
        elif done == 1 or time.monotonic() - self.printed_at >= LINE_SECONDS:
            self.line(f"step {step}/{self.total_steps} {eta}{' (by one step)' if done == 1 else ''}")

    @_safe
    def progress(self, place: str, *parts: str) -> None:
        """Show one log point: a line of `place` (epoch and step) and `parts`; in the bar, those that fit."""
        if not self.bar:
            self.line(" ".join([place, *parts]))
            return
        self.parts, room = parts, self.rich.width - self.fixed_width
        texts = ["  ".join(parts[:count]) for count in range(1, len(parts) + 1)]
        longest = max((text for text in texts if len(text) <= room), key=len, default="")
        self.bar.update(TaskID(0), description=longest)

    @_safe
    def line(self, text: str) -> None:
        """Print a line that stays on the screen: an evaluation, a checkpoint, what the guard did."""
        if self.enabled:
            text, self.printed_at = visible(text), time.monotonic()
            if self.bar:
                self.rich.print(text, markup=False)
            else:
                print(text, file=sys.stderr, flush=True)  # noqa: T201

    @_safe
    def stop(self) -> None:
        """Remove the bar."""
        if self.bar:
            self.bar.stop()
            self.bar = None
