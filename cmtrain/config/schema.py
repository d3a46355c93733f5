"""Join the sections to a Config, check what no single key can, and define which runs are the same run."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import ge, le, lt
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from cmtrain.config import sections
from cmtrain.config.sections import CMT_OPTIONS, Model, Section
from cmtrain.config.strict_yaml import emit
from cmtrain.errors import ConfigError


class Config(Section):
    run: sections.Run = sections.Run()
    model: Model = Model()
    data: sections.Data
    augment: sections.Augment = sections.Augment()
    mixing: sections.Mixing = sections.Mixing()
    distill: sections.Distill = sections.Distill()
    optim: sections.Optim
    schedule: sections.ScheduleSection
    train: sections.Train
    ema: sections.Ema = sections.Ema()
    guard: sections.Guard = sections.Guard()
    checkpoint: sections.Checkpoint = sections.Checkpoint()
    evaluate: sections.Evaluate = sections.Evaluate()
    metrics: sections.Metrics = sections.Metrics()
    expect: sections.Expect = sections.Expect()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if found := contradictions(flat(self), {f"data.{key}" for key in self.data.model_fields_set}):
            raise ValueError("; ".join(message for _, message in found))
        return self

    @property
    def best_measure(self) -> str:
        """What makes a checkpoint the best: evaluate.best or its default. See Evaluation.score."""
        return self.evaluate.best or ("map" if self.data.multi_label else "top1")


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


# How images are prepared: pretrained weights decide it where the configuration does not.
PREPARED = ("mean", "std", "interpolation", "eval_interpolation", "eval_resize_px")

# A relation between the values of keys, separated by blanks; {} in its message is a key with its value.
_Rule = tuple[str, Callable[..., bool], str]

_RULES: tuple[_Rule, ...] = (
    ("augment.scale", lambda scale: le(*scale), "{} must go from low to high"),
    ("augment.ratio", lambda ratio: le(*ratio), "{} must go from low to high"),
    ("data.eval_resize_px data.image_px", ge, "{} must not be less than {}"),
    ("data.image_px model.name", lambda px, name: px % 32 == 0 or not name.startswith("cmt_"),
     "{} does not go with {}, which needs a multiple of 32"),
    ("schedule.warmup_epochs schedule.epochs", lt, "{} must be less than {}"),
    ("schedule.min_lr optim.lr", le, "{} must not exceed {}"),
    ("schedule.warmup_lr optim.lr schedule.warmup_epochs",
     lambda first, peak, warmup: first <= peak or warmup == 0, "{} must not exceed {}"),
    ("optim.nesterov optim.momentum optim.opt",
     lambda nesterov, momentum, opt: momentum > 0 or not nesterov or opt != "sgd",
     "{} needs {} to be greater than 0"),
    ("optim.betas optim.opt", lambda betas, opt: betas is None or opt not in ("adan", "lars", "rmsproptf"),
     "{} does not go with {}, which has other averages"),
    ("train.compile_mode train.compile", lambda mode, on: on or mode == "default", "{} needs {} to be true"),
    ("train.grad_checkpointing train.compile", lambda a, b: not (a and b), "{} does not go with {}"),
    ("data.sampling augment.repeats", lambda sampling, repeats: sampling is None or repeats == 1,
     "{} does not go with {}"),
    ("augment.extra run.imports",
     lambda extra, imports: not extra or extra.split(":")[0] in {name.split("@")[0] for name in imports},
     "{} needs its module in {}"),
    ("evaluate.best data.multi_label", lambda best, on: on or best != "map", "{} needs {} to be true"),
    ("mixing.target_threshold mixing.loss data.multi_label",
     lambda threshold, loss, several: threshold is None or loss != "cross_entropy" or several,
     "{} does not go with {}"),
    ("mixing.smoothing mixing.target_threshold", lambda smoothing, least: not (smoothing and least == 0),
     "{} makes a target of each class with {}"),
    ("distill.teacher data.multi_label", lambda teacher, on: not (teacher and on), "{} does not go with {}"),
    ("expect.enforce expect.top1", lambda on, top: not on or top is not None, "{} needs {} to be set"),
    ("expect.diverges expect.top1", lambda on, top: not on or top is None, "{} contradicts {}"),
    ("model.unfreeze_epoch model.freeze", lambda a, b: a is None or b, "{} needs {} to be set"),
    ("model.pretrained model.init_from", lambda a, b: not (a and b), "{} contradicts {}"),
    ("model.pretrained model.name",
     lambda given, name: not (given and name.startswith("cmt_")) or str(given).startswith("hf-hub:"),
     "{} does not fit {}: CMT has no pretrained weights; use hf-hub:NAME or model.init_from"),
    ("model.absolute_position_px model.absolute_position", lambda px, on: px is None or on,
     "{} needs {} to be true"),
)  # fmt: skip


def _of_cmt_only(key: str) -> _Rule:
    default, what = Model.model_fields[key].default, "{} is an option of CMT only, and does not fit {}"
    return f"model.{key} model.name", lambda value, name: name.startswith("cmt_") or value == default, what


def contradictions(values: Mapping[str, Any], stated: Collection[str] = ()) -> list[tuple[list[str], str]]:
    """Return (keys, message) of each rule that `values` (by dotted key) break; it needs all of its keys.
    `stated`: keys that are not defaults; pretrained weights decide others.
    """
    if values.get("model.pretrained"):
        undecided = {f"data.{key}" for key in PREPARED} - {*stated}
        values = {key: value for key, value in values.items() if key not in undecided}
    found = []
    for names, holds, message in (*_RULES, *map(_of_cmt_only, CMT_OPTIONS)):
        keys = names.split()
        if all(key in values for key in keys) and not holds(*(values[key] for key in keys)):
            found.append((keys, message.format(*(f"{key} ({emit(values[key])})" for key in keys))))
    return found


def prepared_as(config: Config, data: Mapping[str, Any]) -> Config:
    """Return `config` with the PREPARED of `data` that it does not state."""
    stated = config.data.model_dump(include=config.data.model_fields_set)
    prepared = {key: data[key] for key in PREPARED if key in data} | stated
    return config.model_copy(update={"data": sections.Data.model_validate(prepared)})


def as_begun(config: Config, old: Mapping[str, Any]) -> Config:
    """Return `config` with what pretrained weights decided when `old`, a Config dumped to JSON, began."""
    return prepared_as(config, old["data"]) if config.model.pretrained and old else config


def sizes_of(config: Config, image_px: Sequence[int], resize_px: Sequence[int]) -> list[tuple[int, int]]:
    """Return pairs of image side and shorter side before the crop for `cmtrain eval`, in the order given.
    Two lists are paired; one size goes with each of the other list. Without `resize_px` the run's own is
    scaled with the image side. Raises ConfigError: sizes that fit neither one another nor the model.
    """
    data = config.data
    sides = list(image_px or (data.image_px,))
    resizes = list(resize_px) or [round(data.eval_resize_px * side / data.image_px) for side in sides]
    if len(sides) != len(resizes) and 1 not in (len(sides), len(resizes)):
        counts = f"--image-px has {len(sides)} sizes and --resize-px {len(resizes)}"
        raise ConfigError(f"{counts}: give one for each, or several for one")
    count = max(len(sides), len(resizes))
    pairs = list(zip(sides * (count // len(sides)), resizes * (count // len(resizes)), strict=True))
    for side, resize in pairs:
        step = 32 if config.model.name.startswith("cmt_") else 16
        if side % step:
            raise ConfigError(f"--image-px: must be multiples of {step}, got {side}")
        if resize < side:
            raise ConfigError(f"--resize-px: {resize} is less than the image side {side}")
    return pairs


def to_yaml(config: Config, comments: Mapping[str, str] | None = None) -> str:
    """Write `config` as a file that load_config reads back as an equal one; `comments`: by dotted key."""
    lines = {}
    for section, keys in config:
        lines[section] = f"{section}:"
        lines |= {f"{section}.{key}": f"  {key}: {emit(value)}" for key, value in keys}
    width = max(map(len, lines.values()))
    for key, comment in (comments or {}).items():
        lines[key] = f"{lines[key]:<{width}}  # {comment}"
    return "".join(f"{line}\n" for line in lines.values())


# What may differ between the run that wrote a checkpoint and the run that continues it: it does not change
# what is learned. Another number of GPUs may need another train.max_batch_per_gpu; model.ffn_kernel,
# train.compile and train.grad_checkpointing are other ways to the same numbers, on other hardware.
_FREE_SECTIONS = ("guard", "checkpoint", "evaluate", "metrics", "expect")
_FREE_KEYS = (
    "run.name", "run.dir", "data.root", "data.decode", "data.hw_decoder_load", "data.threads",
    "data.prefetch_batches", "data.cache_dir", "data.cache_gb", "data.max_bad_fraction",
    "model.ffn_kernel", "train.compile", "train.compile_mode", "train.grad_checkpointing",
    "train.max_batch_per_gpu", "train.log_every_steps", "train.step_timeout_seconds",
    "train.collective_timeout_seconds",
)  # fmt: skip


def recipe(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what makes two runs the same run: the keys that decide what is learned, with their values.
    A key that `sections`, a Config dumped to JSON, does not have counts as its default.
    """
    values = to_jsonable_python(defaults()) | flatten(sections)
    free = {key for key in values if key.split(".")[0] in _FREE_SECTIONS} | {*_FREE_KEYS}
    return {key: value for key, value in values.items() if key not in free}


def recipe_changes(old: Mapping[str, Mapping[str, Any]], config: Config) -> list[str]:
    """Return `key: old -> new` for what is another recipe in `config` than in `old`, one dumped to JSON."""
    before, after = recipe(old), recipe(as_begun(config, old).model_dump(mode="json"))
    changed = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in changed]


def another_recipe(checkpoint: Path, changes: Sequence[str]) -> ConfigError:
    """Return the error for a run that does not continue `checkpoint`, because of `changes`."""
    advice = "choose another --run.name, or --resume force to continue with the new recipe"
    return ConfigError(f"{checkpoint} was made with another recipe: {'; '.join(changes)}; {advice}")
