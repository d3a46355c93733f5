"""Print a run's progress to stderr: a bar on a terminal, else one greppable line per log point."""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Concatenate, ParamSpec

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pipelines.spec import visible

MIN_BAR_WIDTH = 7
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


class Console:
    """Prints on rank 0; `enabled` is false on the others, which print nothing. No method raises."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.rich = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.parts_width = 0  # columns of the terminal that are left for the parts of a log point

    @_safe
    def start(self, step: int, total_steps: int) -> None:
        """Show the bar, if stderr is a terminal."""
        if not (self.enabled and self.rich.is_terminal):
            return
        digits = len(str(total_steps))
        place = TextColumn(f"step {{task.completed:>{digits}}}/{{task.total}}")
        columns = place, BarColumn(None), TimeElapsedColumn(), TextColumn("elapsed  {task.description}")
        self.bar = Progress(*columns, console=self.rich, transient=True)
        fixed = f"step {total_steps}/{total_steps} {' ' * MIN_BAR_WIDTH} 0:00:00 elapsed  "
        self.parts_width = self.rich.width - len(fixed)
        self.task = self.bar.add_task("", total=total_steps, completed=step)
        self.bar.start()

    @_safe
    def advance(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step)

    @_safe
    def progress(self, place: str, *parts: str) -> None:
        """Show one log point: a line of `place` (epoch and step) and all `parts`, the most important first.

        The bar shows the step itself, and as many parts as fit.
        """
        if not self.bar:
            self.line(" ".join([place, *parts]))
            return
        shown = ""
        for part in parts:
            longer = f"{shown}  {part}" if shown else part
            if len(longer) > self.parts_width:
                break
            shown = longer
        self.bar.update(self.task, description=shown)

    @_safe
    def line(self, text: str) -> None:
        """Print a line that stays on the screen: an evaluation, a checkpoint, what the guard did."""
        if self.enabled:
            text = visible(text)
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
