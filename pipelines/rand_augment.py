"""Turn RandAugment into numbers: which operation, how strong, in a form that a short DALI graph can execute.

A layer of a sample is one of eight kinds of pixel work (`Branch`) and its numbers. Meaning and ranges are
those of timm's `rand_augment_transform` and of `nvidia.dali.auto_aug.rand_augment` (RandAugment: arXiv
1909.13719), of timm's `auto_augment_policy_3a` (three-augment: DeiT III, arXiv 2204.07118), and of
torchvision's `TrivialAugmentWide` (arXiv 2103.10158).
"""

import math
import re
from enum import IntEnum
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Severity = Literal["timm", "timm_increasing", "dali", "3a", "wide"]

# Uniforms used by one layer of one sample: operation, gate, sign, and two for the noise of the magnitude.
NUM_LAYER_DRAWS = 5
_OP, _GATE, _SIGN, _NOISE_RADIUS, _NOISE_ANGLE = range(NUM_LAYER_DRAWS)

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # of Pillow, the base of its sharpness
_IDENTITY = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])


class Branch(IntEnum):
    """The kinds of pixel work in the graph."""

    NONE, WARP, BITS, SCALE, SATURATE, SHARPEN, EQUALIZE, AUTO_CONTRAST, BLUR = range(9)


BRANCH_OF = {
    "AutoContrast": Branch.AUTO_CONTRAST, "Equalize": Branch.EQUALIZE, "Invert": Branch.BITS,
    "Rotate": Branch.WARP, "Posterize": Branch.BITS, "Solarize": Branch.BITS, "SolarizeAdd": Branch.BITS,
    "Color": Branch.SATURATE, "Contrast": Branch.SCALE, "Brightness": Branch.SCALE,
    "Sharpness": Branch.SHARPEN, "ShearX": Branch.WARP, "ShearY": Branch.WARP, "TranslateX": Branch.WARP,
    "TranslateY": Branch.WARP, "Identity": Branch.NONE, "Desaturate": Branch.SATURATE,
    "GaussianBlur": Branch.BLUR,
}  # fmt: skip
_TIMM_OPS = tuple(name for name in BRANCH_OF if name not in {"Identity", "Desaturate", "GaussianBlur"})
_DALI_OPS = (*(name for name in _TIMM_OPS if name not in {"Invert", "SolarizeAdd"}), "Identity")
_THREE_OPS = ("Solarize", "Desaturate", "GaussianBlur")


class Policy(NamedTuple):
    """`num_layers` operations drawn with replacement, each applied with `prob`."""

    ops: tuple[str, ...]
    num_layers: int
    prob: float
    magnitude: float  # fraction of the operations' ranges
    magnitude_std: float  # likewise; infinite: uniform in [0, magnitude]
    # How posterise, solarise and enhancements read it; of "3a" only the blur, of "wide" all, in 31 levels
    severity: Severity
    translate: float  # fraction of the image that a shift covers at full magnitude


class LayerParams(NamedTuple):
    """Numbers of n layers for B samples. A branch reads its own only; the others hold anything finite."""

    branches: NDArray[np.int32]  # (B, n) Branch
    matrices: NDArray[np.float32]  # (B, n, 2, 3) destination to source pixels, origin at the image's corner
    bits: NDArray[np.uint8]  # (B, n, 4) mask, flip, highest value that is not inverted, addition below 128
    factors: NDArray[np.float32]  # (B, n, 2) enhancement factor or blur sigma_px, 1 if it is about the mean
    kernels: NDArray[np.float32]  # (B, n, 3, 3) sharpness filter


@cache
def parse(text: str) -> Policy:
    """Read "rand-m9-n2-p0.5-mstd0.5-inc1" or "3a" (as timm does), "ta_wide", "reimpl" or "dali-n2-m9".

    "3a" is grey, solarise (from 128) or blur (sigma 0.1 to 2 pixels). "reimpl" is the re-implementation's:
    magnitude 10, two layers, probability 0.5, no noise, not increasing. ValueError names the wrong part.
    """
    if text == "reimpl":
        return parse("rand-m10-n2-p0.5")
    if text == "3a":
        return Policy(_THREE_OPS, 1, 1.0, 1.0, math.inf, "3a", 0.0)
    if text == "ta_wide":
        return Policy(_DALI_OPS, 1, 1.0, 1.0, math.inf, "wide", 0.0)
    family, *parts = text.split("-")
    known = {"rand": ("m", "n", "p", "mstd", "inc"), "dali": ("m", "n")}.get(family)
    if known is None:
        examples = "'rand-m9-mstd0.5-inc1', '3a', 'ta_wide', 'reimpl', 'dali-n2-m9'"
        raise ValueError(f"{text!r} is none of {examples}")
    values: dict[str, float] = {}
    for part in parts:
        if (found := re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)) is None or found[1] not in known:
            names = ", ".join(known)
            raise ValueError(f"{text!r}: unknown part {part!r}; known are {names}, each with its number")
        if found[1] in {"m", "n", "inc"} and not found[2].isdigit():
            raise ValueError(f"{text!r}: {part!r} needs a whole number")
        values[found[1]] = float(found[2])
    num_layers, prob = int(values.get("n", 2)), values.get("p", 0.5)
    if num_layers < 1 or prob > 1:
        raise ValueError(f"{text!r}: n must be at least 1 and p at most 1")
    if family == "dali":
        if (magnitude_bin := values.get("m", 9.0)) > 30:
            raise ValueError(f"{text!r}: m{magnitude_bin:g} is not one of DALI's magnitude bins 0..30")
        return Policy(_DALI_OPS, num_layers, 1.0, magnitude_bin / 30, 0.0, "dali", 100 / 224)
    std = values.get("mstd", 0.0)
    std = math.inf if std > 100 else std / 10  # above 100 means uniform in timm
    severity: Severity = "timm_increasing" if values.get("inc") else "timm"
    return Policy(_TIMM_OPS, num_layers, prob, values.get("m", 10.0) / 10, std, severity, 0.45)


def layer_params(policy: Policy, draws: Floats, image_px: int) -> LayerParams:
    """Turn uniforms (B, n, NUM_LAYER_DRAWS) into operations on square images of `image_px`."""
    op = (draws[..., _OP] * len(policy.ops)).astype(np.int64)  # (B, n)
    sign = np.where(draws[..., _SIGN] < 0.5, -1.0, 1.0)
    if math.isinf(policy.magnitude_std):
        magnitude = policy.magnitude * draws[..., _NOISE_ANGLE]
        if policy.severity == "wide":
            magnitude = np.floor(31 * magnitude) / 30
    else:  # Box-Muller; 1 - u keeps the logarithm finite
        radius = np.sqrt(-2.0 * np.log(1.0 - draws[..., _NOISE_RADIUS]))
        noise = radius * np.cos(2.0 * np.pi * draws[..., _NOISE_ANGLE])
        magnitude = policy.magnitude + policy.magnitude_std * noise
    params = op_params(policy, op, np.clip(magnitude, 0.0, 1.0), sign, image_px)
    applied = draws[..., _GATE] < policy.prob
    return params._replace(branches=np.where(applied, params.branches, np.int32(Branch.NONE)))


def op_params(policy: Policy, op: Ints, magnitude: Floats, sign: Floats, image_px: int) -> LayerParams:
    """Return the numbers of operations `op`, places in `policy.ops`, at `magnitude` 0..1; all (B, n)."""
    index_of = {name: index for index, name in enumerate(policy.ops)}
    is_op = {name: op == index_of.get(name, -1) for name in BRANCH_OF}
    if policy.severity == "3a":
        factor = np.where(is_op["GaussianBlur"], 0.1 + 1.9 * magnitude, 0.0)
        magnitude = np.full_like(magnitude, 0.5)  # of solarise
    else:
        strength = 0.99 if policy.severity == "wide" else 0.9
        factor = 1.8 * magnitude + 0.1 if policy.severity == "timm" else 1.0 + strength * magnitude * sign
    return LayerParams(
        branches=np.array([BRANCH_OF[name] for name in policy.ops], np.int32)[op],
        matrices=_matrices(is_op, magnitude * sign, policy, image_px),
        bits=_bits(is_op, magnitude, policy.severity),
        factors=np.stack([factor, is_op["Contrast"]], axis=-1).astype(np.float32),
        kernels=(_SMOOTH + factor[..., None, None] * (_IDENTITY - _SMOOTH)).astype(np.float32),
    )


def _matrices(is_op: dict[str, Mask], signed: Floats, policy: Policy, px: int) -> NDArray[np.float32]:
    degrees, shear, shift = 30.0, 0.3 * signed, policy.translate * px * signed
    if policy.severity == "wide":
        degrees, shear, shift = 135.0, 0.99 * signed, np.trunc(32 * signed)
    angle = -np.deg2rad(degrees) * signed * is_op["Rotate"]
    cos, sin = np.cos(angle), np.sin(angle)
    # Sums, because at most one operation's terms differ from the identity.
    x = [cos, sin + shear * is_op["ShearX"], px / 2 * (1 - cos - sin) + shift * is_op["TranslateX"]]
    y = [-sin + shear * is_op["ShearY"], cos, px / 2 * (1 - cos + sin) + shift * is_op["TranslateY"]]
    return np.stack(x + y, axis=-1).reshape(*signed.shape, 2, 3).astype(np.float32)


def _bits(is_op: dict[str, Mask], magnitude: Floats, severity: str) -> NDArray[np.uint8]:
    kept_bits, threshold = np.floor(magnitude * 4), np.floor(magnitude * 256)
    if severity == "timm_increasing":
        kept_bits, threshold = 4 - kept_bits, 256 - threshold
    elif severity == "dali":
        kept_bits, threshold = np.rint(8 - 4 * magnitude), np.ceil(256 - 256 * magnitude)
    elif severity == "wide":
        kept_bits, threshold = 8 - np.rint(6 * magnitude), np.ceil(np.round(255 - 255 * magnitude, 6))
    threshold = np.where(is_op["Solarize"], threshold, 256)
    # timm keeps no bit at either end of its scale; Pillow refuses that; older versions made it black.
    mask = np.where(is_op["Posterize"], 256 - 2.0 ** (8 - np.maximum(kept_bits, 1)), 255)
    # "All values" needs a 257th threshold, which a byte does not have: that is a plain inversion.
    flip = np.where(is_op["Invert"] | (threshold == 0), 255, 0)
    highest_kept = np.where(threshold == 0, 255, threshold - 1)
    addition = np.where(is_op["SolarizeAdd"], np.floor(magnitude * 110), 0)
    return np.stack([mask, flip, highest_kept, addition], axis=-1).astype(np.uint8)
