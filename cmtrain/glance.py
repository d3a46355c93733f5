"""What the folder of a run tells while it runs, at a cost that does not grow with the run.

A page that refreshes itself is made again and again inside the process that trains, so it cannot read half a million
log records each time: it reads a few hundred of them, taken evenly, and the end of events.jsonl. Nothing is kept
between two looks; a run that was rewound, or has lost its folder, needs no case of its own.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cmtrain.storage.run_record import RunRecord, is_event, parse_record, parse_rows, to_columns

WHOLE_BYTES = 128 * 1024  # up to here all of a file is read: about 400 log records
MAX_PLACES = 512  # of a longer one, at which a line is read
LAST_BYTES = 64 * 1024  # of events.jsonl
BUFFER_BYTES = 1024  # two or three log records, so that little more is read than is used


def glance(path: Path, status: dict[str, Any]) -> RunRecord:
    """A sample of the log and of the evaluations, and the newest events, of the run folder `path`.

    Args:
        status: what status.json says.
    """
    log = (record for line in sample_lines(path / "log.jsonl") if (record := parse_record(line)))
    events = (event for line in last_lines(path / "events.jsonl", LAST_BYTES) if (event := parse_record(line)))
    rows = (line.decode(errors="replace") for line in sample_lines(path / "summary.csv"))
    return RunRecord(
        path=path,
        status=status,
        config_text="",
        config={},
        log=to_columns(log),
        evaluations=to_columns(parse_rows(rows)),
        events=[event for event in events if is_event(event)],
        class_names=[],
        classes={},
        sample=None,
    )


def sample_lines(path: Path) -> Iterator[bytes]:
    """Whole lines of a file: all of a short one; of a long one some 256 to 512, taken evenly, the first and last too.

    They are taken at multiples of a power of two, so a file that grows keeps its sample until it has doubled.
    """
    try:
        with open(path, "rb", buffering=BUFFER_BYTES) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes <= WHOLE_BYTES:
                yield from file
                return
            stride = 1 << ((num_bytes - 1) // MAX_PLACES).bit_length()
            begun = -1
            for place in range(0, num_bytes, stride):
                begin = _seek_line(file, place)
                if begun < begin < num_bytes:
                    yield file.readline()
                    begun = begin
    except OSError:
        return  # nothing was logged yet
    yield from last_lines(path, 4 * BUFFER_BYTES)


def is_sampled(path: Path) -> bool:
    """Whether sample_lines leaves out lines of a file."""
    try:
        return path.stat().st_size > WHOLE_BYTES
    except OSError:
        return False


def last_lines(path: Path, num_bytes: int) -> list[bytes]:
    """The whole lines among the last `num_bytes` of a file."""
    try:
        with open(path, "rb") as file:
            _seek_line(file, max(0, os.fstat(file.fileno()).st_size - num_bytes))
            return file.readlines()
    except OSError:
        return []


def _seek_line(file: BinaryIO, place: int) -> int:
    """Go to the first line that begins at `place` or after it. Returns where it begins."""
    file.seek(max(0, place - 1))
    if place:
        file.readline()
    return file.tell()
