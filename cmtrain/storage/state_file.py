"""One file of tensors and plain values: written with its checksum, read back without trusting it.

The format is torch.save's: a zip archive of one pickle and one record a tensor storage. Three things are not left to
torch. It notices no flipped bit (pytorch issues 28858, 126952), so the checksum is ours. weights_only=True runs no
code, but lets a file of 1 kB ask for memory without bound (tried on torch 2.15: `torch.Tensor(40000, 40000)`,
`bytearray(6 * 10**9)`, a deflated record of zeros), so nothing is built before the archive was looked through: all
records together no larger than the file, and no name in the pickle but those that our own states need. And a view may
claim more elements than its storage holds memory for (stride 0); the next copy of it would pay for them.
"""

import errno
import hashlib
import io
import os
import pickletools
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

MAX_PICKLE_BYTES = 2**25  # CMT-B's is 0.5 MB
_DTYPES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"} | {
    f"torch {name}Storage" for name in _DTYPES
}
# Opcodes that find something by name or number, other than GLOBAL, whose name can be read off.
_LOOKUPS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
# What opening or reading a file says when the file is at fault, and not the machine, its memory or its permissions.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ENXIO)


class CheckpointError(Exception):
    """A checkpoint that cannot be used, and why, in one line."""


@dataclass(frozen=True)
class Digest:
    """What a file must be. `sha256`: in hexadecimal digits."""

    num_bytes: int
    sha256: str


def write_state(path: Path, state: dict[str, Any]) -> Digest:
    """Write `state` (nested dicts, lists and tuples of tensors, numbers, strings), synced to the disk.

    Returns:
        The digest of what was meant to be written: comparing it with the file finds what the disk made of it.

    Raises:
        OSError, RuntimeError: the write failed (torch reports a full disk as RuntimeError).
    """
    with open(path, "wb") as file:
        hashing = _Hashing(file)
        torch.save(state, cast(IO[bytes], hashing))
        file.flush()
        os.fsync(file.fileno())
        # Whoever reads it next reads what the disk holds, and the images keep their place in the page cache.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Digest(hashing.num_bytes, hashing.sha256.hexdigest())


def verify(path: Path, expected: Digest) -> None:
    """Raises CheckpointError: `path` is not a file with that digest. OSError: the machine cannot read it."""
    with open_regular(path) as file:
        _verify(file, path, expected)


def read_state(path: Path, expected: Digest) -> dict[str, Any]:
    """Verify `path` and load it, onto the CPU.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors and plain values of its own size.
        OSError: the machine cannot read it (permissions, too many open files); that says nothing about the file.
    """
    with open_regular(path) as file:
        _verify(file, path, expected)
        try:
            _look_through(file, expected.num_bytes)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise CheckpointError(f"holds a {type(state).__name__} where a dict should be")
            for tensor in tensors_of(state):
                if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                    raise CheckpointError(
                        f"a tensor of shape {tuple(tensor.shape)} has less memory than elements"
                    )
        except (OSError, MemoryError):
            raise
        except (
            Exception
        ) as error:  # whatever zipfile, pickletools and torch make of a file that someone forged
            text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path}: {text.splitlines()[0]}") from error
    return state


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading: no symbolic link, no device, and no pipe that would block.

    Raises:
        CheckpointError: there is none. OSError: the machine cannot open it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        what = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise CheckpointError(f"{path}: {what}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: not a regular file")
    return open(descriptor, "rb")


def _verify(file: io.BufferedReader, path: Path, expected: Digest) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != expected.num_bytes:
        raise CheckpointError(f"{path}: {size} bytes, the manifest says {expected.num_bytes}")
    try:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if found != expected.sha256:
        raise CheckpointError(f"{path}: sha256 differs from the manifest's")


def _look_through(file: io.BufferedReader, num_bytes: int) -> None:
    """Refuse what loading would be too late to refuse. Reads the directory of the archive and its pickle."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if sum(record.file_size for record in records) > num_bytes:
            raise CheckpointError("its records claim to be larger than the file")
        pickles = [record for record in records if record.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"must hold one data.pkl of at most {MAX_PICKLE_BYTES} bytes")
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name in _LOOKUPS or (opcode.name == "GLOBAL" and argument not in _NAMES):
                raise CheckpointError(
                    f"names {argument or opcode.name}, and may hold tensors and plain values only"
                )


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested dicts, lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_of(value)


class _Hashing:
    """Writes to `file`, and knows what was meant to be written."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.sha256, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        self.num_bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        """torch.save asks for it."""
