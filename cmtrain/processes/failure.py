"""Record how each process of a run failed, and find the failure that caused the others. Needs no torch.

Each rank that fails writes `failed-rank<r>.json`. Most failures are consequences: when one rank is gone, the
others lose contact. A rank, the launcher or the next start picks the cause and writes it to status.json.
"""

import fcntl
import json
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cmtrain.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PREEMPTED
from cmtrain.storage.records import is_number, read_bytes, replace_file, retried, set_aside
from cmtrain.storage.run_folder import RunFolder, read_events, read_status, set_damaged_aside

# Batch systems send SIGUSR1 or SIGUSR2 before the time limit, closed terminals SIGHUP.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

RECORD_WAIT_SECONDS = 2.0  # longest wait for another process that records the cause
CRASH_LOOP = 3  # a step that fails this many times in a row will fail again: restarting wastes the machines


@dataclass(frozen=True)
class Failure:
    """Why one process ended."""

    rank: int
    world_size: int
    reason: str
    exit_code: int = EXIT_ERROR
    step: int | None = None  # optimizer steps done by then, None if unknown
    lost_contact: bool = False  # it only noticed that another rank was gone
    host: str = field(default_factory=socket.gethostname)  # "" if unknown
    time: float = field(default_factory=time.time)  # Unix time (seconds)

    def describe(self) -> str:
        """Return the reason, with rank and host if there are several ranks."""
        who = f"rank {self.rank}{f' on {self.host}' if self.host else ''}: "
        return self.reason if self.world_size == 1 else f"{who}{self.reason}"


def stop_signals() -> list[signal.Signals]:
    """Return STOP_SIGNALS, without a SIGHUP that nohup has switched off, and those that a library takes."""
    is_off = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    free = [number for number in STOP_SIGNALS if signal.getsignal(number) is not None]
    return [number for number in free if number != signal.SIGHUP or not is_off]


def stop_code(number: int) -> int:
    """Return the exit code after the stop signal `number`, 0 if it is none."""
    if number not in STOP_SIGNALS:
        return 0
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED


def failure_of_dead_process(rank: int, world_size: int, exit_code: int) -> Failure:
    """Return the Failure of a rank that could not report. A negative `exit_code` is a signal's number."""
    if exit_code >= 0:
        return Failure(rank, world_size, f"ended with exit code {exit_code}", exit_code=exit_code)
    number = signal.Signals(-exit_code)
    return Failure(rank, world_size, f"killed by {number.name}", exit_code=stop_code(number) or 128 + number)


def write_failure(run_path: Path, failure: Failure) -> None:
    """Write `failure` into the run folder, or nothing if that cannot be written."""
    path = run_path / f"failed-rank{failure.rank}.json"
    with suppress(OSError):
        retried(replace_file, path, json.dumps(asdict(failure)) + "\n", durable=True)


def read_failures(run_path: Path, since: float = 0) -> list[Failure]:
    """Return what ranks wrote after Unix time `since`: failures, and hangs that left only their stacks."""
    from pydantic import TypeAdapter  # not above: benchmarks of the model alone need none

    found, adapter = [], TypeAdapter(Failure)
    for path in run_path.glob("failed-rank*.json"):
        with suppress(OSError, ValueError):
            failure = adapter.validate_json(retried(read_bytes, path), strict=True)
            found += [failure] if is_number(failure.time) else []
    for path in run_path.glob("hang-rank*.txt"):
        with suppress(OSError, ValueError):  # a file of another name, or one that is gone
            rank, status = int(path.stem.removeprefix("hang-rank")), path.stat()
            if status.st_size and rank not in {failure.rank for failure in found}:
                reason = f"hung without an error report; see its stacks in {path.name}"
                found.append(Failure(rank, rank + 1, reason, host="", time=status.st_mtime))
    return [failure for failure in found if failure.time >= since]


def cause_of(failures: Iterable[Failure]) -> Failure | None:
    """Return the earliest failure that is not lost contact; its `step` comes from another one if unknown."""
    ordered = sorted(failures, key=lambda failure: (failure.lost_contact, failure.time))
    if not ordered:
        return None
    steps = [failure.step for failure in ordered if failure.step is not None]
    return replace(ordered[0], step=steps[0] if steps else None)


def record_cause(run_path: Path, *, since: float = 0, has_ended: bool = False) -> Failure | None:
    """Write the cause of a failure to status.json and events.jsonl, unless they have it, and return it.
    `since`: Unix time; earlier failures belong to another attempt. `has_ended`: the run cannot be "running".
    """
    with _one_at_a_time(run_path):
        status = read_status(run_path) or {}
        failures = read_failures(run_path, since)
        cause = cause_of(failures)
        if cause is None and has_ended and status.get("state") == "running":
            cause = Failure(0, 1, "ended without an error report: killed, or the machine went down", host="")
        if cause is None:
            return None
        # Ranks that fail together come here together. What the first of them recorded stays, unless it had
        # only lost contact or would end with another exit code.
        kind = (cause.lost_contact, cause.exit_code)
        equivalent = [f.describe() for f in (cause, *failures) if (f.lost_contact, f.exit_code) == kind]
        already_recorded = status.get("state") == "failed" and status.get("reason") in equivalent
        if not already_recorded and status.get("state") in (None, "running", "failed"):
            step = cause.step if cause.step is not None else status.get("step")
            fields = {"step": step, "exit_code": cause.exit_code, "reason": cause.describe()}
            with suppress(OSError):
                folder = RunFolder(run_path)
                folder.event("failed", **fields)
                folder.status(state="failed", retries=True, **fields)
        return cause


@contextmanager
def _one_at_a_time(run_path: Path) -> Iterator[None]:
    """Keep out other ranks, which lose contact and record it at the same time; for some seconds at most."""
    with ExitStack() as stack:
        with suppress(OSError):
            # A file that is never replaced; open for writing, because NFS locks no other.
            file = stack.enter_context(open(run_path / "events.jsonl", "r+b"))
            deadline = time.monotonic() + RECORD_WAIT_SECONDS
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.02)
        yield


def archive_previous_attempt(run_path: Path) -> tuple[str, ...]:
    """Record how the attempt before ended, and put its files away. For one process, before all others.
    Returns lines for the user: on damaged records, and on an end without a record. Raises OSError.
    """
    damaged = set_damaged_aside(run_path)
    was_running = (read_status(run_path) or {}).get("state") == "running"
    cause = record_cause(run_path, has_ended=True)
    for path in run_path.glob("failed-rank*.json"):
        retried(path.unlink, missing_ok=True)
    for path in run_path.glob("hang-rank*.txt"):
        if not path.is_file():  # to open a pipe would wait for its reader
            set_aside(path)
        elif path.stat().st_size:
            path.replace(path.with_stem(f"old-{path.stem}"))
    ended = (f"the attempt before failed: {cause.describe()}",) if was_running and cause else ()
    return (*damaged, *ended)


def crash_loop(run_path: Path) -> str:
    """Return why a restart is useless, or "": one step failed several times in a row since the launch."""
    steps = failed_steps(read_events(run_path))[-CRASH_LOOP:]
    # Ranks may notice the same failure one step apart.
    if len(steps) < CRASH_LOOP or max(steps) - min(steps) > 1:
        return ""
    reason = str((read_status(run_path) or {}).get("reason"))
    return f"failed {CRASH_LOOP} times in a row after step {steps[-1]}, not restarted any more: {reason}"


def failed_steps(events: Sequence[dict[str, Any]]) -> list[int]:
    """Return the steps after which the attempts of the last launch failed, from a run's `events`."""
    steps: list[int] = []
    failed: int | None = None
    for event in events:
        kind = event["event"]
        if kind == "failed" and is_number(event.get("step")):
            failed = event["step"]
        elif kind in ("started", "resumed"):
            if event.get("restarts", 0) == 0:  # a new launch
                steps = []
            elif failed is not None:
                steps.append(failed)
            failed = None
    return steps if failed is None else [*steps, failed]
