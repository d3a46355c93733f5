"""What a storm of scrapers does to the steps of a training run: p99 of the step time in it and alone.

    python benchmarks/storm.py [--rounds 6] [--json FILE]

The run is a subprocess, a tiny CMT on a CPU: some 50 steps a second, faster than any recipe, so that a delay shows. The
clients are another one: 8 that scrape as fast as they can, and 500 connections that never finish their request. Rounds
of both sides alternate; the steps of all rounds are pooled, because a machine's own hiccups are in both.
"""

import argparse
import contextlib
import itertools
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
CLIENTS, HALF_OPEN = 8, 500
SECONDS = 4.0  # each side of a round
OVERRIDES = {
    "data.root": "demo:digits", "run.name": "storm", "data.threads": 1, "train.precision": "fp32",
    "train.global_batch_size": 32, "train.max_batch_per_gpu": 32, "train.log_every_steps": 1,
    "schedule.epochs": 4000, "evaluate.every_epochs": 4000, "checkpoint.every_epochs": 4000, "metrics.enabled": "true",
}  # fmt: skip


def step_times(log: Path) -> list[float]:
    """When each step was logged, seconds since the epoch; a last line that is half written is left out."""
    return [
        json.loads(line)["time"] for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")
    ]


def laps(log: Path, begin: float, end: float) -> list[float]:
    """Seconds of each step between two times."""
    times = [t for t in step_times(log) if begin <= t <= end]
    return [after - before for before, after in itertools.pairwise(times)]


def calm(log: Path, port: int) -> list[float]:
    begin = time.time()
    time.sleep(SECONDS)
    return laps(log, begin, time.time())


def storm(log: Path, port: int) -> list[float]:
    hammer = [
        sys.executable,
        str(ROOT / "tests" / "helpers" / "hammer.py"),
        str(port),
        str(CLIENTS),
        str(SECONDS + 2),
    ]
    with contextlib.ExitStack() as stack:
        clients = stack.enter_context(subprocess.Popen(hammer, stdout=subprocess.DEVNULL))
        for _ in range(HALF_OPEN):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        begin = time.time()
        time.sleep(SECONDS)
        measured = laps(log, begin, time.time())
        clients.wait()
    time.sleep(0.5)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--{key}={value}" for key, value in (OVERRIDES | {"run.dir": folder}).items()]
        command = [
            sys.executable,
            "-m",
            "cmtrain",
            "--config",
            str(ROOT / "configs" / "demo.yaml"),
            *options,
        ]
        with open(Path(folder) / "stderr.txt", "w+") as err:
            run = subprocess.Popen(command, stderr=err, stdout=subprocess.DEVNULL)
            log = Path(folder) / "storm" / "log.jsonl"
            try:
                while not log.exists() or len(step_times(log)) < 100:
                    if run.poll() is not None:
                        sys.exit(
                            f"{Path(err.name).read_text()}\nthe run ended with exit code {run.returncode}"
                        )
                    time.sleep(0.1)
                status = json.loads((log.parent / "status.json").read_text())
                port = int(status["metrics_url"].split(":")[2].split("/")[0])
                taken: dict[str, list[float]] = {"alone": [], "storm": []}
                for number in range(arguments.rounds):
                    for side in ("alone", "storm") if number % 2 else ("storm", "alone"):
                        taken[side] += (storm if side == "storm" else calm)(log, port)
            finally:
                run.terminate()
                run.wait()
    figures: dict[str, float | dict[str, float]] = {
        side: {
            "steps": len(values),
            "p50_ms": round(1000 * statistics.median(values), 2),
            "p99_ms": round(1000 * statistics.quantiles(values, n=100)[98], 2),
        }
        for side, values in taken.items()
    }
    for quantile in ("p50", "p99"):
        figures[f"{quantile}_ratio"] = round(
            figures["storm"][f"{quantile}_ms"] / figures["alone"][f"{quantile}_ms"], 3
        )
    print(json.dumps(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
