"""`cmtrain bench --what guard`: what guard, spike detection and metrics add to a step, beside the same step without.

Both sides take turns on one model in one process, so that what else the machine does hits both. Where it is not quiet,
the ratio of two long times still says little about one percent; so what is added is timed alone, too. On a GPU that is
an upper bound: within a step the host runs ahead and only the device's share counts. Beside it stands what the step
that saves waits for, while the checkpoint is written in the background.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmtrain.monitoring.metrics import TrainMetrics
from cmtrain.step.learner import Learner
from cmtrain.step.mixing import mix
from cmtrain.storage.checkpoint_writer import CheckpointWriter
from cmtrain.storage.finite import repair_or_reject
from pipelines.spec import Batch

WARMUP_STEPS = 3
ALONE_REPEATS = 100
SAVES = 6

Figures = dict[str, dict[str, float]]


class _Without:
    """Stands in for the guard, the window and the metrics of a step, and does nothing."""

    def propose(self) -> None:
        pass

    def settle(self, ok: Tensor) -> Tensor:
        return ok

    def add(self, loss: Tensor, grad_norm: Tensor, indices: list[Tensor]) -> None:
        pass

    def count_step(self, step: int, **numbers: object) -> None:
        pass


def time_guard(
    learner: Learner, batches: Iterator[Batch], *, lr: float, steps: int, rounds: int, log_every_steps: int
) -> Figures:
    """Time `rounds` turns of `steps` steps with the guard and as many without, then what the guard adds alone.

    Returns:
        Rows of `ms` and of `percent` of a step without the guard. "without", "with": a step, median over the rounds;
        `percent` is what it adds to the other side of its round, with its range over the rounds. "alone": what is
        added to a step. "log point": what is added to a log point, its `percent` spread over `log_every_steps` steps.
        "mixing", "ema" (if there is one): those parts of a step, alone. "together": all that was timed alone.
        "save": how long training waits at a save, of a step's wall time right before.

    Raises:
        RuntimeError: on a GPU, a step synchronised with the host.
    """
    device = learner.accelerator.device
    metrics = TrainMetrics("bench", learner.accelerator.process_index)
    sides: dict[str, Any] = {
        "with": (learner.guard, learner.window, metrics),
        "without": (_Without(), _Without(), _Without()),
    }
    done = itertools.count()

    def run(side: str, num_steps: int) -> float:
        learner.guard, learner.window, counted = sides[side]

        def all_steps() -> None:
            for step in itertools.islice(done, num_steps):
                num_images = learner.step(batches, step, lr)
                counted.count_step(
                    step,
                    num_images=num_images,
                    num_bytes=0,
                    seconds=0.1,
                    wait_seconds=0.0,
                    phases=learner.phases.take(),
                )

        return _milliseconds(all_steps, device) / num_steps

    for side in sides:
        run(side, WARMUP_STEPS)
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds):
        for side in list(sides) if turn % 2 else reversed(sides):
            taken[side].append(run(side, steps))
    learner.guard, learner.window, _ = sides["with"]

    def added_to_a_step() -> None:
        for _ in range(learner.accumulation):
            learner.guard.propose()
        learner.guard.settle(torch.isfinite(one))
        learner.window.add(one, one, learner.last_indices)
        metrics.count_step(1, num_images=1, num_bytes=0, seconds=0.1, wait_seconds=0.0, phases=())

    one = torch.ones((), device=device)
    alone_ms = statistics.median(_milliseconds(added_to_a_step, device) for _ in range(ALONE_REPEATS))
    learner.window.clear()
    for _ in range(log_every_steps):
        added_to_a_step()
    _drain(device)
    begin = time.perf_counter()
    metrics.report(learner.report(next(done), 0, lr, reset=True))
    log_point_ms = 1000 * (time.perf_counter() - begin)

    images, labels, _ = next(batches)

    def mix_a_step() -> None:
        for _ in range(learner.accumulation):
            mix(images, labels, learner.mixing, (0, 0, 0))

    parts: dict[str, Callable[[], None]] = {"mixing": mix_a_step}
    if ema := learner.ema:
        parts["ema"] = lambda: ema.update(torch.isfinite(one))
    parts_ms = {
        name: statistics.median(_milliseconds(work, device) for _ in range(ALONE_REPEATS))
        for name, work in parts.items()
    }

    begin = time.perf_counter()
    run("with", steps)
    wall_ms = 1000 * (time.perf_counter() - begin) / steps
    save_ms = _time_saves(learner)

    added = [100 * (on / off - 1) for on, off in zip(taken["with"], taken["without"], strict=True)]
    without_ms = statistics.median(taken["without"])
    together_ms = alone_ms + log_point_ms / log_every_steps + sum(parts_ms.values())
    return {
        "without": {"ms": without_ms},
        "with": {
            "ms": statistics.median(taken["with"]),
            "percent": statistics.median(added),
            "percent_min": min(added),
            "percent_max": max(added),
        },
        "alone": {"ms": alone_ms, "percent": 100 * alone_ms / without_ms},
        "log point": {"ms": log_point_ms, "percent": 100 * log_point_ms / log_every_steps / without_ms},
        **{name: {"ms": ms, "percent": 100 * ms / without_ms} for name, ms in parts_ms.items()},
        "together": {"ms": together_ms, "percent": 100 * together_ms / without_ms},
        "save": {"ms": save_ms, "percent": 100 * save_ms / wall_ms},
    }


def _time_saves(learner: Learner) -> float:
    """Milliseconds that training waits for a save: the look at the weights, and the copy for the writer."""
    waits = []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder))
        for step in range(SAVES):
            _drain(learner.accelerator.device)
            begin = time.perf_counter()
            repair_or_reject(**learner.weights)
            writer.save(step, learner.state_dict(), {}, keep=1, last=False)
            waits.append(1000 * (time.perf_counter() - begin))
            writer.wait(None)
    return statistics.median(waits[1:])  # the first one allocates the copy


def verdict(figures: Figures) -> str:
    both, alone = figures["with"], figures["alone"]["percent"] + figures["log point"]["percent"]
    save = figures["save"]["percent"]
    return (
        f"guard, spike detection and metrics add {both['percent']:.2f} % to a step, the median of rounds from "
        f"{both['percent_min']:.2f} to {both['percent_max']:.2f} %; timed alone they are {alone:.2f} % of one, "
        f"with mixing and EMA {figures['together']['percent']:.2f} %; "
        f"a save takes {save:.1f} % of a step"
    )


def _milliseconds(work: Callable[[], None], device: torch.device) -> float:
    """How long `work` takes on the device; on a GPU by events, and any synchronisation inside of it is an error.

    On a CPU, the time of this thread, which takes part in all of a step: other processes are not counted.
    """
    _drain(device)
    if device.type != "cuda":
        begin = time.thread_time()
        work()
        return 1000 * (time.thread_time() - begin)
    begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        begins.record()
        work()
        ends.record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ends.synchronize()
    return begins.elapsed_time(ends)


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
