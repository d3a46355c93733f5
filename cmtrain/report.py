"""`cmtrain report`: one or several runs as one HTML file that needs nothing else, to read, to keep and to mail.

Everything comes from the run folders, so a report can be made of a run that still runs, was killed or diverged. The
page is templates/report.html, its charts are charts.py's. Needs no torch.
"""

import base64
import hashlib
import io
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from cmtrain import __version__
from cmtrain.axes import Scale, short
from cmtrain.charts import Chart, Mark, Series, line_chart
from cmtrain.config import Config
from cmtrain.console import duration
from cmtrain.report_classes import class_section
from cmtrain.report_events import event_lanes, event_rows, hairlines, utc
from cmtrain.report_headline import environment_of, figures, number, summary
from cmtrain.run_folder import REPORT_NAME
from cmtrain.run_record import Columns, RunRecord, last, read_run
from cmtrain.run_times import Times, measure_times
from cmtrain.strict_yaml import emit

NUM_COLORS = 8  # that many lines can be told apart by colour; letters tell the others
MAX_SAMPLE_BYTES = 200_000  # a larger contact sheet is put into the page as a smaller JPEG
SAMPLE_PX = 1024
SILENT_SECONDS = 600  # a run that says it runs and has not written for so long probably does not
NUM_TABLE_ROWS = 25

# (column of the log, title, scale, options); a column that is not there or always 1 has no chart.
LOG_CHARTS: tuple[tuple[str, str, Scale, dict[str, Any]], ...] = (
    ("lr", "Learning rate", "linear", {"zero": True}),
    ("grad_norm", "Gradient norm", "auto", {}),
    ("loss_scale", "Loss scale", "log2", {}),
    ("images_per_second", "Images per second", "linear", {"zero": True}),
    ("data_wait_ratio", "Time waiting for data", "linear", {"zero": True, "percent": True}),
)
TONES = {"finished": "good", "running": "info", "preempted": "warn", "diverged": "bad", "failed": "bad"}


@dataclass(frozen=True)
class Run:
    """A run as the page shows it. `letter`, `color`: of its lines, where there are several runs."""

    record: RunRecord
    times: Times
    letter: str
    color: int

    @property
    def last_step(self) -> float:
        """The last step that is known to be done."""
        record = self.record
        steps = last(record.log, "step"), last(record.evaluations, "step"), number(record.status.get("step"))
        return max(0.0, *(step for step in steps if step is not None))


def report(paths: Sequence[str], out: str | None) -> int:
    """Write the report of the run folders `paths` to `out`, else into the only one's folder, else here; print where to.

    Raises:
        DataError: one of them is no run folder.
    """
    folders = [Path(path) for path in paths]
    target = Path(out) if out else folders[0] / REPORT_NAME if len(folders) == 1 else Path(REPORT_NAME)
    write_report(folders, target)
    print(target)  # noqa: T201
    return 0


def write_report(folders: Sequence[Path], target: Path) -> None:
    """Write the report of `folders` to `target`, whole or not at all.

    Raises:
        DataError: one of them is no run folder.
        OSError: `target` cannot be written.
    """
    page = render([read_run(folder) for folder in folders])
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8", errors="replace")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def render(records: Sequence[RunRecord]) -> str:
    """The page. Jinja escapes whatever comes from a run folder; only charts.py's output is taken as it is."""
    runs = [
        Run(record, measure_times(record), letter=_letter(index) if len(records) > 1 else "", color=index % NUM_COLORS)
        for index, record in enumerate(records)
    ]
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"short": short, "duration": duration}
    pages = [_run_page(run) for run in runs]
    script = templates.get_template("report.js").render()
    # Should anything slip through all the same: a browser runs no script but the one with this hash.
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return templates.get_template("report.html").render(
        title=records[0].name if len(records) == 1 else f"{len(records)} runs",
        script=script,
        script_hash=script_hash,
        version=__version__,
        written=utc(time.time()),
        large_charts=_large_charts(runs),
        small_charts=_small_charts(runs),
        runs=pages,
        figure_names=list(dict.fromkeys(name for page in pages for name, _, _ in page["figures"])),
        differences=_differences([{key: emit(value) for key, value in run.record.config.items()} for run in runs])
        + _differences([environment_of(run.record) for run in runs]),
    )


def _large_charts(runs: Sequence[Run]) -> list[Chart]:
    """Loss and accuracy, of one run with its events, or of several runs over each other."""
    expected = number(runs[0].record.config.get("expect.top1")) if len(runs) == 1 else None
    level = None if expected is None else (expected, f"expected {100 * expected:.4g}%")
    look: dict[str, Any] = {"x_high": _x_high(runs), "marks": _marks(runs), "height_px": 200}
    losses, accuracies = _losses(runs), _accuracies(runs)
    charts = [line_chart("Loss", losses, key="loss", scale="auto", **look)] if losses else []
    if accuracies:
        charts.append(line_chart("Top-1 accuracy", accuracies, key="accuracy", percent=True, level=level, **look))
    return charts


def _small_charts(runs: Sequence[Run]) -> list[Chart]:
    charts = []
    for column, title, scale, options in LOG_CHARTS:
        series = _known([_series(run, run.record.log, column, name=run.letter) for run in runs])
        if any((line.y[np.isfinite(line.y)] != 1).any() for line in series):
            look: dict[str, Any] = {"x_high": _x_high(runs), "marks": _marks(runs)}
            charts.append(line_chart(title, series, key=column, scale=scale, **look, **options))
    return charts


def _x_high(runs: Sequence[Run]) -> float:
    return max(1.0, *(run.last_step for run in runs))


def _marks(runs: Sequence[Run]) -> list[Mark]:
    return hairlines(runs[0].record) if len(runs) == 1 else []


def _losses(runs: Sequence[Run]) -> list[Series]:
    if len(runs) > 1:
        return _known([_series(run, run.record.log, "loss", name=run.letter) for run in runs])
    run = runs[0]
    lines = [_series(run, run.record.log, "loss", name="training")]
    lines += [_series(run, run.record.evaluations, "eval_loss", name="validation", color=1, dots=True)]
    lines += [_series(run, run.record.evaluations, "eval_ema_loss", name="validation, EMA", color=2, dots=True)]
    return _known(lines)


def _accuracies(runs: Sequence[Run]) -> list[Series]:
    lines = []
    for run in runs:
        known = run.record.evaluations
        if len(runs) == 1:
            lines += [_series(run, known, "eval_top1", name="model", color=1, dots=True)]
            lines += [_series(run, known, "eval_ema_top1", name="EMA", color=2, dots=True)]
        else:
            lines += [_series(run, known, "eval_top1", name=run.letter, dots=True)]
            lines += [_series(run, known, "eval_ema_top1", name=f"{run.letter} EMA", dashed=True)]
    return _known(lines)


def _known(lines: Sequence[Series]) -> list[Series]:
    return [line for line in lines if np.isfinite(line.y).any()]


def _series(run: Run, columns: Columns, column: str, *, name: str, color: int | None = None, **look: Any) -> Series:
    y = columns.get(column, np.full(len(columns["step"]), np.nan))
    label = "" if look.get("dashed") else run.letter
    return Series(name, columns["step"], y, color=run.color if color is None else color, label=label, **look)


def _run_page(run: Run) -> dict[str, Any]:
    """What the page says of one run."""
    record, status = run.record, run.record.status
    state = str(status.get("state", "unknown"))
    silent_seconds = time.time() - run.times.end
    if state == "running" and silent_seconds > SILENT_SECONDS:
        state = "running?"
    exit_code, reason = status.get("exit_code"), status.get("reason")
    if state == "running?":
        reason = f"it has said nothing for {duration(silent_seconds)} and may have been killed"
    return {
        "name": record.name,
        "letter": run.letter,
        "color": run.color,
        "state": state,
        "tone": "warn" if exit_code == 5 else TONES.get(state, "warn"),
        "exit_code": exit_code,
        "reason": reason,
        "summary": summary(record),
        "began": utc(run.times.begin) if run.times.begin else "",
        "figures": figures(record, run.times, run.last_step),
        "times": run.times,
        "events": event_rows(record),
        "lanes": event_lanes(record, _x_high([run])),
        "steps_per_epoch": _steps_per_epoch(record),
        "evaluations": _table(record.evaluations),
        "log": _table(record.log, leave_out=("time",)),
        "classes": class_section(record),
        "sample": sample_uri(record.sample) if record.sample else None,
        "config": _config_lines(record),
        "config_text": record.config_text,
        "environment": environment_of(record),
        "damage": record.damage,
    }


def _steps_per_epoch(record: RunRecord) -> float | None:
    """From the evaluations, which are at the ends of epochs."""
    epochs, steps = record.evaluations.get("epoch", np.empty(0)), record.evaluations["step"]
    known = epochs > 0
    return float(steps[known][0] / epochs[known][0]) if known.any() else None


def _table(columns: Columns, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """At most NUM_TABLE_ROWS rows, evenly taken, the newest one among them."""
    names = [name for name, values in columns.items() if name not in leave_out and np.isfinite(values).any()]
    count = len(columns["step"])
    taken = np.unique(np.linspace(0, max(count - 1, 0), min(count, NUM_TABLE_ROWS)).round().astype(int)).tolist()
    rows = [[_show(name, float(columns[name][index])) for name in names] for index in taken]
    return {"names": [name.replace("_", " ") for name in names], "rows": rows, "count": count}


def _show(name: str, value: float) -> str:
    if not np.isfinite(value):
        return ""
    if name in ("step", "epoch"):
        return f"{value:,.0f}"
    return f"{value:.2%}" if name.endswith(("top1", "top5", "_ratio")) else short(value)


def sample_uri(path: Path) -> str | None:
    """The contact sheet as a data URI; None if it is no picture."""
    try:
        content, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(content)) as sheet:
            if len(content) > MAX_SAMPLE_BYTES:
                smaller, kind = sheet.convert("RGB"), "jpeg"
                smaller.thumbnail((SAMPLE_PX, SAMPLE_PX))
                file = io.BytesIO()
                smaller.save(file, "JPEG", quality=82)
                content = file.getvalue()
            else:
                sheet.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _config_lines(record: RunRecord) -> list[tuple[str, bool]]:
    """(line, whether it differs from the default) of the configuration."""
    sections: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
    defaults = {
        f"{name}.{key}": field.default for name, model in sections.items() for key, field in model.model_fields.items()
    }
    lines: list[tuple[str, bool]] = []
    for section, items in itertools.groupby(record.config.items(), key=lambda item: item[0].split(".")[0]):
        lines.append((f"{section}:", False))
        for name, value in items:
            changed = name not in defaults or emit(value) != emit(defaults[name])
            lines.append((f"  {name.removeprefix(section + '.')}: {emit(value)}", changed))
    return lines


def _differences(tables: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """(key, its value in each table) where they are not all the same."""
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [table.get(key, "") for table in tables]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _letter(index: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)
