"""Read the records of a run folder, whole or as a bounded sample, even if files are missing, cut or damaged.

Needs no torch. Half a million log records are read in 2 s on one core, most of it JSON.
"""

import contextlib
import csv
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cmtrain.config.strict_yaml import Node
from cmtrain.storage import records
from cmtrain.storage.records import is_event, is_number, noting, open_regular, parse_record
from cmtrain.storage.run_folder import CLASSES_NAME, MISTAKES_NAME, SAMPLE_NAME, load_config, read_status
from pipelines.spec import DataError

RUN_FILES = ("status.json", "log.jsonl", "events.jsonl", "config.yaml")
ROWS_AT_A_TIME = 20_000  # of a log: as dicts they take ten times the memory that they take as columns

LAST_BYTES = 64 * 1024  # of a file that is sampled: about 200 log records
MAX_PLACES = 512  # in the rest of it, at which a line is read
BUFFER_BYTES = 1024  # two or three log records, so that little more is read than is used

Columns = Mapping[str, np.ndarray]  # name -> (N,) float64, NaN where a row has no number


class ClassCounts(NamedTuple):
    """Validation results by class, for one set of weights."""

    images: np.ndarray  # (K,) counts
    correct: np.ndarray  # (K,)
    confusion: np.ndarray | None  # (K, K), true by predicted class; None if K is too large
    thresholds: list[float]  # (K,), see Evaluation; [] where an image has one class


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder."""

    path: Path
    status: dict[str, Any]
    log: Columns  # ascending by "step", which it always has
    evaluations: Columns  # as `log`
    events: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)  # by dotted key
    class_names: list[str] = field(default_factory=list)
    classes: dict[str, ClassCounts] = field(default_factory=dict)  # by weights, `model` or `ema`
    sheets: dict[str, Path] = field(default_factory=dict)  # of images, by name
    damage: list[str] = field(default_factory=list)  # one line for each thing that could not be read

    @property
    def name(self) -> str:
        return self.path.resolve().name


def read_run(path: Path) -> RunRecord:
    """Read the run folder `path`. Raises DataError: it is none."""
    if not path.is_dir():
        raise DataError(f"{path}: no such run folder")
    if not any((path / name).is_file() for name in RUN_FILES):
        raise DataError(f"{path}: not a run folder: it holds none of {', '.join(RUN_FILES)}")
    damage: list[str] = []
    events = [event for event in records.read_records(path / "events.jsonl", damage) if is_event(event)]
    config = read_config(path / "config.yaml", damage)
    names, classes, _ = read_classes(path / CLASSES_NAME, damage)
    status, log = read_status(path, damage), to_columns(records.read_records(path / "log.jsonl", damage))
    if not (path / "status.json").exists():
        damage.append("status.json: missing")
    rows: list[dict[str, float | None]] = []
    summary, not_evaluated = path / "summary.csv", contextlib.suppress(FileNotFoundError)
    with noting(summary, damage), not_evaluated, open_regular(summary) as file:
        rows = list(_rows(file))
    records.note_left_out(summary, damage, "row", sum(not is_number(row.get("step")) for row in rows))
    sheets = {name: path / name for name in (SAMPLE_NAME, MISTAKES_NAME) if (path / name).is_file()}
    evaluations = to_columns(rows)
    return RunRecord(path, status or {}, log, evaluations, events, config, names, classes, sheets, damage)


def read_sample(path: Path, status: dict[str, Any]) -> RunRecord:
    """Read a sample of log, evaluations and events, whole at their end: as much after a million steps."""
    log = filter(None, map(parse_record, sample_lines(path / "log.jsonl")))
    evaluations = to_columns(_rows(sample_lines(path / "summary.csv")))
    events = filter(None, map(parse_record, sample_lines(path / "events.jsonl")))
    return RunRecord(path, status, to_columns(log), evaluations, list(filter(is_event, events)))


def last(columns: Columns, name: str) -> float | None:
    """Return the newest number of a column; None if it never held one."""
    values = columns.get(name, np.empty(0))
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else None


def _rows(lines: Iterable[bytes]) -> Iterator[dict[str, float | None]]:
    """Yield the rows of summary.csv, each as numbers by column."""
    with contextlib.suppress(csv.Error):
        for row in csv.DictReader(line.decode(errors="replace") for line in lines):
            yield {key: _number(text) for key, text in row.items() if key is not None}


def to_columns(entries: Iterable[Mapping[str, Any]]) -> Columns:
    """Return entries as columns, ascending by step; those without a step are left out."""
    rows = (entry for entry in entries if is_number(entry.get("step")))
    parts: list[dict[str, np.ndarray]] = []
    while batch := list(itertools.islice(rows, ROWS_AT_A_TIME)):
        names = dict.fromkeys(itertools.chain(*batch))
        parts.append({name: _as_floats([record.get(name) for record in batch]) for name in names})
    columns = {"step": np.empty(0)}
    for name in dict.fromkeys(itertools.chain(*parts)):
        columns[name] = np.concatenate([p.get(name, np.full_like(p["step"], np.nan)) for p in parts])
    order = np.argsort(columns["step"], kind="stable")
    return {name: values[order] for name, values in columns.items()}


def _as_floats(values: Sequence[Any]) -> np.ndarray:
    try:
        floats = np.array(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError):
        floats = np.array([value if is_number(value) else np.nan for value in values], dtype=np.float64)
    floats[np.isinf(floats)] = np.nan
    return floats


def read_config(path: Path, damage: list[str]) -> dict[str, Any]:
    """Return the values of a run's configuration by dotted key, unchecked; {} if it cannot be read."""
    config: dict[str, Any] = {}
    with noting(path, damage):
        for section, node in load_config(path).items():
            if isinstance(node, Node) and isinstance(node.value, dict):
                config |= {f"{section}.{key}": child.value for key, child in node.value.items()}
    return config


def read_classes(path: Path, damage: list[str]) -> tuple[list[str], dict[str, ClassCounts], int | None]:
    """Return names, results by weights and step of classes.json; none if missing or noted in `damage`."""
    try:
        content = records.load_json(path)
        names = [str(name) for name in content["classes"]]
        counts = {weights: _class_counts(entry, len(names)) for weights, entry in content["weights"].items()}
    except FileNotFoundError:
        return [], {}, None  # not evaluated yet
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        damage.append(f"{path.name}: cannot be read: {type(error).__name__}: {error}")
        return [], {}, None
    return names, counts, content.get("step")


def _class_counts(entry: Mapping[str, Any], num_classes: int) -> ClassCounts:
    wanted = {"images": (num_classes,), "correct": (num_classes,), "confusion": (num_classes, num_classes)}
    given = {name: entry.get(name) for name in wanted}
    counts = {name: np.array(value, np.int64) for name, value in given.items() if value is not None}
    if wrong := [name for name, table in counts.items() if table.shape != wanted[name]]:
        raise ValueError(f"{num_classes} classes, but {wrong[0]} of shape {counts[wrong[0]].shape}")
    thresholds = list(map(float, entry.get("thresholds", [])))
    if len(thresholds) not in (0, num_classes):
        raise ValueError(f"{num_classes} classes, but {len(thresholds)} thresholds")
    return ClassCounts(counts["images"], counts["correct"], counts.get("confusion"), thresholds)


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def sample_lines(path: Path) -> Iterator[bytes]:
    """Yield the last LAST_BYTES of a file in whole lines, after 256 to 512 lines of the rest, evenly.
    They are taken at multiples of a power of two: a file that grows keeps its sample until it has doubled.
    """
    with noting(path), open_regular(path, buffering=BUFFER_BYTES) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        end, begun = max(0, num_bytes - LAST_BYTES), -1
        stride = 1 << (num_bytes // MAX_PLACES).bit_length()
        for place in (*range(0, end, stride), end):
            file.seek(max(0, place - 1))
            if place:
                file.readline()  # the rest of the line before
            begin = file.tell()
            if begun < begin < end:  # a long line may hold several places
                yield file.readline()
                begun = begin
        yield from file
