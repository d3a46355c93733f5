"""Check that a run is what its recipe gives: by its receipt, and by taking stretches of it again."""

import itertools
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cmtrain.commands.again.replay import Again, digests, tensors_in
from cmtrain.config.load import Overrides, load_config
from cmtrain.config.schema import recipe_changes
from cmtrain.errors import EXIT_DONE, EXIT_EXPECTATION, ConfigError
from cmtrain.monitoring.console import print_result
from cmtrain.monitoring.machine import environment
from cmtrain.step.evaluate import evaluate
from cmtrain.step.measure import StepReport
from cmtrain.storage import checkpoint as storage
from cmtrain.storage import records, run_folder
from cmtrain.storage.checkpoint import Loaded, checkpoint_path
from cmtrain.storage.run_record import read_run
from cmtrain.storage.state_file import CheckpointError
from cmtrain.training.loaders import label_sets
from pipelines.progress import tracked
from pipelines.spec import DataError, os_errors_in_one_line, print_lines

# Where sums may be in another order, and small differences grow; both estimated.
TOLERANCE, WEIGHTS_TOLERANCE = 0.02, 0.5
OF_THE_HOST = ("host", "system", "cores")  # facts of an environment that change no result
Stretch = tuple[int, int]  # the step of a checkpoint, or 0, and that of the next one


@os_errors_in_one_line()
def verify(
    place: str, overrides: Overrides, *, segments: int, tolerance: float | None, as_json: bool = False
) -> int:
    """Compare the run at `place` with its receipt, and take `segments` random stretches between its
    checkpoints again. Returns the exit code: 0, or 5 where something is not what it claims to be.

    `tolerance`: of loss and accuracy, relative; 0: not one bit may differ, of optimizer and EMA neither;
    None: 0 unless why_inexact, else TOLERANCE. Raises DataError: no run, or nothing of it can be taken
    again. ConfigError: as training.
    """
    run = run_folder.find_run(place)[0]
    wrong, known = compare_receipt(run)
    stretches, left_out = stretches_of(run)
    print_lines(known, *wrong, *left_out)
    if not stretches and not wrong:
        raise DataError(f"{run}: no stretch between checkpoints can be taken again")
    chosen = sorted(random.SystemRandom().sample(stretches, min(segments, len(stretches))))
    for begin, end in chosen:
        steps = f"steps {begin + 1:,} to {end:,}"
        print_lines(f"taking {steps} again")
        found = [f"{steps}: {line}" for line in retake(run, overrides, (begin, end), tolerance)]
        print_lines(*found)  # at once: a later stretch may end the command
        wrong += found
    taken = sum(end - begin for begin, end in chosen)
    last = [0, *storage.checkpoint_steps(run / "checkpoints")][-1]
    verdict = "not what it claims to be" if wrong else "what its recipe gives"
    print_lines(f"{run}: {taken:,} of {last:,} steps taken again: {verdict}")
    print_result({"run": str(run), "receipt": known, "stretches": chosen, "wrong": wrong}, asked=as_json)
    return EXIT_EXPECTATION if wrong else EXIT_DONE


def compare_receipt(run: Path) -> tuple[list[str], str]:
    """Return a line for each record that is not as the receipt has it, and what is known of the receipt."""
    receipt = (records.read_json(run / run_folder.RECEIPT_NAME) or {}).get("sha256")
    if not isinstance(receipt, dict):
        return [], "no receipt.json, which a run writes at its end"
    now = run_folder.hashes(run)
    changed = [name for name in now if receipt.get(name, now[name]) != now[name]]
    wrong = [f"{name}: not as at the end of the run" for name in changed]
    gone = [name for name in receipt if name not in now]
    wrong += [f"{name}: gone" for name in gone if not name.startswith("checkpoints/")]
    for step in storage.checkpoint_steps(run / "checkpoints")[-1:]:
        try:
            meta = storage.read_manifest(checkpoint_path(run / "checkpoints", step))[1]
            changes = recipe_changes(meta["config"], load_config(run / "config.yaml").config)
            wrong += [f"config.yaml is not the recipe of step {step}: {change}" for change in changes]
        except (CheckpointError, ConfigError) as error:
            wrong.append(str(error).splitlines()[0])
    return wrong, f"receipt.json has {len(receipt)} digests, {len(gone)} of files that are gone"


def stretches_of(run: Path) -> tuple[list[Stretch], list[str]]:
    """Return the stretches between neighbouring checkpoints of `run` that can be taken again, and a line for
    each other one.
    """
    stretches, left_out = list[Stretch](), list[str]()
    healed = [event["step"] for event in run_folder.read_events(run) if event["event"] == "ema_healed"]
    for begin, end in itertools.pairwise([0, *storage.checkpoint_steps(run / "checkpoints")]):
        try:
            meta = storage.read_manifest(checkpoint_path(run / "checkpoints", end))[1]
        except CheckpointError:  # as it is taken again, it is found to be wrong
            meta = {"first_step": begin, "config": {}}
        model, teacher = meta["config"].get("model", {}), meta["config"].get("distill", {}).get("teacher")
        steps, given = range(begin + 1, end + 1), model.get("init_from") or model.get("pretrained")
        why = {
            "the run was started again in it": meta.get("first_step", end) > begin,
            "it went back to an older state in it": any(at in steps for at in meta.get("rollbacks", ())),
            "it has a teacher, which may have changed": teacher,
            "it begins with weights from elsewhere": given and not begin,
            "its average of the weights was healed": any(at in steps for at in healed),
        }
        if reason := next((reason for reason, holds in why.items() if holds), None):
            left_out.append(f"steps {begin + 1:,} to {end:,} are left out: {reason}")
        else:
            stretches.append((begin, end))
    return stretches, left_out


def retake(run: Path, overrides: Overrides, stretch: Stretch, tolerance: float | None = None) -> list[str]:
    """Take the steps of a stretch again. Returns a line for the first log point that differs, and, if there
    is a checkpoint at its end, for that and for the evaluation of it. `tolerance`: see `verify`.
    """
    saved, root, (begin, end) = None, run / "checkpoints", stretch
    try:
        if begin:
            storage.load_checkpoint(checkpoint_path(root, begin))
        if checkpoint_path(root, end).exists():
            saved = storage.load_checkpoint(checkpoint_path(root, end))
    except CheckpointError as error:
        return [str(error)]
    again = Again(run, overrides, end, since=begin)
    if tolerance is None and (why := why_inexact(again.meta)):
        tolerance = TOLERANCE
        print_lines(f"differences of {tolerance:.0%} are allowed: {why}")
    before = {name: tensor.detach().cpu().clone() for name, tensor in again.state().items()}
    log = records.read_records(run / "log.jsonl")
    rows = {row["step"]: row for row in log if isinstance(row.get("step"), int)}
    wrong = list[str]()
    for step in tracked(range(begin + 1, end + 1), f"steps {begin + 1} to {end}", end - begin):
        again.step()
        if step in rows and not wrong:
            wrong = different_row(rows[step], again.report(), tolerance or 0.0)
    if saved:
        wrong += different_state(saved, again.state(), before, tolerance or 0.0)
        wrong += different_evaluation(run, again, saved, tolerance or 0.0)
    again.close()
    return wrong


def why_inexact(meta: Mapping[str, Any]) -> str:
    """Return why steps taken again here may differ in some bits from those before a checkpoint; "": no."""
    then, now = meta.get("environment", {}), environment()
    if "gpu" in now or "gpu" in then:
        return "sums on a GPU may come in another order"
    if meta.get("world_size") != 1:
        return "the run had several ranks"
    if meta["config"]["train"]["compile"]:
        return "the run was compiled"
    other = [name for name in then | now if name not in OF_THE_HOST and then.get(name) != now.get(name)]
    return f"another {', '.join(other)} than in the run" if other else ""


def different_row(row: Mapping[str, Any], report: StepReport, tolerance: float) -> list[str]:
    """Return a line for the first figure of a log point that is not as when the step is taken again.
    With a `tolerance` only learning rate and loss count: the others follow small differences far.
    """
    for name in ("lr", "loss") if tolerance else ("lr", "loss", "grad_norm", "loss_scale", "bad_steps"):
        logged, taken = row.get(name), records.finite(getattr(report, name))
        is_alike = logged == taken
        if name == "loss" and tolerance and records.is_number(logged) and records.is_number(taken):
            is_alike = math.isclose(logged, taken, rel_tol=tolerance)
        if not is_alike:
            return [f"{name} of step {report.step} is {logged} in log.jsonl, and {taken} taken again"]
    return []


def different_state(
    saved: Loaded, now: dict[str, Tensor], before: dict[str, Tensor], tolerance: float
) -> list[str]:
    """Return a line if a checkpoint is not what its steps give: not one bit may differ; or, with a
    `tolerance`, model, EMA and optimizer each by at most WEIGHTS_TOLERANCE of how far they moved.
    """
    theirs = tensors_in(saved.state)
    if not tolerance:
        a, b = digests(now), digests(theirs)
        names = [name for name in a | b if a.get(name) != b.get(name)]
        more = f" and {len(names) - 1} more tensors" if names[1:] else ""
        return [f"{saved.path.name}: {names[0]}{more}: not what these steps give"] if names else []
    for part in ("model", "ema", "optimizer"):
        names = [name for name in theirs if name.startswith(f"{part} ") and theirs[name].is_floating_point()]
        pairs = [(now[name].cpu().double(), theirs[name].double(), before.get(name, 0)) for name in names]
        off = math.hypot(*((mine - other).norm() for mine, other, _ in pairs))
        moved = math.hypot(*((other - begun).norm() for _, other, begun in pairs))
        if not off <= WEIGHTS_TOLERANCE * moved:
            share = f"{off / moved if moved else math.inf:.0%} of the distance that it moved"
            return [f"{saved.path.name}: {part}: is {share} away from what these steps give"]
    return []


def different_evaluation(run: Path, again: Again, saved: Loaded, tolerance: float) -> list[str]:
    """Return a line for an accuracy in summary.csv that the weights of a checkpoint do not have."""
    rows, val, parts, wrong = read_run(run).evaluations, again.parts.data.val, again.parts, list[str]()
    if val.fingerprint != saved.meta.get("val_fingerprint"):
        return []
    sets = label_sets(val, parts.num_classes, parts.accelerator.device)
    for place in np.flatnonzero(rows["step"] == again.done):
        for kind, module in again.learner.weights.items():
            column = "eval_top1" if kind == "model" else "eval_ema_top1"
            how = parts.accelerator, len(val), parts.num_classes, sets
            found, written = evaluate(module, parts.eval_loader.epoch(0), *how).top1, rows[column][place]
            if not abs(found - written) <= tolerance:
                wrong.append(f"{column} of step {again.done} is {written} in summary.csv, not {found}")
    return wrong
