"""Draw the images of a batch as one PNG, for people to check what the model is fed."""

import math
from pathlib import Path

from torch import Tensor

from pipelines.spec import Channels


def contact_sheet(
    images: Tensor, mean: Channels, std: Channels, path: Path | str, max_images: int = 64, columns: int = 0
) -> None:
    """Write the first of `images`, (B, 3, H, W) of any device and float type, as a PNG grid.

    mean, std: what the images were normalised with, which is undone. columns: 0 makes a square grid.
    """
    from torchvision.utils import save_image

    pixels = images[:max_images].float().cpu()
    pixels = pixels * pixels.new_tensor(std)[:, None, None] + pixels.new_tensor(mean)[:, None, None]
    save_image(pixels, path, format="PNG", nrow=columns or math.ceil(math.sqrt(len(pixels))), padding=0)
