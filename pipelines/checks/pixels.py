"""Decode an image with Pillow to the pixels that DALI gives the training; pixel for pixel where it can be.

All that is not DALI decodes here: `cmtrain data stats` and `data pack`. They differ by one grey level at
most, in PNG with 16 bits in each of several channels: Pillow gives the higher byte, DALI rounds (DALI 1.34
takes the higher byte of every 16-bit PNG).
"""

import numpy as np
from PIL import Image

# Of the 5 or 6 bits of a channel DALI leaves the lower bits zero, where Pillow stretches them to 0..255.
_BITS_KEPT = {"BGR;15": (0xF8, 0xF8, 0xF8), "BGR;16": (0xF8, 0xFC, 0xF8)}


def grey_or_rgb(image: Image.Image) -> Image.Image:
    """Return the pixels of an open image in mode L if it is grey, else RGB. Raises what Pillow raises.

    Alpha is dropped, not blended; EXIF rotation and colour profiles are not applied.
    """
    tiles = getattr(image, "tile", None)  # how its bytes are to be decoded
    raw_mode = tiles[0].args[0] if image.format == "BMP" and tiles else None
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("1", "L", "LA"):
        return image.convert("L")
    image.info.pop("transparency", None)  # Pillow warns of one in a palette, and does not need it
    rgb = image.convert("RGB")
    if raw_mode in _BITS_KEPT:
        rgb = Image.fromarray(np.asarray(rgb) & np.array(_BITS_KEPT[raw_mode], np.uint8))
    return rgb
