"""Draw the images of a batch as one PNG, for people to check what the model is fed."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import pad

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
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    pixels = images[:max_images].float().cpu()
    pixels = pixels * pixels.new_tensor(std)[:, None, None] + pixels.new_tensor(mean)[:, None, None]
    columns = min(columns or math.ceil(math.sqrt(len(pixels))), len(pixels))
    strip_px = LINE_PX * len(captions[0]) + 3 if captions else 0
    if captions:
        scale = math.ceil(TILE_PX / pixels.shape[-1])
        pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        pixels = pad(pixels, (0, 0, 0, strip_px), value=1.0)
    sheet = to_pil_image(make_grid(pixels, columns, padding=0).mul(255).add(0.5).clamp(0, 255).byte())
    height, width = pixels.shape[2:]
    for place, lines in enumerate(captions[:max_images]):
        strip = Image.new("RGB", (width, strip_px), "white")  # cuts off what is too long
        text = "\n".join(map(visible, lines))
        ImageDraw.Draw(strip).text((2, 0), text, "black", ImageFont.load_default(LINE_PX - 2), spacing=1)
        sheet.paste(strip, (place % columns * width, (place // columns + 1) * height - strip_px))
    sheet.save(path, "PNG")
