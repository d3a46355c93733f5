"""Write one or several runs as one HTML file, for `cmtrain report` and for the end of each run.

All data comes from the run folders, so a run that is still running, was killed or diverged has a report,
too. The template is templates/report.html, and charts.py draws the charts. Needs no torch.
"""

import base64
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmtrain.config.schema import defaults
from cmtrain.config.strict_yaml import emit
from cmtrain.monitoring.report import classes
from cmtrain.monitoring.report.charts import PlottedRun, draw_charts
from cmtrain.monitoring.report.headline import environment_of, event_rows, headline, measure_times, number
from cmtrain.monitoring.report.rendering import render_page
from cmtrain.monitoring.units import duration, percent, short, state_name, utc
from cmtrain.storage.records import remove_leftovers, replace_file
from cmtrain.storage.run_folder import REPORT_NAME, SILENT_SECONDS
from cmtrain.storage.run_record import Columns, RunRecord, read_run
from pipelines.spec import DataError

NUM_COLORS = 8  # of lines that colour can distinguish; further runs differ by their letters
SAMPLE_PX = 1024
NUM_TABLE_ROWS = 25

TONES = {"finished": "good", "running": "info", "preempted": "warn", "diverged": "bad", "failed": "bad"}


def report(paths: Sequence[str], out: str | None) -> None:
    """Write the report of the run folders `paths`, and print its path. Raises DataError."""
    folders = [Path(path) for path in paths]
    target = Path(out or (folders[0] / REPORT_NAME if len(folders) == 1 else REPORT_NAME))
    remove_leftovers(target.parent, target.name)
    try:
        write_report(folders, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    print(target)  # noqa: T201


def write_report(folders: Sequence[Path], target: Path) -> Path:
    """Write the report of `folders`; return `target`. Raises DataError: no run. OSError: not written."""
    return replace_file(target, render([read_run(folder) for folder in folders]).encode(errors="replace"))


def render(records: Sequence[RunRecord]) -> str:
    """Return the report of `records` as HTML."""
    several = len(records) > 1
    letters = [_letter(index) if several else "" for index in range(len(records))]
    runs = [PlottedRun(record, letters[i], i % NUM_COLORS) for i, record in enumerate(records)]
    pages = [_run_page(run) for run in runs]
    title = f"{len(records)} runs" if several else records[0].name
    configs = [{key: emit(value) for key, value in record.config.items()} for record in records]
    differences = _differences(configs) + _differences([page["environment"] for page in pages])
    names = list(dict.fromkeys(name for page in pages for name, _, _ in page["headline"]))
    values = {"title": title, "at": time.time(), "differences": differences, "headline_names": names}
    return render_page("report.html", values | draw_charts(runs) | {"runs": pages}, ["curves.js"])


def _run_page(run: PlottedRun) -> dict[str, Any]:
    record, status, times = run.record, run.record.status, measure_times(run.record)
    name, reason = state_name(status), status.get("reason")
    silent_seconds, patience = time.time() - times.end, number(record.config.get("metrics.stall_seconds"))
    if status.get("state") == "running" and silent_seconds > (patience or SILENT_SECONDS):
        reason = f"nothing was written for {duration(silent_seconds)}; the run may have been killed"
        name = "running?"
    exit_code, usual = status.get("exit_code"), TONES.get(str(status.get("state")), "warn")
    tone = "warn" if exit_code == 5 or name == "running?" else usual
    config, known = record.config, {key: emit(value) for key, value in defaults().items()}
    return {
        "plot": run, "record": record, "state": name, "tone": tone, "exit_code": exit_code, "reason": reason,
        "began": utc(times.begin) if times.begin else "", "times": times,
        "headline": list(headline(record, times, run.last_step)), "events": event_rows(record),
        "evaluations": _table(record.evaluations), "log": _table(record.log, leave_out=("time",)),
        "classes": classes.class_section(record),
        "sheets": {name.partition(".")[0]: sheet_uri(path) for name, path in record.sheets.items()},
        "config": {key: (text := emit(value), text != known.get(key)) for key, value in config.items()},
        "environment": environment_of(record),
    }  # fmt: skip


def _table(columns: Columns, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """Return at most NUM_TABLE_ROWS rows, evenly spaced, with the newest one."""
    names = [name for name, values in columns.items() if name not in leave_out and np.isfinite(values).any()]
    count = len(columns["step"])
    taken = np.unique(np.linspace(0, max(count - 1, 0), min(count, NUM_TABLE_ROWS)).round().astype(int))
    rows = [[_show(name, float(columns[name][index])) for name in names] for index in taken.tolist()]
    return {"names": [name.replace("_", " ") for name in names], "rows": rows, "count": count}


def _show(name: str, value: float) -> str:
    if not np.isfinite(value):
        return ""
    if name in ("step", "epoch"):
        return f"{value:,.0f}"
    return percent(value) if name.endswith(("top1", "top5", "map", "_ratio")) else short(value)


def sheet_uri(path: Path) -> str | None:
    """Return the contact sheet as the data URI of a small JPEG; None if it is not an image."""
    file = io.BytesIO()
    try:
        with Image.open(path) as sheet:
            smaller = sheet.convert("RGB")
        smaller.thumbnail((SAMPLE_PX, SAMPLE_PX))
        smaller.save(file, "JPEG", quality=85)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _differences(tables: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Return (key, its value in each table) for each key whose values differ."""
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [table.get(key, "") for table in tables]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _letter(index: int) -> str:
    """Return A, B, ... Z, AA, AB, ..."""
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)
