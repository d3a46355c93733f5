"""Time what guard, spike detection and metrics add to a step.

    python benchmarks/guard.py [--config FILE] [--steps N] [--rounds N] [--json FILE] [--SECTION.KEY VALUE]

Steps with and without them take turns on one model. On a machine that is not quiet, the ratio of two long
times still shows little about one percent, so the additions are timed alone as well. On a GPU that is an
upper bound: within a step the host runs ahead, and only the device's share counts. "save" is how long
training waits at a save, while the checkpoint is written in the background.
"""

import itertools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from cmtrain.cli.arguments import Parser, positive
from cmtrain.commands.bench.models import Setup
from cmtrain.commands.bench.timing import WARMUP_STEPS, Figures, Row, Rows, best_seconds, drain
from cmtrain.monitoring.console import write_result
from cmtrain.monitoring.metrics import TrainMetrics
from cmtrain.step.learner import Learner
from cmtrain.step.mixing import mix
from cmtrain.storage.checkpoint_writer import CheckpointWriter
from cmtrain.storage.finite import repair_or_reject
from cmtrain.training import build, loaders
from pipelines.spec import Batch

ALONE_REPEATS = 100
SAVES = 6
NUM_IMAGES, NUM_CLASSES = 1_281_167, 1000  # of a run that this could be


# In place of guard, step buffer and metrics: they do nothing.
NO_GUARD = SimpleNamespace(propose=lambda: None, commit_or_restore=lambda ok: ok, uncounted=nullcontext)
NO_BUFFER = SimpleNamespace(add=lambda loss, grad_norm, indices: None)
NO_METRICS = SimpleNamespace(count_step=lambda step, **numbers: None)


def time_guard(
    learner: Learner, batches: Iterator[Batch], *, lr: float, steps: int, rounds: int, log_every_steps: int
) -> Rows:
    """Time `rounds` turns of `steps` steps with the guard and without, then what the guard adds alone.

    Yields rows of `ms`, and of `percent` of a step without the guard. "without", "with": a step, median over
    the rounds; `percent` is the addition within a round. "alone", "log point": the addition to a step, and
    to a log point, spread over `log_every_steps` steps. "mixing", "ema": those parts of a step, alone.
    "together": all that was timed alone. "save": the wait at a save, in percent of a step's wall time right
    before. Raises RuntimeError: on a GPU, a step synchronised with the host.
    """
    device = learner.accelerator.device
    metrics = TrainMetrics("bench", learner.accelerator.process_index)
    sides: dict[str, Any] = {
        "with": (learner.guard, learner.buffer, metrics),
        "without": (NO_GUARD, NO_BUFFER, NO_METRICS),
    }
    numbers = itertools.count()
    counted: dict[str, Any] = {"num_bytes": 0, "seconds": 0.1, "wait_seconds": 0.0}

    def turn(side: str, num_steps: int) -> float:
        """Milliseconds of a step."""
        learner.guard, learner.buffer, side_metrics = sides[side]

        def all_steps() -> None:
            for step in itertools.islice(numbers, num_steps):
                images, phases = learner.step(batches, step, lr), learner.phases.pop_finished()
                side_metrics.count_step(step, num_images=images, phases=phases, **counted)

        return _milliseconds(all_steps, device) / num_steps

    def alone(work: Callable[[], None]) -> float:
        return statistics.median(_milliseconds(work, device) for _ in range(ALONE_REPEATS))

    # Whole steps, in turns
    yield f"steps with the guard and without: {rounds} rounds of {steps} each", {}
    for side in sides:
        turn(side, WARMUP_STEPS)
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in list(sides) if number % 2 else reversed(sides):
            taken[side].append(turn(side, steps))
    learner.guard, learner.buffer, _ = sides["with"]
    without_ms = statistics.median(taken["without"])
    added = [100 * (on / off - 1) for on, off in zip(taken["with"], taken["without"], strict=True)]
    with_row = {"ms": statistics.median(taken["with"]), "percent": statistics.median(added)}
    yield "without", {"ms": without_ms}
    yield "with", with_row | {"percent_min": min(added), "percent_max": max(added)}

    def row(ms: float, spread_over: int = 1) -> Row:
        return {"ms": ms, "percent": 100 * ms / spread_over / without_ms}

    # Guard, step buffer and metrics alone: of a step, and of a log point
    yield "guard, metrics, mixing and EMA alone", {}
    scalar = torch.ones((), device=device)

    def added_to_a_step() -> None:
        for _ in range(learner.accumulation):
            learner.guard.propose()
        learner.guard.commit_or_restore(torch.isfinite(scalar))
        learner.buffer.add(scalar, scalar, learner.last_indices)
        metrics.count_step(1, num_images=1, phases=(), **counted)

    alone_ms = alone(added_to_a_step)
    learner.buffer.clear()
    for _ in range(log_every_steps):
        added_to_a_step()
    drain(device)
    begin = time.perf_counter()
    metrics.report(learner.report(next(numbers), 0, lr, reset=True))
    log_point_ms = 1000 * (time.perf_counter() - begin)

    yield "alone", row(alone_ms)
    yield "log point", row(log_point_ms, log_every_steps)

    # Mixing and EMA alone
    images, labels, _ = next(batches)

    def mix_a_step() -> None:
        for _ in range(learner.accumulation):
            mix(images, labels, learner.mixing, (0, 0, 0))

    parts = {"mixing": alone(mix_a_step)}
    if ema := learner.ema:
        parts["ema"] = alone(lambda: ema.update(torch.isfinite(scalar), 0))
    for name, ms in parts.items():
        yield name, row(ms)
    yield "together", row(alone_ms + log_point_ms / log_every_steps + sum(parts.values()))

    yield "saves", {}
    begin = time.perf_counter()
    turn("with", steps)
    wall_ms = 1000 * (time.perf_counter() - begin) / steps
    save_ms = _time_saves(learner)
    yield "save", {"ms": save_ms, "percent": 100 * save_ms / wall_ms}


def _time_saves(learner: Learner) -> float:
    """Return the milliseconds that training waits for a save: check of the weights, copy for the writer."""
    waits = []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder))
        for step in range(SAVES):
            drain(learner.accelerator.device)
            begin = time.perf_counter()
            repair_or_reject(**learner.weights)
            writer.save(step, learner.state_dict(), {}, keep=1, last=False)
            waits.append(1000 * (time.perf_counter() - begin))
            writer.wait(None)
    return statistics.median(waits[1:])  # the first one allocates the copy


def verdict(figures: Figures) -> str:
    """Return the sentence below the table."""
    steps, save = figures["with"], figures["save"]["percent"]
    alone = figures["alone"]["percent"] + figures["log point"]["percent"]
    low, high = steps["percent_min"], steps["percent_max"]
    return (
        f"guard, spike detection and metrics add {steps['percent']:.2f} % to a step, the median of rounds "
        f"from {low:.2f} to {high:.2f} %; timed alone they are {alone:.2f} % of a step, with mixing and EMA "
        f"{figures['together']['percent']:.2f} %; a save takes {save:.1f} % of a step"
    )


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Make every wait of the host for a GPU an error, until the end of the block."""
    try:
        with warnings.catch_warnings():  # torch warns once that the mode is a prototype, after setting it
            warnings.filterwarnings("ignore", "Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _milliseconds(work: Callable[[], None], device: torch.device) -> float:
    """Return the device time of `work`. On a GPU, any synchronisation inside of it is an error.

    On a CPU it is the time of this thread, which takes part in all of a step: other processes do not count.
    """
    if device.type != "cuda":
        return 1000 * best_seconds(work, 1, time.thread_time)
    drain(device)
    begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with no_host_sync():
        begins.record()
        work()
        ends.record()
    ends.synchronize()
    return begins.elapsed_time(ends)


def main() -> None:
    parser = Parser("guard", __doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="steps of a turn")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="turns of each side")
    parser.add_argument("--json", metavar="FILE")
    options, resolved = parser.parse_with_config(sys.argv[1:], "configs/demo.yaml")
    config = resolved.config
    accelerator = build.make_accelerator(config.train.precision)
    loaders.split_threads(config, accelerator.device)
    schedule = build.plan_steps(config, NUM_IMAGES, accelerator.num_processes)
    setup = Setup(config, accelerator, schedule, NUM_CLASSES, options.steps, options.rounds)
    learner, every = setup.make_learner(config), config.train.log_every_steps
    how = {"steps": options.steps, "rounds": options.rounds, "log_every_steps": every}
    figures: Figures = {}
    for name, row in time_guard(learner, setup.synthetic_batches(), lr=config.optim.lr, **how):
        print(name, *(f"{key} {value:.3g}" for key, value in row.items()), sep="  ", flush=True)
        if row:
            figures[name] = row
            write_result({"device": str(accelerator.device), "figures": figures}, options.json)
    print(verdict(figures))


if __name__ == "__main__":
    main()
