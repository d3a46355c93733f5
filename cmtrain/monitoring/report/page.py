"""`cmtrain report`: one or several runs as one HTML file that needs nothing else, to read, to keep and to mail.

Everything comes from the run folders, so a report can be made of a run that still runs, was killed or diverged. The
page is templates/report.html, its charts are charts.py's. Needs no torch.
"""

import base64
import io
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmtrain import __version__
from cmtrain.config.schema import Config
from cmtrain.config.strict_yaml import emit
from cmtrain.monitoring.report.classes import class_section
from cmtrain.monitoring.report.curves import Run, large_charts, small_charts, x_high
from cmtrain.monitoring.report.events import event_lanes, event_rows
from cmtrain.monitoring.report.figures import environment_of, figures, measure_times, number, summary
from cmtrain.monitoring.report.templating import join_scripts, make_templates
from cmtrain.monitoring.units import duration, short, utc
from cmtrain.storage.atomic import replace_file
from cmtrain.storage.run_folder import REPORT_NAME, SILENT_SECONDS
from cmtrain.storage.run_record import Columns, RunRecord, read_run

NUM_COLORS = 8  # that many lines can be told apart by colour; letters tell the others
MAX_SAMPLE_BYTES = 200_000  # a larger contact sheet is put into the page as a smaller JPEG
SAMPLE_PX = 1024
NUM_TABLE_ROWS = 25

TONES = {"finished": "good", "running": "info", "preempted": "warn", "diverged": "bad", "failed": "bad"}


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
    replace_file(target, page.encode(errors="replace"))


def render(records: Sequence[RunRecord]) -> str:
    """The page. Jinja escapes whatever comes from a run folder; only charts.py's output is taken as it is."""
    runs = [
        Run(record, letter=_letter(index) if len(records) > 1 else "", color=index % NUM_COLORS)
        for index, record in enumerate(records)
    ]
    templates = make_templates()
    pages = [_run_page(run) for run in runs]
    return templates.get_template("report.html").render(
        title=records[0].name if len(records) == 1 else f"{len(records)} runs",
        **join_scripts(templates, ["curves.js"]),
        version=__version__,
        written=utc(time.time()),
        large_charts=large_charts(runs),
        small_charts=small_charts(runs),
        runs=pages,
        figure_names=list(dict.fromkeys(name for page in pages for name, _, _ in page["figures"])),
        differences=_differences(
            [{key: emit(value) for key, value in run.record.config.items()} for run in runs]
        )
        + _differences([environment_of(run.record) for run in runs]),
    )


def _run_page(run: Run) -> dict[str, Any]:
    """What the page says of one run."""
    record, status, times = run.record, run.record.status, measure_times(run.record)
    state = str(status.get("state", "unknown"))
    silent_seconds = time.time() - times.end
    if state == "running" and silent_seconds > (
        number(record.config.get("metrics.stall_seconds")) or SILENT_SECONDS
    ):
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
        "began": utc(times.begin) if times.begin else "",
        "figures": figures(record, times, run.last_step),
        "times": times,
        "events": event_rows(record),
        "lanes": event_lanes(record, x_high([run])),
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
    taken = np.unique(
        np.linspace(0, max(count - 1, 0), min(count, NUM_TABLE_ROWS)).round().astype(int)
    ).tolist()
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
        f"{name}.{key}": field.default
        for name, model in sections.items()
        for key, field in model.model_fields.items()
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
