"""Write tensors and plain values to one file with a checksum, and read them back without trusting the file.

The format is safetensors. The metadata of its header holds the state as JSON, in which a list begins with
its kind: ["dict", [key, value], ...], ["list", value, ...], ["tuple", value, ...] or ["tensor", name,
stride, ...]. Loading runs no code and takes no memory beyond the file's size. safetensors' own writer keeps
neither strides (of channels-last weights) nor a checksum of what was meant to be written.
"""

import errno
import hashlib
import io
import itertools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from cmtrain.storage import records

MAX_HEADER_BYTES = 2**25  # CMT-B's has 1.1 MB
MAX_DEPTH = 32
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


class CheckpointError(Exception):
    """A checkpoint that cannot be used, and why, in one line."""


class Digest(NamedTuple):
    """Size and SHA-256 (in hexadecimal digits) that a file must have."""

    num_bytes: int
    sha256: str


def write_state(path: Path, state: dict[str, Any]) -> Digest:
    """Write `state` (nested dicts, lists and tuples of tensors, numbers, strings), synced to the disk.
    Returns the digest of what was meant to be written. Raises OSError, CheckpointError: an unknown type.
    """
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {"__metadata__": {"state": json.dumps(_to_json(state, (), tensors))}}
    # Tensors of large elements come first: the format wants each one aligned.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        kind = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = kind | {"data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"the state without its tensors takes more than {MAX_HEADER_BYTES} bytes")
    sha256 = hashlib.sha256()
    with open(path, "wb") as file:
        contents = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for _, t in ordered)
        begin_of_file: list[Any] = [len(text).to_bytes(8, "little") + text]
        for data in itertools.chain(begin_of_file, contents):
            sha256.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        # The next reader gets what the disk holds, and the images keep their place in the page cache.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Digest(8 + len(text) + end, sha256.hexdigest())


def read_state(path: Path, expected: Digest) -> dict[str, Any]:
    """Verify `path` and load it, onto the CPU. Raises CheckpointError: damaged, or not by write_state.
    OSError: the machine cannot read it (permissions, too many open files); the file may be good.
    """
    with open_regular(path) as file:
        verify(file, path, expected)
        try:
            file.seek(0)
            if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
                raise CheckpointError(f"its header has more than {MAX_HEADER_BYTES} bytes")
            # By its descriptor: this is the very file that was verified.
            with safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt") as archive:
                tree = json.loads((archive.metadata() or {})["state"])
                state = _from_json(tree, archive, set(archive.keys()))
            if not isinstance(state, dict):
                raise CheckpointError(f"holds a {type(state).__name__} where a dict should be")
        except (OSError, MemoryError):
            raise
        except Exception as error:  # whatever safetensors, json and torch make of a forged file
            text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path}: {text.splitlines()[0][:200]}") from error
    return state


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file, no link to one. Raises CheckpointError: there is none. OSError: not readable."""
    try:
        return records.open_regular(path, os.O_NOFOLLOW)
    except records.DamagedRecordError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        if error.errno not in records.LASTING:
            raise
        what = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise CheckpointError(f"{path}: {what}") from error


def verify(file: io.BufferedReader, path: Path, expected: Digest) -> None:
    """Raises CheckpointError: `file`, at `path`, has another digest. OSError: the machine cannot read it."""
    if (size := os.fstat(file.fileno()).st_size) != expected.num_bytes:
        raise CheckpointError(f"{path}: {size} bytes, the manifest has {expected.num_bytes}")
    if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
        raise CheckpointError(f"{path}: sha256 differs from the manifest's")


def _to_json(value: Any, place: tuple[Any, ...], tensors: dict[str, Tensor]) -> Any:
    """Return `value`, found at the keys `place` of the state, as JSON; put its tensors into `tensors`."""
    where = "/".join(map(str, place))
    if len(place) > MAX_DEPTH:
        raise CheckpointError(f"{where[:60]}...: nested more than {MAX_DEPTH} deep")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor) and value.dtype in DTYPES:
        while where in tensors or where == "__metadata__":  # the keys 1 and "1" give the same name
            where += "'"
        by_stride = sorted(range(value.dim()), key=value.stride, reverse=True)
        has_gaps = not value.permute(by_stride).is_contiguous()  # a slice, or expanded
        tensors[where] = value.contiguous() if has_gaps else value
        return ["tensor", where, *tensors[where].stride()]
    if isinstance(value, dict) and all(type(key) in (int, str) for key in value):
        return ["dict", *([key, _to_json(child, (*place, key), tensors)] for key, child in value.items())]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, *(_to_json(child, (*place, index), tensors) for index, child in enumerate(value))]
    what = value.dtype if isinstance(value, Tensor) else type(value).__name__
    raise CheckpointError(f"{where}: cannot save a {what}; only tensors, numbers, strings, dicts of them")


def _from_json(tree: Any, archive: safe_open, unread: set[str], depth: int = 0) -> Any:
    """Build a state from JSON that may be forged, and from tensors of a safetensors file, `unread` yet."""
    if depth > MAX_DEPTH:
        raise CheckpointError(f"nested more than {MAX_DEPTH} deep")
    match tree:
        case None | bool() | int() | float() | str():
            return tree
        case ["tensor", str(name), *strides]:
            if name not in unread:  # each once: else a small file could ask for much memory
                raise CheckpointError(f"has no tensor {name[:60]!r}, or names it twice")
            unread.remove(name)
            stored = archive.get_tensor(name)  # copied, because its memory is the mapped file
            # as_strided refuses strides that lead out of this memory.
            memory = torch.empty(stored.numel(), dtype=stored.dtype)
            return memory.as_strided(stored.shape, strides).copy_(stored)
        case ["dict", *pairs]:
            return {key: _from_json(child, archive, unread, depth + 1) for key, child in pairs}
        case ["list" | "tuple" as kind, *children]:
            values = [_from_json(child, archive, unread, depth + 1) for child in children]
            return values if kind == "list" else tuple(values)
    raise CheckpointError(f"describes no value by {str(tree)[:60]}")
