"""Draw the images of a batch as one PNG, for people to check what the model is fed."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from pipelines.spec import Channels


def contact_sheet(
    images: Tensor, mean: Channels, std: Channels, path: Path | str, max_images: int = 64, columns: int = 0
) -> None:
    """Write the first of `images`, (B, 3, H, W) of any device and float type, as a PNG grid.

    mean, std: what the images were normalised with, which is undone. columns: 0 makes a square grid.
    """
    pixels = images[:max_images].float().cpu().permute(0, 2, 3, 1).numpy()  # (B, 3, H, W) -> (B, H, W, 3)
    levels = np.clip(np.rint((pixels * np.array(std) + np.array(mean)) * 255), 0, 255).astype(np.uint8)
    count, height, width, _ = levels.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height))
    for index, image in enumerate(levels):
        sheet.paste(Image.fromarray(image), (index % columns * width, index // columns * height))
    sheet.save(path, format="PNG")
