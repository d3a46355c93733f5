"""Write one file per rank that lets Prometheus find it (file-based service discovery).

Each rank writes `<run.dir>/.targets/<run>-<rank>.json` and deletes it when it ends (docs/metrics.md). All
runs share one folder, since Prometheus allows a wildcard only in the last part of a path. It is hidden, so
that no run has its name. The file of a killed rank stays: its target is down, and an alert can fire. The
files hold no labels: a `run` label here would rename the metrics' own to `exported_run`.
"""

import json
import re
import socket
from pathlib import Path

from cmtrain.storage.records import replace_file


def write_target(run_path: Path, rank: int, host: str, port: int) -> Path:
    """Announce the address of `rank`, and return the file, which the caller deletes at the end.
    A `host` that means "all" becomes this machine's name. Raises OSError if the file cannot be written.
    """
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not listened at
        host = socket.gethostname()
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    path = run_path.parent / ".targets" / f"{run_path.name}-{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps([{"targets": [address], "labels": {}}]) + "\n")
    return path


def forget_ranks(run_path: Path, world_size: int) -> None:
    """Delete the files of ranks from `world_size` on: the run had more ranks when it was killed."""
    for path in run_path.parent.glob(".targets/*.json"):
        match = re.fullmatch(rf"{re.escape(run_path.name)}-(\d+)\.json", path.name)
        if match and int(match[1]) >= world_size:
            path.unlink(missing_ok=True)
