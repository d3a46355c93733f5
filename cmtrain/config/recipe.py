"""What makes two runs the same run: the part of a configuration that decides what is learned."""

from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from cmtrain.config.schema import Config

# What may differ between the run that wrote a checkpoint and the run that goes on from it without changing what is
# learned. (train.max_batch_per_gpu may, because another number of GPUs is allowed to need another accumulation;
# model.ffn_kernel and train.compile, because they are other ways to the same numbers, on other hardware.)
FREE_SECTIONS = ("guard", "checkpoint", "evaluate", "metrics", "expect")
FREE_KEYS = (
    "run.name", "run.dir", "data.root", "data.decode", "data.hw_decoder_load", "data.threads", "data.prefetch_batches",
    "data.cache_dir", "data.max_bad_fraction", "model.ffn_kernel", "train.compile", "train.compile_mode",
    "train.max_batch_per_gpu", "train.log_every_steps", "train.step_timeout_seconds",
    "train.collective_timeout_seconds",
)  # fmt: skip


def recipe(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a run learns from and how, by dotted key: a Config dumped to JSON without what may differ when it goes on.

    A key that an older version of cmtrain did not have counts as today's default, which is what that version did.
    """
    values = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    return {
        key: value
        for key, value in (_defaults() | values).items()
        if key.split(".")[0] not in FREE_SECTIONS and key not in FREE_KEYS
    }


def _defaults() -> dict[str, Any]:
    sections: dict[str, Any] = {section: field.annotation for section, field in Config.model_fields.items()}
    return {
        f"{section}.{key}": to_jsonable_python(field.default)
        for section, model in sections.items()
        for key, field in model.model_fields.items()
        if field.default is not PydanticUndefined
    }
