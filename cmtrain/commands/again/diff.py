"""Find the first step at which two runs differ, and in what: by their records, then by taking steps again.

Records name a step no finer than log points and checkpoints. So both runs go on from the last checkpoint in
which they agree, step by step beside one another, until something that a step makes is another one.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmtrain.commands.again.replay import Again, Marks, digest, digests, tensors_in
from cmtrain.commands.again.verify import retake
from cmtrain.errors import EXIT_DONE, EXIT_EXPECTATION, ConfigError
from cmtrain.monitoring.console import print_result
from cmtrain.monitoring.report.headline import environment_of
from cmtrain.storage.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint, read_manifest
from cmtrain.storage.run_folder import find_run
from cmtrain.storage.run_record import RunRecord, read_run
from cmtrain.storage.state_file import CheckpointError
from pipelines.progress import tracked
from pipelines.spec import DataError, os_errors_in_one_line, print_lines

OF_THE_MACHINE = ("time", "images_per_second")  # columns of the log, and those that end in _ratio
OF_A_CHECKPOINT = ("fingerprint", "val_fingerprint", "micro_batch_size")
SHOWN = 12  # settings that differ
# A process has one module of a name, and accelerate one precision.
ALIKE = ("run.imports", "train.precision")


@os_errors_in_one_line()
def diff(places: Sequence[str], *, as_json: bool = False) -> int:
    """Compare two runs. Prints what differs in their settings, the last step at which their records agree,
    and the first at which a step makes something else, with what that is: learning rate, samples, pixels,
    the output of a layer, a gradient, a weight. Returns the exit code: 0, or 5 where they differ. Raises
    DataError: no run. ConfigError: one run twice; as training.
    """
    a, b = runs = [find_run(place, trained=False)[0] for place in places]
    if a.samefile(b):
        raise ConfigError(f"{places[0]} and {places[1]} are the same run")
    records = [read_run(run) for run in runs]
    settings = _settings(records)
    print_lines(*settings[:SHOWN], *[f"... and {len(settings) - SHOWN} more"][: len(settings) > SHOWN])
    agreed, differed, what = _recorded(records)
    print_lines(what)
    found: dict[str, Any] = {"settings": settings, "agree_until": agreed, "differ_at": differed}
    if differed:
        apart = [key for key in ALIKE if records[0].config.get(key) != records[1].config.get(key)]
        step, cause = None, f"{' and '.join(apart)} differ, so one process cannot take the steps of both"
        if not apart:
            step, cause = _first_difference(runs, agreed, differed)
        print_lines(f"first difference: step {step}: {cause}" if step else cause)
        found |= {"first_step": step, "cause": cause}
    print_result(found, asked=as_json)
    return EXIT_EXPECTATION if differed else EXIT_DONE


def _settings(records: Sequence[RunRecord]) -> list[str]:
    """Return a line for each setting, package and kind of data that is not the same in both runs."""
    tables: list[dict[str, Any]] = []
    for record in records:
        table = {key: value for key, value in record.config.items() if key not in ("run.name", "run.dir")}
        table |= {f"{key} (environment)": value for key, value in environment_of(record).items()}
        for step in checkpoint_steps(record.path / "checkpoints")[-1:]:
            with contextlib.suppress(CheckpointError):
                meta = read_manifest(checkpoint_path(record.path / "checkpoints", step))[1]
                table |= {f"{key} (checkpoint)": meta.get(key) for key in OF_A_CHECKPOINT}
        tables.append(table)
    a, b = tables
    return [f"{key}: {a.get(key)} in A, {b.get(key)} in B" for key in a | b if a.get(key) != b.get(key)]


def _recorded(records: Sequence[RunRecord]) -> tuple[int, int | None, str]:
    """Return the last common checkpoint that is equal (0: none), the first log point or checkpoint that is
    not (None: all are), and a line about both.
    """
    logs, roots = [record.log for record in records], [record.path / "checkpoints" for record in records]
    common, *places = np.intersect1d(logs[0]["step"], logs[1]["step"], return_indices=True)
    differed, what = None, f"all {len(common)} common log points are equal"
    names = [name for name in logs[0] if name in logs[1] and not name.endswith("_ratio")]
    for name in sorted({*names} - {*OF_THE_MACHINE}, key=names.index):
        a, b = (log[name][place] for log, place in zip(logs, places, strict=True))
        wrong = np.flatnonzero((a != b) & ~(np.isnan(a) & np.isnan(b)))
        if len(wrong) and (differed is None or common[wrong[0]] < differed):
            differed = int(common[wrong[0]])
            what = f"{name} is {a[wrong[0]]} in A and {b[wrong[0]]} in B at step {differed}"
    agreed, count = 0, 0
    for step in sorted({*checkpoint_steps(roots[0])} & {*checkpoint_steps(roots[1])}):
        if differed is not None and step >= differed:
            break
        mine, theirs = (_digests(root, step) for root in roots)
        if different := [name for name in mine | theirs if mine.get(name) != theirs.get(name)]:
            more = f" and {len(different) - 1} more tensors" if different[1:] else ""
            differed, what = step, f"{different[0]}{more} differ in the checkpoint of step {step}"
            break
        agreed, count = step, count + 1
    if not (len(common) or count or differed):
        raise DataError(f"{records[0].path} and {records[1].path}: no log point and no checkpoint in common")
    return agreed, differed, f"{what}; {count} common checkpoints{' before' if differed else ''} are equal"


def _digests(root: Path, step: int) -> dict[str, str]:
    try:
        return digests(tensors_in(load_checkpoint(checkpoint_path(root, step)).state))
    except CheckpointError as error:
        return {str(error): ""}


def _first_difference(runs: Sequence[Path], agreed: int, differed: int) -> tuple[int | None, str]:
    """Take the steps after `agreed` up to `differed` of both runs again, side by side. Returns the first
    step that makes something else, and what; None, and what records do not fit, if no step does.
    """
    sides = [Again(run, (), differed, since=agreed) for run in runs]
    # Sums on a GPU may come out in another order each time: so A is taken twice, to know what that changes.
    if sides[0].parts.accelerator.device.type == "cuda":
        sides.append(Again(runs[0], (), differed, since=agreed))
    marks = [{f"{name} at the start": digest(t) for name, t in side.state().items()} for side in sides]
    for step in tracked(range(agreed, differed + 1), "taking steps of both runs", differed + 1 - agreed):
        if step > agreed:
            marks = [side.trace() for side in sides]
        if cause := _cause(*marks):
            break
    for side in sides:
        side.close()
    if cause:
        return max(step, agreed + 1), cause
    lines = [f"{run}: {line}" for run in runs for line in retake(run, (), (agreed, differed))]
    why = "the cause is not in the recipe: number of processes, hardware, versions, or a changed file"
    same = f"taken again, steps {agreed + 1} to {differed} are the same in both runs"
    return None, "; ".join([same, *lines, why])


def _cause(a: Marks, b: Marks, a_again: Marks | None = None) -> str:
    for name in a | b:
        if (mine := a.get(name, "nothing")) == (theirs := b.get(name, "nothing")):
            continue
        if a_again and a_again.get(name) != mine:
            return f"{name} differs, as it does when A takes the step twice: the order of summation"
        values = f"{name} is {mine} in A, {theirs} in B"
        return f"{name} differs" if "#" in (mine[:1], theirs[:1]) else values
    return ""
