"""What makes two runs the same run: the part of a configuration that decides what is learned."""

from collections.abc import Mapping
from typing import Any

# What may differ between the run that wrote a checkpoint and the run that goes on from it without changing what is
# learned. (train.max_batch_per_gpu may, because another number of GPUs is allowed to need another accumulation.)
FREE_SECTIONS = ("guard", "checkpoint", "evaluate", "metrics", "expect")
FREE_KEYS = (
    "run.name", "run.dir", "data.root", "data.decode", "data.hw_decoder_load", "data.threads", "data.prefetch_batches",
    "data.cache_dir", "data.max_bad_fraction", "train.max_batch_per_gpu", "train.log_every_steps",
    "train.step_timeout_seconds", "train.collective_timeout_seconds",
)  # fmt: skip


def recipe(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a run learns from and how, by dotted key: a dumped Config without what may differ when it goes on."""
    values = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    return {
        key: value for key, value in values.items() if key.split(".")[0] not in FREE_SECTIONS and key not in FREE_KEYS
    }
