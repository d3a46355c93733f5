"""Define the contracts of a loader as plain data. Importing this loads neither DALI nor torch."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

Interpolation = Literal["bicubic", "bilinear"]
Decode = Literal["auto", "mixed", "mixed_whole", "cpu"]
Channels = tuple[float, float, float]

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)

UNREADABLE = -1  # label of a validation image that cannot be read; wrong, whatever the model answers
MAX_BAD_FRACTION = 0.1  # default share of a split's files that may be unreadable; more: another problem

_ADVICE = {
    errno.EISDIR: "a folder has the place of a file; move it away",
    errno.ENOTDIR: "a file has the place of a folder; move it away",
    errno.EACCES: "give this user the right to read it, or move it away",
    errno.ELOOP: "a link leads back to itself; remove it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOENT: "was it moved, or is a disk not mounted?", errno.ENOSPC: "make room",
}  # fmt: skip
_TRY_AGAIN = "the machine is at fault, not the file: nothing was left out; run the same command again"


class DataError(Exception):
    """A fault of the data or the machine, not of the configuration, in one clear line (exit code 3)."""

    @staticmethod
    def of(error: OSError, path: object = None) -> "DataError":
        """Return what an error of the operating system means, in one line; `path` if it names none."""
        place = path if error.filename is None else os.fsdecode(error.filename)
        return DataError(f"{place}: {error.strerror or error}; {_ADVICE.get(error.errno or 0, _TRY_AGAIN)}")


@contextmanager
def os_errors_in_one_line(path: object = None) -> Iterator[None]:
    """Raise DataError for an OSError of the block that names a file, or for any if `path` is given."""
    try:
        yield
    except OSError as error:
        if error.filename is None and path is None:  # it may be of standard output
            raise
        raise DataError.of(error, path) from error


def is_device(path: str | os.PathLike[str]) -> bool:
    """Return whether a path names a device, such as /dev/stdout: a rename, by root, would replace it."""
    is_below = os.path.abspath(path).startswith(("/dev/", "/proc/"))
    return is_below and os.path.exists(path) and (os.path.islink(path) or not os.path.isfile(path))


def is_url(root: str) -> bool:
    """Return whether data.root names a bucket or a web server instead of a folder."""
    return re.match(r"(s3|gs|az|https?)://", root) is not None


def visible(text: object) -> str:
    r"""Return text for people; what is not printable, as it could forge a line, is an escape (\n, \x1b)."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def print_lines(*lines: object) -> None:
    """Print lines for people on stderr, at once, with what is not printable as escapes."""
    sys.stderr.write("".join(f"{visible(line)}\n" for line in lines))
    sys.stderr.flush()


class Batch(NamedTuple):
    """One micro-batch on the device."""

    images: "torch.Tensor"  # (B, 3, H, W) normalised, fp16 or fp32, channels-last memory
    labels: "torch.Tensor"  # (B,) int64; UNREADABLE in evaluation only
    indices: "torch.Tensor"  # (B,) int64 into the manifest, so that a bad sample can be named


@dataclass(frozen=True)
class AugmentSpec:
    """Training: random resized crop, flip, RandAugment, colour jitter, normalise, in that order."""

    image_px: int
    interpolation: Interpolation = "bicubic"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float | None = None  # strength of brightness, contrast and saturation, as torchvision's
    rand_augment: str | None = None  # "rand-m9-mstd0.5-inc1" (timm) or another text of `rand_augment.parse`
    mean: Channels = IMAGENET_MEAN
    std: Channels = IMAGENET_STD
    fp16: bool = False


@dataclass(frozen=True)
class EvalSpec:
    """Evaluation transform: shorter side to `resize_px`, centre crop of `image_px`, normalise."""

    image_px: int
    resize_px: int
    interpolation: Interpolation = "bicubic"
    mean: Channels = IMAGENET_MEAN
    std: Channels = IMAGENET_STD
    fp16: bool = False


@dataclass(frozen=True)
class Placement:
    """Rank, device and limits of a process's loaders."""

    rank: int = 0
    world: int = 1
    device: "torch.device | str" = "cpu"
    # "mixed": the GPU decodes crop windows; "mixed_whole": whole images; "auto": "mixed", without GPU "cpu"
    decode: Decode = "auto"
    threads: int = 1  # DALI's, in this process
    prefetch_batches: int = 2  # micro-batches in flight, those of the next epoch included
    max_bad_fraction: float = MAX_BAD_FRACTION  # of files, found bad in a run; one may be, unless this is 0
    hw_decoder_load: float | None = None  # see `graphs.Execution`


class Loader(Protocol):
    """Source of batches. It keeps no position of its own: the trainer's progress is the truth."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch, after `start` samples that all ranks together have consumed."""
        ...

    def close(self) -> None:
        """Free threads and memory."""
        ...
