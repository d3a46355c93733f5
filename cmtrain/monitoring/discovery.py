"""Where Prometheus finds the ranks of running runs: its file-based service discovery.

Each rank writes a file of its own, `<run.dir>/.targets/<run>-<rank>.json`, and takes it away when it ends. One folder
for all runs, because Prometheus allows a wildcard in the last part of a path only (2.42 refuses `runs/*/targets.json`,
although promtool takes it); a hidden one, because no run can have its name. One file a rank, because a rank alone knows
which port it got, and because the file of a rank that was killed should stay: then its target is down, and an alert can
say so. Labels are in the metrics: a `run` label here would rename theirs to `exported_run`.

    scrape_configs:
      - job_name: cmtrain
        file_sd_configs: [{files: [/path/to/runs/.targets/*.json]}]
"""

import json
import re
import socket
from pathlib import Path

from cmtrain.storage.atomic import replace_file


def write_target(run_path: Path, rank: int, host: str, port: int) -> Path:
    """Announce what `rank` of the run in `run_path` serves at `host`, as it was configured, and `port`.

    Returns:
        The file, which the caller deletes at the end.

    Raises:
        OSError: it cannot be written.
    """
    if host in ("0.0.0.0", "::"):  # noqa: S104 - every address of this machine, so its name will do
        host = socket.gethostname()
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    path = _file(run_path, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps([{"targets": [address], "labels": {}}]) + "\n")
    return path


def read_target(run_path: Path, rank: int) -> str | None:
    """Where `rank` of the run in `run_path` serves, as `host:port`; None if that is not known here."""
    try:
        (group,) = json.loads(_file(run_path, rank).read_text())
        return str(group["targets"][0])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def forget_ranks(run_path: Path, world_size: int) -> None:
    """Delete what ranks from `world_size` on left behind: the run had more of them when it was killed."""
    for path in _folder(run_path).glob("*.json"):
        match = re.fullmatch(rf"{re.escape(run_path.name)}-(\d+)\.json", path.name)
        if match and int(match[1]) >= world_size:
            path.unlink(missing_ok=True)


def _file(run_path: Path, rank: int) -> Path:
    return _folder(run_path) / f"{run_path.name}-{rank}.json"


def _folder(run_path: Path) -> Path:
    return run_path.parent / ".targets"
