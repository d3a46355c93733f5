"""How a run failed: what every process knew of it, and which of that is the cause. Needs no torch.

Each rank that fails leaves `failed-rank<r>.json` in the run folder, which all ranks share, and nobody else writes that
file. Most of these are consequences: when one rank is gone, the others lose contact. Whoever is left last (a rank, the
parent, or the next start) picks the cause and says it in status.json.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cmtrain.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PREEMPTED
from cmtrain.storage.run_folder import RunFolder, read_events, read_status

# SIGUSR2 is what batch systems send before the time limit (SIGUSR1 clashes with NCCL's tooling), SIGHUP what is left of
# a closed terminal.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)

# A step that fails that many times in a row will fail again: restarting only wastes the machines.
CRASH_LOOP = 3


@dataclass(frozen=True)
class Failure:
    """Why one process ended.

    `step`: optimizer steps done by then, None if unknown. `lost_contact`: it only noticed that another one was gone.
    `host`: "" if unknown. `time`: Unix time (seconds).
    """

    rank: int
    world_size: int
    reason: str
    exit_code: int = EXIT_ERROR
    step: int | None = None
    lost_contact: bool = False
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)

    def said(self) -> str:
        """The reason, with rank and host where there are several ranks."""
        if self.world_size == 1:
            return self.reason
        return f"rank {self.rank}{f' on {self.host}' if self.host else ''}: {self.reason}"


def hang_path(run_path: Path, rank: int) -> Path:
    """Where a rank that hangs leaves its stacks."""
    return run_path / f"hang-rank{rank}.txt"


def death(rank: int, world_size: int, exit_code: int) -> Failure:
    """Of a process that cannot tell any more; `exit_code` as subprocess gives it, negative for a signal."""
    if exit_code >= 0:
        return Failure(rank, world_size, f"ended with exit code {exit_code}", exit_code=exit_code)
    number = signal.Signals(-exit_code)
    return Failure(rank, world_size, f"killed by {number.name}", exit_code=stop_code(number) or 128 + number)


def stop_code(number: int) -> int:
    """The exit code after the stop signal `number`, 0 if it is none."""
    if number not in STOP_SIGNALS:
        return 0
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED


def leave_word(run_path: Path, failure: Failure) -> None:
    """Leave `failure` where the other processes look for it, unless it is of the kind that makes writing fail."""
    path = run_path / f"failed-rank{failure.rank}.json"
    temporary = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        temporary.write_text(json.dumps(asdict(failure)) + "\n")
        temporary.replace(path)


def words_left(run_path: Path, since: float = 0) -> list[Failure]:
    """What the ranks left after Unix time `since`. A hang that nobody could tell of is known by its stacks."""
    found = [Failure(**json.loads(path.read_text())) for path in run_path.glob("failed-rank*.json")]
    for path in run_path.glob("hang-rank*.txt"):
        rank, status = int(path.stem.removeprefix("hang-rank")), path.stat()
        if status.st_size and rank not in {failure.rank for failure in found}:
            reason = f"hung without a word; {path.name} says where"
            found.append(Failure(rank, rank + 1, reason, host="", time=status.st_mtime))
    return [failure for failure in found if failure.time >= since]


def settle(run_path: Path) -> tuple[str, ...]:
    """Before a run goes on: say what became of the attempt before, and begin anew. For one process, before all others.

    Returns:
        A line for the user where the attempt before ended without saying so itself.
    """
    was_running = (read_status(run_path) or {}).get("state") == "running"
    cause = conclude(run_path, silent=True)
    for path in run_path.glob("failed-rank*.json"):
        path.unlink()
    for path in run_path.glob("hang-rank*.txt"):
        if path.stat().st_size:
            path.replace(path.with_stem(f"old-{path.stem}"))
    return (f"the attempt before failed: {cause.said()}",) if was_running and cause else ()


def cause_of(failures: Iterable[Failure]) -> Failure | None:
    """The first of those that did not merely lose contact; with the step that another one knew, if it did not."""
    ordered = sorted(failures, key=lambda failure: (failure.lost_contact, failure.time))
    if not ordered:
        return None
    steps = [failure.step for failure in ordered if failure.step is not None]
    return replace(ordered[0], step=steps[0] if steps else None)


def conclude(run_path: Path, *, since: float = 0, silent: bool = False) -> Failure | None:
    """Make status.json of a run that nobody works on any more tell what happened, if it does not yet.

    Args:
        since: Unix time; what was left before it belongs to an earlier attempt.
        silent: the caller knows that the run ended, so that "running" is wrong even where nobody left a word.

    Returns:
        The cause, None if there is nothing to tell.
    """
    status = read_status(run_path) or {}
    words = words_left(run_path, since)
    cause = cause_of(words)
    if cause is None and silent and status.get("state") == "running":
        cause = Failure(0, 1, "ended without a word: killed, or the machine went down", host="")
    reason = cause.said() if cause else ""
    # Ranks that fail together conclude together. What the first of them told stays, unless it had only lost contact or
    # would end with another exit code.
    as_good = {
        failure.said()
        for failure in words
        if cause and (failure.lost_contact, failure.exit_code) == (cause.lost_contact, cause.exit_code)
    }
    told = status.get("state") == "failed" and status.get("reason") in {reason, *as_good}
    if cause and not told and status.get("state") in ("running", "failed"):
        step = cause.step if cause.step is not None else status.get("step")
        with suppress(OSError):
            folder = RunFolder(run_path)
            folder.status(state="failed", step=step, exit_code=cause.exit_code, reason=reason)
            folder.event("failed", step=step, exit_code=cause.exit_code, reason=reason)
    return cause


def crash_loop(run_path: Path) -> str:
    """Why a restart of the run would be in vain, or "": one step failed several times in a row since its launch."""
    steps = failed_steps(read_events(run_path))[-CRASH_LOOP:]
    # Ranks may notice the same failure one step apart.
    if len(steps) < CRASH_LOOP or max(steps) - min(steps) > 1:
        return ""
    reason = str((read_status(run_path) or {}).get("reason"))
    return f"failed {CRASH_LOOP} times in a row after step {steps[-1]}, not restarted any more: {reason}"


def failed_steps(events: Sequence[dict[str, Any]]) -> list[int]:
    """The steps after which the attempts of this launch failed; `events` are those of the run folder."""
    steps: list[int] = []
    failed: int | None = None
    for event in reversed(events):
        if event["event"] == "failed" and failed is None:
            failed = event.get("step")
        if event["event"] in ("started", "resumed"):
            if failed is not None:
                steps.insert(0, failed)
            failed = None
            if event.get("restarts", 0) == 0:
                break
    return steps
