"""Augment images in a DALI graph, node in, node out. Images are uint8 HWC until `normalise`.

No operator here draws a random number: everything random is data from the plan. Pixel for pixel they follow
Pillow, which timm and torchvision augment with; the few differences are stated where they are made.

DALI rewrites every function that a graph calls, so that an `if` may depend on a node. Functions without such
an `if` are marked, which saves 0.6 s of processor time at every start (measured, DALI 2.2).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline, types

from pipelines.rand_augment import Branch
from pipelines.spec import Channels, Interpolation

Node = Any  # nvidia.dali.data_node.DataNode, which ships without types
Pixels = NDArray[np.uint8]  # (H, W, 3)

do_not_convert = getattr(pipeline, "do_not_convert", lambda function: function)  # 1.34 converts all

# Both operators moved out of `experimental` between 1.34 and 2.x.
_equalize, _filter = (getattr(fn, n, None) or getattr(fn.experimental, n) for n in ("equalize", "filter"))

# Pillow truncates where DALI rounds to the nearest level. A little less than one half, so that a result that
# is a whole number in exact arithmetic survives a float32 error.
_TRUNCATE = 0.498


@do_not_convert
def resize(image: Node, size: Any, interpolation: Interpolation) -> Node:
    """Resize to `size` (height, width) with an antialiasing filter, as Pillow does."""
    kind = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}[interpolation]
    return fn.resize(image, size=size, interp_type=kind, antialias=True)


@do_not_convert
def normalise(image: Node, mean: Channels, std: Channels, fp16: bool, flips: Node | int = 0) -> Node:
    """Return (x / 255 - mean) / std of uint8 levels, HWC as torch's channels-last; `flips` 1 mirrors."""
    levels: Any = {"mean": [255.0 * value for value in mean], "std": [255.0 * value for value in std]}
    dtype = types.FLOAT16 if fp16 else types.FLOAT
    return fn.crop_mirror_normalize(image, mirror=flips, dtype=dtype, output_layout="HWC", **levels)


@do_not_convert
def warp(image: Node, matrix: Node, background: Pixels) -> Node:
    """Warp as Pillow's affine transform, but bilinearly; `matrix` (2, 3) is from destination to source."""
    # DALI's own fill is one number for all channels and bleeds inwards. So repeat the border, and fill what
    # lies outside of a warped white image: with a whole one, as broadcasting takes a CPU four times as long.
    white = types.Constant(np.full((*background.shape[:2], 1), 255, np.uint8), device=image.device)
    nearest = types.INTERP_NN
    inside = fn.warp_affine(white, matrix=matrix, fill_value=0, interp_type=nearest, inverse_map=True)
    inside = fn.color_space_conversion(inside, image_type=types.GRAY, output_type=types.RGB)
    warped = fn.warp_affine(image, matrix=matrix, interp_type=types.INTERP_LINEAR, inverse_map=True)
    behind = types.Constant(background, device=image.device)
    return ((warped ^ behind) & inside) ^ behind


@do_not_convert
def bits(image: Node, numbers: Node) -> Node:
    """Posterise, invert, solarise and solarise-add in one expression; `numbers` as in `LayerParams.bits`."""
    mask, flip, highest_kept, addition = (beside(image, numbers[place]) for place in range(4))
    inverted = (image > highest_kept) * _level(255)
    return (((image & mask) ^ flip) ^ inverted) + ((image < _level(128)) * addition)


@do_not_convert
def enhance(image: Node, factor: Node, about_mean: Node, about_grey: Node) -> Node:
    """Do on a GPU what `scale` does, or if `about_grey` is 1 `saturate`: 9 operators, where the two have 14.
    A centre that is computed on a GPU can be no argument of theirs.
    """
    grey = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
    rest = 1.0 - factor
    colours = image * beside(image, factor) + grey * beside(image, rest * about_grey)
    centre = fn.reductions.mean(grey) * beside(image, rest * about_mean)
    return fn.cast(colours + (centre - _TRUNCATE), dtype=types.UINT8)


@do_not_convert
def scale(image: Node, factor: Node, about_mean: Node) -> Node:
    """Change brightness, or contrast if `about_mean` is 1: scale about 0 or about the mean grey."""
    # On a CPU ten times as fast as `enhance`.
    grey = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
    centre, shift = fn.reductions.mean(grey) * about_mean, -_TRUNCATE / 255
    return fn.brightness_contrast(image, contrast=factor, contrast_center=centre, brightness_shift=shift)


@do_not_convert
def saturate(image: Node, factor: Node) -> Node:
    """Blend with the grey image: `factor * image + (1 - factor) * grey`."""
    # On a CPU four times as fast as DALI's matrix of colours, and half as far from Pillow.
    grey = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
    grey = fn.color_space_conversion(grey, image_type=types.GRAY, output_type=types.RGB)
    return fn.cast(_times(image, factor) + _times(grey, 1.0 - factor), dtype=types.UINT8)


@do_not_convert
def _times(image: Node, factor: Node) -> Node:
    """Return `factor * image` as int16, less half of what truncates a sum of two such."""
    # A shift counts in int16's range.
    options = {"contrast_center": 0.0, "brightness_shift": -_TRUNCATE / 2 / 32767, "dtype": types.INT16}
    return fn.brightness_contrast(image, contrast=factor, **options)


@do_not_convert
def equalize(image: Node) -> Node:
    """Equalise the histogram as Pillow up to rounding, with OpenCV's operator on the negative.

    OpenCV counts the values up to and including a level, Pillow those below it: in the negative, above it.
    """
    return _equalize(image ^ _level(255)) ^ _level(255)


@do_not_convert
def auto_contrast(image: Node) -> Node:
    """Stretch every channel to 0..255; a channel of one value stays as it is."""
    gpu = on_gpu(image)
    low = fn.reductions.min(image, axes=[0, 1], keep_dims=gpu)  # (3,), on a GPU (1, 1, 3)
    high = fn.reductions.max(image, axes=[0, 1], keep_dims=gpu)
    flat = high == low
    levels = (high - low + flat * _level(255)) / 255.0  # of the image that become one
    centre = low * (flat ^ True) + _TRUNCATE * levels
    if gpu:
        return fn.cast((image - centre) / levels, dtype=types.UINT8)
    # Twice as fast on a CPU as arithmetic that broadcasts, but its mean cannot come from a GPU.
    return fn.crop_mirror_normalize(image, mean=centre, std=levels, dtype=types.UINT8, output_layout="HWC")


def rand_augment_layer(
    image: Node, branch: Node, numbers: Sequence[Node], background: Pixels, blurs: bool = False
) -> Node:
    """Apply one layer of `LayerParams`: at most one branch per sample. `blurs`: whether one may blur."""
    matrix, bytes4, factors, kernel = numbers
    if branch == int(Branch.WARP):
        image = warp(image, matrix, background)
    if branch == int(Branch.BITS):
        image = bits(image, bytes4)
    if on_gpu(image):
        if (branch == int(Branch.SCALE)) | (branch == int(Branch.SATURATE)):
            image = enhance(image, factors[0], factors[1], branch == int(Branch.SATURATE))
    else:
        if branch == int(Branch.SCALE):
            image = scale(image, factors[0], factors[1])
        if branch == int(Branch.SATURATE):
            image = saturate(image, factors[0])
    if branch == int(Branch.SHARPEN):
        image = _filter(image, beside(image, kernel))  # unlike Pillow, it changes the outermost pixels, too
    if branch == int(Branch.EQUALIZE):
        image = equalize(image)
    if branch == int(Branch.AUTO_CONTRAST):
        image = auto_contrast(image)
    if blurs and branch == int(Branch.BLUR):
        image = fn.gaussian_blur(image, sigma=factors[0])  # mirrors the border; Pillow's boxes repeat it
    return image


def color_jitter(image: Node, branches: Node, factors: Node) -> Node:
    """Change brightness, contrast and saturation in every sample's own order (see `plan.JitterParams`)."""
    for slot in range(3):
        if on_gpu(image):
            grey = branches[slot] == int(Branch.SATURATE)
            image = enhance(image, factors[slot, 0], factors[slot, 1], grey)
        elif branches[slot] == int(Branch.SCALE):
            image = scale(image, factors[slot, 0], factors[slot, 1])
        else:
            image = saturate(image, factors[slot, 0])
    return image


@do_not_convert
def on_gpu(image: Node) -> bool:
    return bool(image.device == "gpu")


@do_not_convert
def beside(image: Node, node: Node) -> Node:
    """Return `node` on the device of `image`: an arithmetic operator needs its operands on one device."""
    return node.gpu() if on_gpu(image) else node


@do_not_convert
def _level(value: int) -> Any:
    return types.Constant(value, dtype=types.UINT8)
