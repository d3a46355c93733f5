"""`cmtrain demo`: the production path, from JPEG files to a trained model, in minutes and on any machine."""

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

    An interrupted demo goes on where it stopped; a finished one is left alone and a new run folder is taken.

    Raises:
        ConfigError: what is wrong with `overrides`.
    """
    given = PHOTOS if photos else []
    base = "demo-photos" if photos else "demo"
    attempt = 1
    while True:
        name = base if attempt == 1 else f"{base}-{attempt}"
        config = load_config(
            find_config("configs/demo.yaml"), [*given, ("run.name", name), *overrides]
        ).config
        status = read_status(Path(config.run.dir) / str(config.run.name))
        if (
            status is None
            or status.get("state") != "finished"
            or any(key == "run.name" for key, _ in overrides)
        ):
            break
        attempt += 1
    from cmtrain.training.train import train  # torch is loaded here, after the mistakes

    return train(config)
