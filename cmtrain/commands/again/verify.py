"""Check that a run is what its recipe gives: by its receipt, and by taking stretches of it again."""

import itertools
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cmtrain.commands.again.steps import Again, digest, rollbacks_of, tensors_in
from cmtrain.config.load import Overrides, load_config
from cmtrain.config.schema import recipe_changes
from cmtrain.errors import EXIT_DONE, EXIT_EXPECTATION, ConfigError
from cmtrain.monitoring.console import print_result
from cmtrain.monitoring.machine import version_of
from cmtrain.step.measure import StepReport
from cmtrain.storage import checkpoint as storage
from cmtrain.storage.checkpoint import Loaded, checkpoint_path, checkpoint_steps
from cmtrain.storage.records import finite, is_number, read_json, read_records
from cmtrain.storage.run_folder import RECEIPT_NAME, find_run, hashes, read_events
from cmtrain.storage.state_file import CheckpointError
from pipelines.progress import tracked
from pipelines.spec import DataError, os_errors_in_one_line, print_lines

# Where sums may be in another order, and small differences grow; both estimated.
TOLERANCE, WEIGHTS_TOLERANCE = 0.02, 0.5
Stretch = tuple[int, int]  # the step of a checkpoint, or 0, and that of the next one


@os_errors_in_one_line()
def verify(
    place: str, overrides: Overrides, *, segments: int, tolerance: float | None, as_json: bool = False
) -> int:
    """Compare the run at `place` with its receipt, and take `segments` random stretches between its
    checkpoints again. Returns the exit code: 0, or 5 where something is not what it claims to be.

    `tolerance`: of the logged loss, relative; 0: not one bit may differ, of optimizer and EMA neither;
    None: see is_exact, else TOLERANCE. Raises DataError: no run, or no checkpoint. ConfigError: as training.
    """
    run = find_run(place)[0]
    wrong, known = compare_receipt(run)
    print_lines(f"{run}: {known}")
    stretches = stretches_of(run)
    chosen = sorted(random.SystemRandom().sample(stretches, min(segments, len(stretches))))
    for begin, end in chosen:
        found = retake(run, overrides, begin, end, tolerance)
        print_lines(f"steps {begin + 1} to {end} taken again: {'; '.join(found) or 'as in the run'}")
        wrong += [f"steps {begin + 1} to {end}: {line}" for line in found]
    verdict = "not what it claims to be" if wrong else "what its recipe gives, as far as it was taken again"
    print_lines(*wrong, f"{run}: {verdict}")
    print_result({"run": str(run), "receipt": known, "stretches": chosen, "wrong": wrong}, asked=as_json)
    return EXIT_EXPECTATION if wrong else EXIT_DONE


def compare_receipt(run: Path) -> tuple[list[str], str]:
    """Return a line for each record that is not as the receipt has it, and what is known of the receipt."""
    wrong = []
    steps = checkpoint_steps(run / "checkpoints")
    for step in steps:
        try:
            _, meta = storage.read_manifest(checkpoint_path(run / "checkpoints", step))
        except CheckpointError as error:
            wrong.append(str(error))
    if steps and not wrong:
        try:
            changes = recipe_changes(meta["config"], load_config(run / "config.yaml").config)
            wrong += [f"config.yaml is not the recipe of step {step}: {change}" for change in changes]
        except ConfigError as error:
            wrong.append(f"config.yaml: {error}".splitlines()[0])
    receipt = (read_json(run / RECEIPT_NAME) or {}).get("sha256")
    if not isinstance(receipt, dict):
        return wrong, "no receipt.json, which a run writes at its end"
    now = hashes(run)
    gone = [name for name in receipt if name not in now]
    wrong += [f"{name}: not as at the end of the run" for name in now if receipt.get(name) != now[name]]
    wrong += [f"{name}: gone" for name in gone if not name.startswith("checkpoints/")]
    return wrong, f"receipt.json has {len(receipt)} digests, of which {len(gone)} are of files that are gone"


def stretches_of(run: Path) -> list[Stretch]:
    """Return the stretches between neighbouring checkpoints of `run`, but those with a rollback in them."""
    steps = [0, *checkpoint_steps(run / "checkpoints")]
    if len(steps) == 1:
        raise DataError(f"{run}: has no checkpoint to verify")
    went_back = rollbacks_of(run)
    pairs = itertools.pairwise(steps)
    return [(begin, end) for begin, end in pairs if not any(begin < at <= end for at in went_back)]


def retake(
    run: Path, overrides: Overrides, begin: int, end: int, tolerance: float | None = None
) -> list[str]:
    """Take the steps after `begin` up to `end` again. Returns a line for the first log point that differs,
    and one for the checkpoint at `end`, if there is one. `tolerance`: see `verify`.
    """
    saved, path = None, checkpoint_path(run / "checkpoints", end)
    if path.exists():
        try:
            saved = storage.load_checkpoint(path)
        except CheckpointError as error:
            return [str(error)]
    again = Again(run, overrides, end, since=begin)
    if tolerance is None:
        tolerance = 0.0 if is_exact(run, again) else TOLERANCE
    before = {name: tensor.detach().cpu().clone() for name, tensor in again.state().items()}
    rows = {row["step"]: row for row in read_records(run / "log.jsonl") if isinstance(row.get("step"), int)}
    wrong = list[str]()
    for step in tracked(range(begin + 1, end + 1), f"steps {begin + 1} to {end}", end - begin):
        again.step()
        if step in rows and not wrong:
            wrong = different_row(rows[step], again.report(), tolerance)
    again.close()
    return wrong + (different_state(saved, again.state(), before, tolerance) if saved else [])


def is_exact(run: Path, again: Again) -> bool:
    """Return whether every bit must be as in the run: one process on a CPU, with the same torch, both."""
    facts: dict[str, Any] = {}
    for event in read_events(run):
        facts |= {key: event[key] for key in ("device", "world_size", "torch") if key in event}
    here = {"device": again.parts.accelerator.device.type, "world_size": "1", "torch": version_of("torch")}
    return facts == here and here["device"] == "cpu"


def different_row(row: Mapping[str, Any], report: StepReport, tolerance: float) -> list[str]:
    """Return a line for the first figure of a log point that is not as when the step is taken again.
    With a `tolerance` only learning rate and loss count: the others follow small differences far.
    """
    for name in ("lr", "loss") if tolerance else ("lr", "loss", "grad_norm", "loss_scale", "bad_steps"):
        logged, taken = row.get(name), finite(getattr(report, name))
        is_alike = logged == taken
        if tolerance and is_number(logged) and is_number(taken):
            is_alike = math.isclose(logged, taken, rel_tol=tolerance)
        if not is_alike:
            return [f"{name} of step {report.step} is {logged} in log.jsonl, and {taken} taken again"]
    return []


def different_state(
    saved: Loaded, now: dict[str, Tensor], before: dict[str, Tensor], tolerance: float
) -> list[str]:
    """Return a line if a checkpoint is not what its steps give: not one bit may differ; or, with a
    `tolerance`, all weights together by at most WEIGHTS_TOLERANCE of how far they moved from `before`.
    """
    theirs = tensors_in(saved.state)
    if not tolerance:
        names = [name for name in now | theirs if digest_of(now, name) != digest_of(theirs, name)]
        what = f"{names[0]}{f' and {len(names) - 1} more tensors' if names[1:] else ''}" if names else ""
        return [f"{saved.path.name}: {what}: not what these steps give"] if names else []
    off, moved = 0.0, 0.0
    for name, tensor in theirs.items():
        if name.startswith("model ") and tensor.is_floating_point() and name in now:
            off += float((now[name].cpu().double() - tensor.double()).square().sum())
            moved += float((tensor.double() - before[name].double()).square().sum())
    share = math.sqrt(off / max(moved, 1e-30))
    text = f"{saved.path.name}: its weights are {share:.0%} of their way from what these steps give"
    return [] if share <= WEIGHTS_TOLERANCE else [text]


def digest_of(tensors: Mapping[str, Tensor], name: str) -> str:
    return digest(tensors[name]) if name in tensors else ""
