"""The bar shows the most important numbers at any width; a pipe gets whole lines."""

import io

import pytest
from rich.console import Console as RichConsole

from cmtrain.monitoring.console import Console

PLACE = "epoch 1/25 step 20/450"
PARTS = "eta 43s", "loss 0.5182", "388 img/s", "data 14 %", "lr 1.86e-03", "grad 1.19"


def bar_at(width):
    """Return the text of the bar on a terminal of `width` columns, after a log point."""
    console = Console(enabled=True)
    console.rich = RichConsole(file=io.StringIO(), force_terminal=True, width=width, soft_wrap=True)
    console.start(0, 450)
    console.advance(20)
    console.progress(PLACE, *PARTS)
    screen = RichConsole(file=io.StringIO(), width=width)
    screen.print(*console.bar.get_renderables())
    console.stop()
    return screen.file.getvalue().rstrip("\n")


@pytest.mark.parametrize(("width", "num_parts"), [(60, 2), (80, 4), (120, 6)])
def test_the_bar_shows_step_and_time_left_and_whole_parts(width, num_parts):
    text = bar_at(width)
    assert "\n" not in text
    assert len(text) <= width
    assert text.startswith("step  20/450 ")
    assert "0:00:00 elapsed" in text
    assert text.endswith("  ".join(PARTS[:num_parts]))


def test_a_pipe_gets_one_line_with_everything(capsys):
    console = Console(enabled=True)
    console.start(0, 450)
    console.progress(PLACE, *PARTS)
    assert capsys.readouterr().err == f"{PLACE} {' '.join(PARTS)}\n"


def test_other_ranks_print_nothing(capsys):
    console = Console(enabled=False)
    console.start(0, 450)
    console.progress(PLACE, *PARTS)
    console.line("checkpoint")
    assert capsys.readouterr().err == ""
