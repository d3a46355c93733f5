"""Train a small model on images from installed packages, from JPEG files to a report (`cmtrain demo`)."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from cmtrain.config.load import find_config, load_config
from cmtrain.storage.run_folder import read_status

PHOTOS = [
    ("data.root", "demo:photos"),
    ("data.image_px", "64"),
    ("data.eval_resize_px", "72"),
    ("augment.hflip", "0.5"),
    ("expect.top1", "0.85"),
]


def demo(photos: bool, overrides: Sequence[tuple[str, str]]) -> int:
    """Train configs/demo.yaml on the digits or the photographs. Returns the process exit code.

    An interrupted demo continues. A finished one is left alone, and a new run folder is taken.

    Raises:
        ConfigError: a mistake in `overrides`.
    """
    base = "demo-photos" if photos else "demo"
    given = PHOTOS if photos else []
    for attempt in itertools.count(1):
        name = base if attempt == 1 else f"{base}-{attempt}"
        values = [*given, ("run.name", name), *overrides]
        config = load_config(find_config("configs/demo.yaml"), values).config
        status = read_status(Path(config.run.dir) / str(config.run.name)) or {}
        if status.get("state") != "finished" or any(key == "run.name" for key, _ in overrides):
            break
    from cmtrain.training.train import train  # torch is loaded here, after the mistakes

    return train(config)
