"""Draw the images of a batch as one PNG, for people to check what the model is fed."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.spec import Channels, visible

MAX_IMAGES = 64
TILE_PX, LINE_PX = 128, 13  # least side of an image with a caption; height of a line of that


def contact_sheet(
    images: Tensor, mean: Channels, std: Channels, path: Path | str, max_images: int = MAX_IMAGES,
    columns: int = 0, captions: Sequence[Sequence[str]] = (),
) -> None:  # fmt: skip
    """Write the first of `images`, (B, 3, H, W) of any device and float type, as a PNG grid.

    mean, std: what the images were normalised with, which is undone. columns: 0 makes a square grid.
    captions: lines to write below each image, the same number for each; small images are then enlarged.
    """
    pixels = images[:max_images].float().cpu()
    pixels = pixels * pixels.new_tensor(std)[:, None, None] + pixels.new_tensor(mean)[:, None, None]
    levels = pixels.mul(255).add(0.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    columns = min(columns or math.ceil(math.sqrt(len(levels))), len(levels))
    scale = math.ceil(TILE_PX / levels.shape[2]) if captions else 1
    height, width = levels.shape[1] * scale, levels.shape[2] * scale
    tile_height = height + (LINE_PX * len(captions[0]) + 3 if captions else 0)
    sheet = Image.new("RGB", (columns * width, math.ceil(len(levels) / columns) * tile_height))
    for place, image in enumerate(levels):
        tile = Image.new("RGB", (width, tile_height), "white")  # cuts off what is too long
        tile.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST))
        text = "\n".join(map(visible, captions[place])) if captions else ""
        ImageDraw.Draw(tile).text((2, height), text, "black", ImageFont.load_default(LINE_PX - 2), spacing=1)
        sheet.paste(tile, (place % columns * width, place // columns * tile_height))
    sheet.save(path, "PNG")
