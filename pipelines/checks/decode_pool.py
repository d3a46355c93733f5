"""Test-decode many files in worker processes; a file that crashes its decoder ends one worker only."""

import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines.checks import decode_one
from pipelines.checks.decode_one import CheckResult, Fault, patiently
from pipelines.spec import DataError, os_errors_in_one_line

_PROGRAM = Path(decode_one.__file__)
NUM_TRIES = 3  # of a process that something else has killed: the kernel for want of memory, or a person
_SENT_SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT
_BLOCK = 4096  # files handed to the threads at a time: a future takes more memory than a path


class DecodePool:
    """At most `processes` (None: one per core) that decode images, started when needed."""

    def __init__(self, processes: int | None) -> None:
        self.processes = processes or len(os.sched_getaffinity(0))
        self._threads = ThreadPoolExecutor(self.processes)
        # Last in, first out: a single file starts no second process.
        self._idle: queue.LifoQueue[subprocess.Popen[str] | None] = queue.LifoQueue()
        for _ in range(self.processes):
            self._idle.put(None)

    def check(self, paths: Sequence[str]) -> Iterator[CheckResult]:
        """Yield one result per path, in order.
        Raises DataError when no process can be started, or the machine cannot read a file or decode it.
        """
        for begin in range(0, len(paths), _BLOCK):
            yield from self._threads.map(self._check, paths[begin : begin + _BLOCK])

    def close(self) -> None:
        """End the processes; a later check starts new ones."""
        for process in [self._idle.get() for _ in range(self.processes)]:
            if process is not None:
                _end(process)
            self._idle.put(None)

    def _check(self, path: str) -> CheckResult:
        process = self._idle.get()
        try:
            for _ in range(NUM_TRIES):
                process = process or self._start()
                if (result := _ask(process, path)) is not None:
                    return result
                exit_code = _end(process)
                process = None
                if -exit_code not in _SENT_SIGNALS:
                    return CheckResult(0, 0, _fault_of_exit(exit_code))
        finally:
            self._idle.put(process)
        name = signal.Signals(-exit_code).name
        killed = f"its decoder was killed {NUM_TRIES} times ({name}), for want of memory perhaps"
        raise DataError(f"{path}: {killed}; that says nothing about the file, so it was not left out")

    def _start(self) -> subprocess.Popen[str]:
        # -P: the program's folder must not be importable. What decoders print on stderr is of no use.
        command = [sys.executable, "-P", str(_PROGRAM)]
        with os_errors_in_one_line(sys.executable):
            process = patiently(lambda: subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            ))  # fmt: skip
        assert process.stdout is not None
        if process.stdout.readline() != f'"{decode_one.READY}"\n':
            raise DataError(f"{sys.executable} {_PROGRAM}: cannot be started (exit code {_end(process)})")
        return process


def _ask(process: subprocess.Popen[str], path: str) -> CheckResult | None:
    """Return the worker's answer, None when it ends before it answers. Raises DataError as `check`."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(path) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    answer = process.stdout.readline()
    if not answer.endswith("\n"):
        return None
    found = json.loads(answer)
    if len(found) == 2:  # the machine's errno and its text
        raise DataError.of(OSError(*found), path)
    height, width, fault, *rotated = found
    return CheckResult(height, width, fault and Fault(*fault), *rotated)


def _end(process: subprocess.Popen[str]) -> int:
    try:
        process.communicate(timeout=decode_one.MAX_SECONDS)
    except (BrokenPipeError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
    return process.returncode


def _fault_of_exit(exit_code: int) -> Fault:
    if exit_code == -signal.SIGALRM:
        return Fault("other", f"takes more than {decode_one.MAX_SECONDS} seconds to decode")
    if exit_code < 0:
        return Fault("other", f"kills the decoder ({signal.Signals(-exit_code).name})")
    return Fault("other", f"ends the decoder (exit code {exit_code})")
