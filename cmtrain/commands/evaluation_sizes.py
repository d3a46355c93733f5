"""Choose the sizes at which `cmtrain eval` evaluates. Needs no torch."""

from collections.abc import Sequence

from cmtrain.config.schema import Config
from cmtrain.errors import ConfigError


def sizes_of(config: Config, image_px: Sequence[int], resize_px: Sequence[int]) -> list[tuple[int, int]]:
    """Return pairs of image side and shorter side before the crop, in the order given.
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
