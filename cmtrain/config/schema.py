"""Join the sections to a Config, check what no single key can check, and define which runs are the same
run.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from cmtrain.config.sections import (
    CMT_OPTIONS,
    Augment,
    Checkpoint,
    Data,
    Ema,
    Evaluate,
    Expect,
    Guard,
    Metrics,
    Mixing,
    Model,
    Optim,
    Run,
    ScheduleSection,
    Section,
    Train,
)  # fmt: skip
from cmtrain.config.strict_yaml import emit
from cmtrain.errors import ConfigError


class Config(Section):
    run: Run = Run()
    model: Model = Model()
    data: Data
    augment: Augment = Augment()
    mixing: Mixing = Mixing()
    optim: Optim
    schedule: ScheduleSection
    train: Train
    ema: Ema = Ema()
    guard: Guard = Guard()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    metrics: Metrics = Metrics()
    expect: Expect = Expect()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if found := contradictions(flat(self)):
            raise ValueError("; ".join(message for _, message in found))
        return self


@functools.cache
def fields() -> dict[str, FieldInfo]:
    """Return every field by its dotted key, in the order of the schema."""
    sections: dict[str, Any] = {section: field.annotation for section, field in Config.model_fields.items()}
    return flatten({section: model.model_fields for section, model in sections.items()})


def flatten(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Turn {section: {key: value}} into {"section.key": value}."""
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def flat(config: Config) -> dict[str, Any]:
    """Return the value of every field by its dotted key."""
    return flatten({section: dict(keys) for section, keys in config})


def defaults() -> dict[str, Any]:
    """Return the default of every field that has one, by its dotted key."""
    return {key: field.default for key, field in fields().items() if field.default is not PydanticUndefined}


class _Rule(NamedTuple):
    """A relation of the values of `keys`, separated by blanks; {} in `message` is a key with its value."""

    keys: str
    holds: Callable[..., bool]
    message: str


_RULES = (
    _Rule("augment.scale", lambda scale: scale[0] <= scale[1], "{} must go from low to high"),
    _Rule("augment.ratio", lambda ratio: ratio[0] <= ratio[1], "{} must go from low to high"),
    _Rule(
        "data.eval_resize_px data.image_px",
        lambda resize, crop: resize >= crop,
        "{} must not be less than {}",
    ),
    _Rule(
        "schedule.warmup_epochs schedule.epochs",
        lambda warmup, all_: warmup < all_,
        "{} must be less than {}",
    ),
    _Rule("schedule.min_lr optim.lr", lambda low, peak: low <= peak, "{} must not exceed {}"),
    _Rule(
        "schedule.warmup_lr optim.lr schedule.warmup_epochs",
        lambda first, peak, warmup: first <= peak or warmup == 0,
        "{} must not exceed {}",
    ),
    _Rule(
        "optim.nesterov optim.momentum optim.opt",
        lambda nesterov, momentum, opt: momentum > 0 or not nesterov or opt != "sgd",
        "{} needs {} to be greater than 0",
    ),
    _Rule(
        "train.compile_mode train.compile",
        lambda mode, on: on or mode == "default",
        "{} needs {} to be true",
    ),
    _Rule(
        "expect.enforce expect.top1", lambda on, top1: top1 is not None or not on, "{} needs {} to be set"
    ),
    _Rule("expect.diverges expect.top1", lambda on, top1: top1 is None or not on, "{} contradicts {}"),
    _Rule(
        "model.absolute_position_px model.absolute_position",
        lambda px, on: px is None or on,
        "{} needs {} to be true",
    ),
)


def _fits_cmt_only(key: str) -> _Rule:
    default = Model.model_fields[key].default
    return _Rule(
        f"model.{key} model.name",
        lambda value, name: name.startswith("cmt_") or value == default,
        "{} is an option of CMT only, and does not fit {}",
    )


def contradictions(values: Mapping[str, Any]) -> list[tuple[list[str], str]]:
    """Return (keys, message) of each rule that `values` (by dotted key) break; a rule needs all of its
    keys.
    """
    found = []
    for rule in (*_RULES, *map(_fits_cmt_only, CMT_OPTIONS)):
        keys = rule.keys.split()
        if all(key in values for key in keys) and not rule.holds(*(values[key] for key in keys)):
            found.append((keys, rule.message.format(*(f"{key} ({emit(values[key])})" for key in keys))))
    return found


def to_yaml(config: Config, comments: Mapping[str, str] | None = None) -> str:
    """Write `config` as a file that load_config reads back as an equal one.

    Args:
        comments: text to put after a value, by dotted key.
    """
    lines: list[tuple[str, str]] = []
    for section, keys in config:
        lines.append((f"{section}:", ""))
        for key, value in keys:
            lines.append((f"  {key}: {emit(value)}", (comments or {}).get(f"{section}.{key}", "")))
    width = max(len(text) for text, _ in lines)
    return "".join(f"{text:<{width}}  # {comment}\n" if comment else f"{text}\n" for text, comment in lines)


# What may differ between the run that wrote a checkpoint and the run that continues it, without changing
# what is learned. train.max_batch_per_gpu is among them because another number of GPUs may need another
# accumulation; model.ffn_kernel and train.compile because they are other ways to the same numbers, on other
# hardware.
_FREE_SECTIONS = ("guard", "checkpoint", "evaluate", "metrics", "expect")
_FREE_KEYS = (
    "run.name", "run.dir", "data.root", "data.decode", "data.hw_decoder_load", "data.threads",
    "data.prefetch_batches", "data.cache_dir", "data.max_bad_fraction", "model.ffn_kernel", "train.compile",
    "train.compile_mode", "train.max_batch_per_gpu", "train.log_every_steps", "train.step_timeout_seconds",
    "train.collective_timeout_seconds",
)  # fmt: skip


def recipe(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what makes two runs the same run, by dotted key: the keys that decide what is learned.

    Args: sections: a Config dumped to JSON. A key that an older version of cmtrain did not have counts as
        today's
            default, which is what that version did.
    """
    values = to_jsonable_python(defaults()) | flatten(sections)
    return {
        key: value
        for key, value in values.items()
        if key.split(".")[0] not in _FREE_SECTIONS and key not in _FREE_KEYS
    }


def recipe_changes(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return `key: old -> new` for what differs between the recipes of two Configs dumped to JSON."""
    before, after = recipe(old), recipe(new)
    changed = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in changed]


def another_recipe(checkpoint: Path, changes: Sequence[str]) -> ConfigError:
    """Return the error for a run that does not continue `checkpoint`, because of `changes`."""
    return ConfigError(
        f"{checkpoint} was made with another recipe: {'; '.join(changes)}; "
        "choose another --run.name, or --resume force to continue with the new recipe"
    )
