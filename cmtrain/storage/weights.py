"""Trained weights, wherever they lie, and how they get into a model of another resolution or another class count."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cmtrain.errors import ConfigError
from cmtrain.models.checkpoints import resize_positions
from cmtrain.storage.checkpoint import find_checkpoint
from cmtrain.storage.finite import all_finite, named
from cmtrain.storage.state_file import CheckpointError, open_regular
from pipelines.spec import DataError

WEIGHTS_NAME = "model.safetensors"


@dataclass(frozen=True)
class Weights:
    """One model's state_dict, on the CPU, finite. `kind`: `model` or `ema`. `path`: the file or checkpoint it is of."""

    path: Path
    kind: str
    tensors: dict[str, Tensor]


def read_weights(path: str) -> Weights:
    """The weights in an export folder, a .safetensors file, a checkpoint, or the newest checkpoint of a run folder.

    Of a checkpoint the EMA is taken, if it has one. No file can run code or ask for more memory than its own size.

    Raises:
        DataError: there are none, they are damaged, or not finite.
    """
    given = Path(path).resolve()  # a model hub's cache is made of links
    try:
        file = given / WEIGHTS_NAME if given.is_dir() and (given / WEIGHTS_NAME).exists() else given
        if file.suffix == ".safetensors":
            return _finite(Weights(file, "model", _read_safetensors(file.resolve())))
        if not given.is_dir():
            what = (
                "no such file or folder"
                if not given.exists()
                else "neither a folder nor a .safetensors file"
            )
            raise CheckpointError(
                f"{path}: {what}; weights are a run, a checkpoint, an export or a .safetensors file"
            )
        loaded = find_checkpoint(given)
        kind = "ema" if "ema" in loaded.state else "model"
        return _finite(Weights(loaded.path, kind, state_of(loaded.state, kind, loaded.path)))
    except (CheckpointError, OSError) as error:
        raise DataError(str(error)) from error


def state_of(state: Mapping[str, Any], kind: str, path: Path) -> dict[str, Tensor]:
    """The `kind` of weights (`model` or `ema`) in the state of the checkpoint `path`. Raises DataError: none there."""
    tensors = state.get(kind)
    if (
        not isinstance(tensors, dict)
        or not tensors
        or not all(isinstance(t, Tensor) for t in tensors.values())
    ):
        raise DataError(f"{path}: it has no {kind} weights")
    return tensors


def check_finite(weights: Weights) -> None:
    """Raises DataError: the first tensor that is not finite, and what to do about it."""
    floating = {name: t for name, t in weights.tensors.items() if t.is_floating_point() and t.numel()}
    if not floating:
        raise DataError(f"{weights.path}: it holds no weights")
    finite = all_finite(list(floating.values()))
    if bad := [name for name, good in zip(floating, finite, strict=True) if not good]:
        remedy = "an older checkpoint may be; where only BatchNorm statistics are not, see cmtrain repair-bn --help"
        raise DataError(f"{weights.path}: {weights.kind} {named(bad)} not finite; {remedy}")


def fit(model: nn.Module, tensors: Mapping[str, Tensor], *, keeps_head: bool) -> list[str]:
    """Load `tensors` into `model`, which may be of another image size; position tables are resized to it.

    Args:
        keeps_head: refuse another number of classes; else the model's own new head stays in that case.

    Returns:
        What was changed on the way, one line each.

    Raises:
        ConfigError: what does not fit; the model is as it was.
    """
    own, notes = model.state_dict(), []
    given = dict(tensors)
    head = [name for name in own if name.startswith(_head_of(model))]
    if not keeps_head and head and (name := _misfit(own, given, head)):
        there = len(given[name]) if name in given else 0
        notes.append(f"the head is new: {len(own[name])} classes, {there or 'no head'} there")
        given = {name: tensor for name, tensor in given.items() if not name.startswith(_head_of(model))}
        given |= {name: own[name] for name in head}
    try:
        fitting = resize_positions(given, model)
    except ValueError as error:
        raise ConfigError(f"position table {error}") from error
    resized = [name for name in given if fitting[name] is not given[name]]
    if resized:
        notes.append(f"{len(resized)} position tables resized, {resized[0]} first")
    name = _misfit(own, fitting, [*own, *fitting])
    if name is not None:
        raise ConfigError(
            f"{name} is {_shape(fitting.get(name))} there and {_shape(own.get(name))} in the model"
        )
    model.load_state_dict(fitting)
    return notes


def num_classes_in(weights: Weights, name: str) -> int:
    """Outputs of the timm model `name` with these weights. Raises DataError: they have no classifier."""
    head = getattr(timm.get_pretrained_cfg(name), "classifier", None) or "head"
    if f"{head}.weight" not in weights.tensors:
        raise DataError(f"{weights.path}: it has no {head}.weight, the classifier of {name}")
    return len(weights.tensors[f"{head}.weight"])


def start_from(path: str, model: nn.Module) -> list[str]:
    """model.init_from: give a new `model` the weights at `path`; returns what to tell.

    Raises:
        ConfigError: they are of another model. DataError: as read_weights.
    """
    try:
        weights = read_weights(path)
        notes = fit(model, weights.tensors, keeps_head=False)
    except (ConfigError, DataError) as error:
        raise type(error)(f"model.init_from: {path}: {error}".replace(f"{path}: {path}", path)) from error
    return [
        f"model.init_from: {weights.kind} weights of {weights.path}",
        *(f"model.init_from: {n}" for n in notes),
    ]


def _finite(weights: Weights) -> Weights:
    check_finite(weights)
    return weights


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    open_regular(
        file
    ).close()  # no device, no pipe; the format itself holds no code, and its reader checks all sizes
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not a safetensors file: {error}") from error


def _head_of(model: nn.Module) -> str:
    """Prefix of the classifier's names, as timm records it."""
    name = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return f"{name}."


def _misfit(own: Mapping[str, Tensor], given: Mapping[str, Tensor], names: list[str]) -> str | None:
    """The first of `names` that the two do not both have, in one shape."""
    for name in names:
        if name not in own or name not in given or own[name].shape != given[name].shape:
            return name
    return None


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
