"""The bar shows the most important numbers at any width; a pipe gets whole lines, a program JSON."""

import io
import json
import sys

import pytest
from rich.console import Console as RichConsole

from cmtrain.monitoring.console import Console, print_result
from cmtrain.step.evaluate import Evaluation
from cmtrain.training.run_logger import RunLogger

PLACE = "epoch 1/25 step 20/450"
PARTS = "eta 43s", "loss 0.5182", "388 img/s", "data 14 %", "lr 1.86e-03", "grad 1.19"


def bar_at(width, *, parts=PARTS, elapsed_seconds=7, first_step=0):
    """Return the text of the bar, `width` columns wide, at step 20, after a log point of `parts`."""
    console = Console(enabled=True)
    on_terminal = {"force_terminal": True, "force_interactive": True}
    console.rich = RichConsole(file=io.StringIO(), **on_terminal, width=width, soft_wrap=True)
    console.start(first_step, 450)
    task = console.bar.tasks[0]
    task.start_time = console.bar.get_time() - elapsed_seconds
    console.advance(20, elapsed_seconds)
    if parts:
        console.progress(PLACE, *parts)
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
    assert " 7s elapsed" in text
    assert text.endswith("  ".join(PARTS[:num_parts]))


def test_the_bar_of_a_run_of_days_is_one_line_at_80_columns():
    text = bar_at(80, elapsed_seconds=3 * 86_400 + 7_300)
    assert "3d 2h elapsed" in text
    assert text.endswith("  ".join(PARTS[:4]))
    assert len(text) <= 80


def test_the_time_left_is_there_after_the_first_step():
    """A log point may be hours away: 50 steps of a minute."""
    assert bar_at(80, parts=(), elapsed_seconds=600).endswith(" 10m 0s elapsed  eta 3h 35m")
    assert bar_at(80, parts=(), elapsed_seconds=600, first_step=10).endswith("elapsed  eta 7h 10m")


def test_after_an_error_of_the_bar_lines_are_printed_without_it(capsys):
    console = Console(enabled=True)
    console.rich = RichConsole(file=io.StringIO(), force_terminal=True, force_interactive=True)
    console.start(0, 450)
    console.bar.update = None
    console.advance(1, 1.0)
    console.line("finished")
    console.stop()
    assert capsys.readouterr().err == "finished\n"


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_pipe_is_a_pipe_whatever_the_environment_says(variable, monkeypatch, capsys):
    monkeypatch.setenv(variable, "1")
    test_a_pipe_gets_one_line_with_everything(capsys)


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    test_a_pipe_gets_one_line_with_everything(capsys)


def test_json_is_for_programs_and_for_a_person_who_asks(monkeypatch, capsys):
    print_result({"top1": 0.5}, asked=False)
    assert json.loads(capsys.readouterr().out) == {"top1": 0.5}
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_result({"top1": 0.5}, asked=False)
    assert capsys.readouterr().out == ""
    print_result({"top1": 0.5}, asked=True)
    assert json.loads(capsys.readouterr().out) == {"top1": 0.5}


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


def test_what_is_not_printable_is_shown_as_escapes(capsys):
    console = Console(enabled=True)
    console.line("bad file: x\x1b]52;c;ZQ==\x07\nfinished: top-1 1.0\u202e.jpg \udce9")
    assert capsys.readouterr().err == (
        "bad file: x\\x1b]52;c;ZQ==\\x07\\nfinished: top-1 1.0\\u202e.jpg \\udce9\n"
    )


def test_without_a_terminal_the_first_step_and_half_a_minute_without_a_log_point_have_a_line(
    capsys, monkeypatch
):
    now = [1000.0]
    monkeypatch.setattr("cmtrain.monitoring.console.time.monotonic", lambda: now[0])
    console = Console(enabled=True)
    console.start(10, 110)
    for step in range(11, 24):
        now[0] += 10.0
        console.advance(step, 10.0)
        if step == 20:
            console.progress("epoch 1/2 step 20/110", "loss 1.0")
    assert capsys.readouterr().err.splitlines() == [
        "step 11/110 eta 16m 30s (by one step)",
        "step 14/110 eta 16m 0s",
        "step 17/110 eta 15m 30s",
        "step 20/110 eta 15m 0s",
        "epoch 1/2 step 20/110 loss 1.0",
        "step 23/110 eta 14m 30s",
    ]


@pytest.mark.parametrize(("images", "shown"), [([30, 40, 0], ""), ([20, 40, 0], "balanced 75.0 % ")])
def test_the_line_of_an_evaluation_has_the_balanced_accuracy_of_uneven_classes(
    tmp_path, capsys, images, shown
):
    logger = RunLogger(
        tmp_path / "run", rank=0, world_size=1, first_step=0, last_step=2, epochs=1, total_steps=2,
        address=None, stall_seconds=600,
    )  # fmt: skip
    result = Evaluation(0.8, 1.0, 0.5, sum(images), 0, images, [images[0] // 2, images[1], 0], [0, 0, 0])
    logger.evaluated({"model": result}, ["a", "b", "c"], epoch=1, step=2, lr=0.1, seconds=1.0, best=(0.8, 2))
    line = f"epoch 1/1 model top-1 80.0 % {shown}top-5 100.0 % loss 0.5000 on {sum(images)} images"
    assert capsys.readouterr().err.splitlines() == [line]
