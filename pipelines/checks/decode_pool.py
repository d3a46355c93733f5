"""Opinions on many image files, each formed in a process that the file may kill without harm."""

from __future__ import annotations

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
from pipelines.checks.decode_one import Verdict
from pipelines.spec import DataError

_PROGRAM = Path(decode_one.__file__)
_BLOCK = 4096  # files handed to the threads at a time: a future takes more memory than a path


class Judges:
    """A pool of `judge.py` processes, started when they are needed.

    Args:
        processes: at most so many; None is one per core.
        decode: whether to decode whole images or to read their headers only.
    """

    def __init__(self, processes: int | None, *, decode: bool) -> None:
        self.processes = processes or len(os.sched_getaffinity(0))
        self._task = "decode" if decode else "header"
        self._threads = ThreadPoolExecutor(self.processes)
        # Last in, first out: a single question starts no second process.
        self._idle: queue.LifoQueue[subprocess.Popen[str] | None] = queue.LifoQueue()
        for _ in range(self.processes):
            self._idle.put(None)

    def verdicts(self, paths: Sequence[str]) -> Iterator[Verdict]:
        """One verdict a path, in order. Raises DataError when no process can be started."""
        for begin in range(0, len(paths), _BLOCK):
            yield from self._threads.map(self._judge, paths[begin : begin + _BLOCK])

    def close(self) -> None:
        """Ends the processes; a later question starts new ones."""
        everyone = [self._idle.get() for _ in range(self.processes)]
        for process in everyone:
            if process is not None:
                _end(process)
            self._idle.put(None)

    def _judge(self, path: str) -> Verdict:
        process = self._idle.get()
        try:
            process = process or self._start()
            verdict = _ask(process, path)
            if verdict is None:
                verdict = Verdict(0, 0, _last_words(_end(process)))
                process = None
            return verdict
        finally:
            self._idle.put(process)

    def _start(self) -> subprocess.Popen[str]:
        # -P: the folder of the program is no place to import from. What decoders print tells nobody anything.
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", str(_PROGRAM), self._task],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        if process.stdout.readline() != f'"{decode_one.READY}"\n':
            raise DataError(f"{sys.executable} {_PROGRAM}: cannot be started (exit code {_end(process)})")
        return process


def _ask(process: subprocess.Popen[str], path: str) -> Verdict | None:
    """None when the process does not live to answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(path) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    answer = process.stdout.readline()
    return Verdict(*json.loads(answer)) if answer.endswith("\n") else None


def _end(process: subprocess.Popen[str]) -> int:
    try:
        process.communicate(timeout=decode_one.MAX_SECONDS)
    except (BrokenPipeError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
    return process.returncode


def _last_words(exit_code: int) -> str:
    if exit_code == -signal.SIGALRM:
        return f"takes more than {decode_one.MAX_SECONDS} seconds to decode"
    if exit_code < 0:
        return f"kills the decoder ({signal.Signals(-exit_code).name})"
    return f"ends the decoder (exit code {exit_code})"
