"""Draw the images of a batch as one PNG, for people to check what the model is fed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines.spec import Channels


def contact_sheet(
    batch_images: torch.Tensor,
    mean: Channels,
    std: Channels,
    path: Path | str,
    max_images: int = 64,
    columns: int | None = None,
) -> None:
    """Write the first images of a batch, normalisation undone, as a PNG grid.

    Args:
        batch_images: (B, 3, H, W) normalised, any device and float type.
        mean, std: constants that the images were normalised with.
        path: the PNG to write; its folder must exist.
        max_images: largest number of images shown.
        columns: images in a row; None makes a square grid.
    """
    images = (
        batch_images[:max_images].float().cpu().permute(0, 2, 3, 1).numpy()
    )  # (B, 3, H, W) -> (B, H, W, 3)
    levels = np.clip(np.rint((images * np.array(std) + np.array(mean)) * 255), 0, 255).astype(np.uint8)
    count, height, width, _ = levels.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height))
    for index, image in enumerate(levels):
        sheet.paste(Image.fromarray(image), (index % columns * width, index // columns * height))
    sheet.save(path, format="PNG")
