"""Choose the sizes at which `cmtrain eval` evaluates. Needs no torch."""

from collections.abc import Sequence

from cmtrain.config.schema import Config
from cmtrain.errors import ConfigError


def sizes_of(config: Config, image_px: Sequence[int], resize_px: Sequence[int]) -> list[tuple[int, int]]:
    """Return pairs of image side and shorter side before the crop, each with each, in the order given.

    Without `resize_px` the run's own is scaled with the image side.

    Raises:
        ConfigError: a crop larger than the image, or a side that the model cannot have.
    """
    data = config.data
    pairs = []
    for side in image_px or (data.image_px,):
        if side % 32:
            raise ConfigError(f"--image-px: must be multiples of 32, got {side}")
        for resize in resize_px or (round(data.eval_resize_px * side / data.image_px),):
            if resize < side:
                raise ConfigError(f"--resize-px: {resize} is less than the image side {side}")
            pairs.append((side, resize))
    return pairs
