"""Check before training that all ranks fit together: code, configuration, run folder."""

import contextlib
import hashlib
import platform
import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import cmtrain
import pipelines
from cmtrain.config.schema import Config, flat
from cmtrain.processes.collectives import gather
from pipelines.spec import DataError

SHARED_FOLDER_SECONDS = 5.0  # for a file that one host wrote to appear on the others

# Keys that may differ between hosts without changing what is learned.
PER_HOST_KEYS = ("data.root", "data.cache_dir", "data.threads", "metrics.host", "metrics.port",
                 "metrics.allowed_hosts")  # fmt: skip


class Facts(NamedTuple):
    """Facts about one rank, for comparison."""

    host: str
    code: str
    config: dict[str, Any]
    run_dir: str = ""  # absolute
    sees_run_dir: bool = True  # whether it sees what rank 0 writes to its own


def check_ranks(group: Any, config: Config, run_path: Path) -> None:
    """Refuse ranks that do not fit together, over `group` (None: a single process).
    Raises DataError, on all ranks: other code, another configuration or another run folder.
    """
    if group is None:
        return
    folder = run_path.parent
    common = {key: value for key, value in flat(config).items() if key not in PER_HOST_KEYS}
    place = str(folder.absolute()), sees_run_dir(group, folder)
    mine = Facts(socket.gethostname(), version_of_code(), common, *place)
    if found := contradictions(gather(mine, group)):
        raise DataError(found[0])


def contradictions(facts: Sequence[Facts]) -> list[str]:
    """Return why ranks with these `facts` (by rank) cannot train together, the gravest reason first."""
    first, found = facts[0], []
    for rank, other in enumerate(facts):
        who, rank0 = f"rank {rank} on {other.host}", f"rank 0 on {first.host}"
        if other.code != first.code:
            found.append(f"{who} runs {other.code}, {rank0} {first.code}; install the same everywhere")
        if differing := [key for key, value in first.config.items() if other.config.get(key) != value]:
            key = differing[0]
            mine, theirs = first.config[key], other.config.get(key)
            found.append(f"{key} is {theirs} for {who}, {mine} for {rank0}; start all ranks alike")
        if not other.sees_run_dir:
            alias = f", which it knows as {other.run_dir}" if other.run_dir != first.run_dir else ""
            advice = "run.dir must be on a file system that all hosts share"
            found.append(f"{who} does not see what {rank0} writes to {first.run_dir}{alias}; {advice}")
    return found


def sees_run_dir(group: Any, folder: Path) -> bool:
    """Return whether this rank sees what rank 0 writes to `folder`. Raises DataError: it cannot write."""
    path = folder / f".token-{gather(secrets.token_hex(8), group)[0]}"
    is_first, made, failure = torch.distributed.get_rank(group) == 0, list[Path](), ""
    if is_first:
        try:
            made = [parent for parent in path.parents if not parent.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            failure = f"{folder}: cannot be written: {error.strerror}"
    if failure := gather(failure, group)[0]:
        raise DataError(failure)
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not (is_seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    gather(None, group)
    if is_first:
        with contextlib.suppress(OSError):
            path.unlink()
            for parent in made:
                parent.rmdir()
    return is_seen


def version_of_code() -> str:
    """Return versions and a digest of every source file of ours: equal on ranks that compute the same."""
    roots = [Path(str(cmtrain.__file__)).parent, Path(str(pipelines.__file__)).parent]
    digest = hashlib.sha256()
    for path in sorted(path for root in roots for path in root.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    torch_and_python = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"cmtrain {cmtrain.__version__} ({digest.hexdigest()[:12]}) with {torch_and_python}"
