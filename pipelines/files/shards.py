"""Read packed shards: many images in few tar files, at random, through one index.

A packed split is a folder of `shard-000000.tar`, ... and `index.npz`. The shards are plain tar files in
webdataset's layout (`00000042.jpg`, then `00000042.cls` with the label). The index holds what a manifest
holds, and where every image is. It is written last: a folder without it is not a data set.
"""

import hashlib
import mmap
import zipfile
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipelines.checks.decode_one import patiently
from pipelines.files.listing import Paths
from pipelines.progress import tracked
from pipelines.spec import DataError, os_errors_in_one_line

INDEX = "index.npz"
# What reading a damaged one raises
NO_INDEX = ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile, zlib.error
HELP_SECONDS = 2.0  # a process waits so long for what another one has to fetch, then fetches it


@dataclass(frozen=True, eq=False)
class Slices:
    """Places of the encoded bytes of N images in their shards."""

    folder: Path
    shard_names: tuple[str, ...]  # (S,)
    shard_bytes: NDArray[np.int64]  # (S,)
    shard_sha256: tuple[str, ...]  # (S,)
    shards: NDArray[np.int32]  # (N,) into shard_names
    offsets: NDArray[np.int64]  # (N,)
    size_bytes: NDArray[np.int64]  # (N,)
    checksums: NDArray[np.uint32]  # (N,) CRC-32
    mirror: Any = None  # a `mirror.Mirror` if the folder is a copy of a bucket's, which may lack images

    @os_errors_in_one_line()
    def check_shards(self) -> None:
        """Raise DataError when a shard is missing or not as long as the index records."""
        advice = f"copy it again, or remove {self.folder} and pack again"
        for number, size in enumerate(self.shard_bytes):
            if not (path := self.shard_path(number)).is_file():
                raise DataError(f"{path}: missing, but {INDEX} names it; {advice}")
            if (found := path.stat().st_size) != size:
                raise DataError(f"{path}: {found} bytes, not the {size} of {INDEX}; {advice}")

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the contents of all shards and over where the images are in them."""
        digest = hashlib.sha256("".join(self.shard_sha256).encode())
        for array in (self.shards, self.offsets, self.size_bytes):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def select(self, indices: NDArray[np.int64]) -> Self:
        columns = ("shards", "offsets", "size_bytes", "checksums")
        return replace(self, **{name: getattr(self, name)[indices] for name in columns})

    def shard_path(self, number: int) -> Path:
        return self.folder / self.shard_names[number]

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one image. Raises DataError when its shard cannot be read."""
        if self.mirror:
            self.mirror.wait_for(self.mirror.chunks(self.select(np.array([index]))))
        path = self.shard_path(self.shards[index])

        def read() -> bytes:
            with path.open("rb") as file:
                file.seek(self.offsets[index])
                return file.read(self.size_bytes[index])

        with os_errors_in_one_line(path):
            return patiently(read)


class SliceReader:
    """Encoded images as views of memory maps. A shard is mapped when it is first read from.

    Python's share of a batch of 512 is 2.0 ms at 114 KB an image (page cache); reading files into arrays
    takes 53 ms. A map that is cut short under it ends the process; the packer only replaces whole files.
    """

    def __init__(self, slices: Slices) -> None:
        self._slices = slices
        self._maps: list[tuple[mmap.mmap, NDArray[np.uint8]] | None] = [None] * len(slices.shard_names)
        self._chunks = slices.mirror and slices.mirror.chunks(slices)

    def __call__(self, indices: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Return (size,) views, valid as long as this reader. Raises OSError, or DataError of a bucket."""
        slices, images = self._slices, []
        if self._chunks is not None:
            slices.mirror.wait_for(self._chunks[indices], HELP_SECONDS)
        # Python integers all at once: numpy's, one at a time, cost more than everything else here.
        columns = (column[indices].tolist() for column in (slices.shards, slices.offsets, slices.size_bytes))
        for shard, offset, size in zip(*columns, strict=True):
            memory, contents = self._maps[shard] or self._map(shard)
            # Ask for the pages of the whole batch before DALI's copy waits for the first of them.
            page = offset // mmap.PAGESIZE * mmap.PAGESIZE
            memory.madvise(mmap.MADV_WILLNEED, page, offset + size - page)
            images.append(contents[offset : offset + size])
        return images

    def _map(self, shard: int) -> tuple[mmap.mmap, NDArray[np.uint8]]:
        path, expected = self._slices.shard_path(shard), self._slices.shard_bytes[shard]
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(memory) != expected:
            raise OSError(f"{path}: {len(memory)} bytes, not the {expected} of its index")
        memory.madvise(mmap.MADV_RANDOM)  # reading ahead would fetch neighbours that are not needed
        self._maps[shard] = mapped = memory, np.frombuffer(memory, np.uint8)
        return mapped


@os_errors_in_one_line()
def is_packed(folder: Path) -> bool:
    """Return whether `folder` is a packed split. Raises DataError for one that was not finished."""
    try:
        if (folder / INDEX).is_file():
            return True
    except PermissionError:  # listing the folder says it better: there may be no index in it
        return False
    if next(folder.glob("shard-*.tar"), None) is not None:
        what = f"has shards but no {INDEX}: give the same `cmtrain data pack` again, or copy it too"
        raise DataError(f"{folder}: {what}")
    return False


def damage(slices: Slices, paths: Paths) -> list[str]:
    """Return a line for each shard (by SHA-256) and image (by CRC-32) that has changed. Raises OSError."""
    found: list[str] = []
    num_shards = len(slices.shard_names)
    for shard in tracked(range(num_shards), f"{slices.folder}: verifying shards", num_shards):
        path = slices.shard_path(shard)
        contents = path.read_bytes()
        view, num_found = memoryview(contents), len(found)
        for member in np.flatnonzero(slices.shards == shard).tolist():
            begin, size = int(slices.offsets[member]), int(slices.size_bytes[member])
            if zlib.crc32(view[begin : begin + size]) != slices.checksums[member]:
                found.append(f"{path}: {paths[member]} has changed (CRC-32)")
        if len(found) == num_found and hashlib.sha256(contents).hexdigest() != slices.shard_sha256[shard]:
            found.append(f"{path}: has changed between the images (SHA-256)")
    return found
