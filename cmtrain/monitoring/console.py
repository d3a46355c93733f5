"""What a person sees on stderr: a rich progress bar on a terminal, one greppable line a log point otherwise."""

import sys
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Console:
    """Prints on rank 0 and keeps quiet elsewhere."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.rich = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.task: Any = None

    def start(self, step: int, total_steps: int) -> None:
        if self.enabled and self.rich.is_terminal:
            columns = TextColumn("step {task.completed}/{task.total}"), BarColumn(None), TimeElapsedColumn()
            self.bar = Progress(
                *columns, TextColumn("{task.description}"), console=self.rich, transient=True
            )
            self.task = self.bar.add_task("", total=total_steps, completed=step)
            self.bar.start()

    def advance(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step)

    def progress(self, line: str) -> None:
        """One log point: shown beside the bar, or printed as a line."""
        if self.bar:
            self.bar.update(self.task, description=line.split(" ", 4)[-1])
        else:
            self.line(line)

    def line(self, text: str) -> None:
        """Something worth keeping on the screen: evaluations, checkpoints, the guard."""
        if self.enabled:
            if self.bar:
                self.rich.print(text, markup=False)
            else:
                print(text, file=sys.stderr, flush=True)  # noqa: T201

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
