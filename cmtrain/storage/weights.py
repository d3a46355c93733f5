"""Read trained weights from any place, and load them into a model of another resolution or class count."""

import argparse
import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

from cmtrain.errors import ConfigError
from cmtrain.models import checkpoints
from cmtrain.models.cmt import CMT
from cmtrain.storage import checkpoint, records, run_folder, state_file
from cmtrain.storage.finite import all_finite, floating_tensors, named
from pipelines.spec import DataError

WEIGHTS_NAME = "model.safetensors"


class Weights(NamedTuple):
    """The state_dict of one model, on the CPU. `kind`: `model` or `ema`. `path`: its file or checkpoint."""

    path: Path
    kind: str
    tensors: dict[str, Tensor]
    warnings: tuple[str, ...] = ()  # see checkpoint.Loaded


def read_weights(path: str) -> Weights:
    """Read an export folder, a weights file, a checkpoint, or the newest checkpoint of a run folder.
    Takes the EMA, if any. No file can run code. Raises DataError: no weights, or damaged or not finite ones.
    """
    given = Path(path).resolve()  # a model hub's cache is made of links
    try:
        file = given / WEIGHTS_NAME if given.is_dir() and (given / WEIGHTS_NAME).exists() else given
        if file.suffix in run_folder.WEIGHTS_SUFFIXES:
            weights = Weights(file, "model", checkpoints.unwrap(read_file(file)[0]))
        elif given.is_dir():
            loaded = checkpoint.find_checkpoint(given)
            kind = "ema" if "ema" in loaded.state else "model"
            weights = Weights(loaded.path, kind, state_of(loaded.state, kind, loaded.path), loaded.warnings)
        else:
            raise DataError(f"{path}: {run_folder.why_no_weights(given)}")
    except (state_file.CheckpointError, OSError) as error:
        raise DataError(str(error)) from error
    return check_finite(weights)


def read_file(path: Path) -> tuple[dict[Any, Any], dict[str, str] | None]:
    """Return content and metadata of any trainer's file. Raises DataError: damaged, or it could run code."""
    try:
        content, metadata = records.retried(_load, path.resolve())
        if not isinstance(content, dict):
            raise records.DamagedRecordError(f"holds a {type(content).__name__}, not a state_dict")
        return content, metadata
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # torch raises almost anything on damaged files
        why = f"cannot be read: {records.reason_of(error)}"
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            why = f"holds a {found[1]}, which could run code; save the state_dict alone"
        raise DataError(f"{path}: {why}") from error


def _load(path: Path) -> tuple[Any, dict[str, str] | None]:
    state_file.open_regular(path).close()  # no device, no pipe
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    # Many trainers store their arguments beside the weights; a Namespace of values is harmless.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True), None


def state_of(state: Mapping[str, Any], kind: str, path: Path) -> dict[str, Tensor]:
    """Return the weights `kind` (`model` or `ema`) in the state of checkpoint `path`. Raises DataError."""
    tensors = state.get(kind)
    if isinstance(tensors, dict) and tensors and all(isinstance(t, Tensor) for t in tensors.values()):
        return tensors
    raise DataError(f"{path}: it has no {kind} weights")


def check_finite(weights: Weights) -> Weights:
    """Return `weights`. Raises DataError: the first tensor that is not finite, and what to do about it."""
    floating = floating_tensors(weights.tensors)
    if not floating:
        raise DataError(f"{weights.path}: it holds no weights")
    finite = all_finite(list(floating.values()))
    if bad := [name for name, good in zip(floating, finite, strict=True) if not good]:
        advice = "use an older checkpoint; for BatchNorm statistics alone, see cmtrain repair-bn --help"
        raise DataError(f"{weights.path}: {weights.kind} {named(bad)} not finite; {advice}")
    return weights


def fit(model: nn.Module, tensors: Mapping[str, Tensor], *, keeps_head: bool) -> list[str]:
    """Load `tensors` into `model`, which may be of another image size; position tables are resized to it.
    `keeps_head`: whether another number of classes is refused; else the model keeps its own new head.
    Returns a line for each change. Raises ConfigError: `tensors` do not fit; the model is as it was.
    """
    own, notes = model.state_dict(), list[str]()
    # Old files do not have the counters of BatchNorm.
    given = {name: own[name] for name in own if name.endswith("num_batches_tracked")} | dict(tensors)
    heads = _heads_of(getattr(model, "pretrained_cfg", {}).get("classifier"))
    head = [name for name in own if name.startswith(heads)]
    if not keeps_head and head and (name := misfit(own, given, head)):
        found = f"the weights have {len(given[name])}" if name in given else "the weights have no head"
        notes.append(f"new classifier head: {len(own[name])} classes ({found})")
        given = {name: tensor for name, tensor in given.items() if not name.startswith(heads)}
        given |= {name: own[name] for name in head}
    try:
        fitting = checkpoints.resize_positions(given, model)
    except ValueError as error:
        raise ConfigError(f"position table {error}") from error
    if resized := [name for name in given if fitting[name] is not given[name]]:
        notes.append(f"{len(resized)} position tables resized, {resized[0]} first")
    if name := misfit(own, fitting, [*own, *fitting]):
        shapes = f"{shape_of(fitting, name)} in the weights and {shape_of(own, name)} in the model"
        raise ConfigError(f"{name} is {shapes}")
    model.load_state_dict(fitting)
    return notes


def _heads_of(classifier: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return how the parameters of the classifiers begin; `classifier`: as timm's pretrained_cfg has it."""
    names = classifier or "head"
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def num_classes_in(weights: Weights, name: str) -> int:
    """Return how many classes these weights of the timm model `name` have. Raises DataError: no head.
    Where timm does not know its classifier, it is the last layer: a module of one's own may not name it.
    """
    head = _heads_of(getattr(timm.get_pretrained_cfg(name), "classifier", None))[0] + "weight"
    layers = [tensor for tensor in weights.tensors.values() if tensor.ndim > 1]
    if head not in weights.tensors and (timm.get_pretrained_cfg(name) or not layers):
        raise DataError(f"{weights.path}: it has no {head}, the classifier of {name}")
    return len(weights.tensors.get(head, layers[-1]))


def start_from(path: str, model: nn.Module, class_names: Sequence[str] = ()) -> list[str]:
    """Give a new `model` the weights at `path`, for model.init_from. Return lines for the user.
    One reports a kept head of other classes than `class_names`. Raises ConfigError: no fit; as read_weights.
    """
    try:
        weights = read_weights(path)
        if isinstance(model, CMT) and checkpoints.variant_of(weights.tensors):
            notes = _fit_reference(model, weights.tensors)
        else:
            notes = fit(model, weights.tensors, keeps_head=False)
        theirs = classes_beside(weights.path)
        if len(theirs) == len(class_names) and theirs != list(class_names):
            pair = next(pair for pair in zip(theirs, class_names, strict=True) if pair[0] != pair[1])
            what = "the classifier head is of other classes, or of these in another order"
            notes.append(f"{what}: output {theirs.index(pair[0])} was {pair[0]} and is now {pair[1]}")
    except (ConfigError, DataError) as error:
        raise type(error)(f"model.init_from: {path}: {error}".replace(f"{path}: {path}", path)) from error
    lines = (*weights.warnings, f"{weights.kind} weights of {weights.path}", *notes)
    return [f"model.init_from: {line}" for line in lines]


def _fit_reference(model: CMT, tensors: Mapping[str, Tensor]) -> list[str]:
    """Do what `fit` does, for weights of a reference. Raises ConfigError: they do not fit."""
    heads = {"paper": "head.weight", "reimpl": "classifier.weight"}
    found = len(tensors.get(heads[checkpoints.variant_of(tensors)], ()))
    is_new = found != model.num_classes
    try:
        checkpoints.load_reference_checkpoint(model, tensors, skip_head=is_new)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return [f"new classifier head: {model.num_classes} classes (the weights have {found})"] if is_new else []


def classes_beside(path: Path) -> list[str]:
    """Return the class names of the run or export that `path` is in; [] where it has none."""
    run, export = path.parent.parent / "classes.json", path.parent / "config.json"
    for file, key in ((run, "classes"), (export, "label_names")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return list(map(str, records.load_json(file)[key]))
    return []


def misfit(own: Mapping[str, Any], given: Mapping[str, Any], names: list[str]) -> str | None:
    """Return the first of `names` that the two do not both have, in one shape."""
    return next((name for name in names if shape_of(own, name) != shape_of(given, name)), None)


def shape_of(tensors: Mapping[str, Any], name: str) -> str:
    tensor = tensors.get(name)
    return str(tuple(tensor.shape)) if isinstance(tensor, Tensor) else "missing"
