"""Compare the step times of a training run in a storm of scrapers with those without: p50 and p99.

    python benchmarks/storm.py [--rounds 6] [--json FILE]

The run is a subprocess, a tiny CMT on a CPU: about 50 steps a second, faster than any recipe, so that a
delay shows. The clients are another one: 8 that scrape as fast as they can, and 500 connections that never
finish their request. Rounds of both sides alternate. The steps of all rounds are pooled, because a machine's
own hiccups are in both.
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
    "data.root": "demo:digits", "run.name": "storm", "data.threads": 1, "metrics.enabled": "true",
    "train.precision": "fp32", "train.global_batch_size": 32, "train.max_batch_per_gpu": 32,
    "train.log_every_steps": 1, "schedule.epochs": 4000, "evaluate.every_epochs": 4000,
    "checkpoint.every_epochs": 4000,
}  # fmt: skip


def step_times(log: Path) -> list[float]:
    """Return the Unix time of each logged step; a half-written last line is left out."""
    lines = log.read_text().splitlines(keepends=True)
    return [json.loads(line)["time"] for line in lines if line.endswith("\n")]


def measure(log: Path, port: int, *, storm: bool) -> list[float]:
    """Return the seconds of each step of one side of a round."""
    with contextlib.ExitStack() as stack:
        clients = None
        if storm:
            script = str(ROOT / "tests" / "helpers" / "hammer.py")
            hammer = [sys.executable, script, str(port), str(CLIENTS), str(SECONDS + 2)]
            clients = stack.enter_context(subprocess.Popen(hammer, stdout=subprocess.DEVNULL))
            for _ in range(HALF_OPEN):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
                connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        begin = time.time()
        time.sleep(SECONDS)
        times = [t for t in step_times(log) if begin <= t <= time.time()]
        if clients:
            clients.wait()
    time.sleep(0.5)
    return [after - before for before, after in itertools.pairwise(times)]


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
                        log_text = Path(err.name).read_text()
                        sys.exit(f"{log_text}\nthe run ended with exit code {run.returncode}")
                    time.sleep(0.1)
                status = json.loads((log.parent / "status.json").read_text())
                port = int(status["metrics_url"].split(":")[2].split("/")[0])
                taken: dict[str, list[float]] = {"alone": [], "storm": []}
                for number in range(arguments.rounds):
                    for side in ("alone", "storm") if number % 2 else ("storm", "alone"):
                        taken[side] += measure(log, port, storm=side == "storm")
            finally:
                run.terminate()
                run.wait()
    figures = {}
    for side, values in taken.items():
        p50, p99 = statistics.median(values), statistics.quantiles(values, n=100)[98]
        figures[side] = {
            "steps": len(values),
            "p50_ms": round(1000 * p50, 2),
            "p99_ms": round(1000 * p99, 2),
        }
    for quantile in ("p50", "p99"):
        ratio = figures["storm"][f"{quantile}_ms"] / figures["alone"][f"{quantile}_ms"]
        figures[f"{quantile}_ratio"] = round(ratio, 3)
    print(json.dumps(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
