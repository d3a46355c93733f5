"""Keep a packed split of a bucket on local disk: what the plan needs first is fetched first.

The copy is a packed split itself: the index, and shards of full length that begin as holes. A chunk
is the images that begin in the same CHUNK_BYTES of a shard. One request fetches it; each image is checked by
its CRC-32; it is written into its shard and marked in `states`, which all processes of the host share. So
what reads packed splits reads this one, once the chunks that it needs are there.

A copy of a part of the images would not do: an epoch wants each image once, in a random order, so the others
would be one request each, and a GPU trains more images a second than a bucket answers requests.
"""

import contextlib
import io
import json
import os
import re
import shutil
import time
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.atomic import locked, replacing
from pipelines.files.objects import Store, is_ending
from pipelines.files.shards import INDEX, Slices
from pipelines.spec import DataError, os_errors_in_one_line

CHUNK_BYTES = 4 << 20  # smaller ones are too many requests for a store, larger ones delay the first step
REQUESTS = 32  # of a process at a time: at 20 ms and 80 MB/s a connection 1.9 GB/s

SOURCE = "source.json"  # where a copy comes from; what has one is a copy
_STATES = "states"
_MISSING, _WHOLE, _DAMAGED = range(3)

Ints = NDArray[np.int64]


@os_errors_in_one_line()
def mirror_split(url: str, folder: Path, room_bytes: int) -> int:
    """Make or renew the copy in `folder` of the packed split at `url`, still without images.

    Returns the bytes that it will take. A copy of another version is removed. After a restart of the host
    its images are fetched again: a power failure may have left holes. Raises DataError: no packed split is
    there, it cannot be read, or it takes more than `room_bytes`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"reads the index of {url}"):
        known = _known(folder) if (folder / INDEX).is_file() else {}
        advice = "; pack the images (`cmtrain data pack`) and copy them there"
        found = Store(url).read(INDEX, known.get("tag"), advice)
        index, tag = found or ((folder / INDEX).read_bytes(), known["tag"])
        try:
            with np.load(io.BytesIO(index), allow_pickle=False) as columns:
                names, lengths = columns["shard_names"].tolist(), columns["shard_bytes"].tolist()
                num_chunks = len(np.unique(_chunk_keys(columns["shards"], columns["offsets"])))
                if not all(re.fullmatch(r"shard-\d+[.]tar", name) for name in names):  # names of files here
                    raise ValueError("a shard has another name")
        except (ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{url}/{INDEX}: is not the index of packed images ({error})") from error
        if sum(lengths) > room_bytes:
            takes = f"{url}: takes {sum(lengths) / 1e9:.1f} GB of local disk, and {room_bytes / 1e9:.1f} GB"
            raise DataError(f"{takes} of data.cache_gb are left; raise it, or pack with --resize-shorter")
        sizes = dict(zip((*names, _STATES), (*lengths, num_chunks), strict=True))
        found_sizes = {name: (folder / name).stat().st_size for name in sizes if (folder / name).is_file()}
        if not known or found_sizes != sizes or index != (folder / INDEX).read_bytes():
            known = {}
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / INDEX).write_bytes(index)
            for name, size in sizes.items():
                with (folder / name).open("wb") as file:
                    file.truncate(size)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        states = np.memmap(folder / _STATES, np.uint8, "r+")
        states[(states == _DAMAGED) | (boot != known.get("boot"))] = _MISSING
        with replacing(folder / SOURCE) as file:
            file.write(json.dumps({"url": url, "tag": tag, "boot": boot}).encode())
    return sum(lengths)


def _known(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / SOURCE).read_bytes()))
    except (OSError, ValueError, TypeError):  # there is no copy, or a half-written one
        return {}


class Mirror:
    """The chunks of a copy, and the threads that fetch them for this process."""

    def __init__(self, slices: Slices) -> None:
        """Open the copy in the folder of `slices`, which are all images of the split."""
        self._slices = slices
        self._images = np.lexsort((slices.offsets, slices.shards))  # in the order of their bytes
        keys = _chunk_keys(slices.shards, slices.offsets)[self._images]
        self._keys, self._begins = np.unique(keys, return_index=True)  # of each chunk: its first image
        self._ends = np.append(self._begins[1:], len(keys))
        self._states = np.memmap(slices.folder / _STATES, np.uint8, "r+")
        self._todo: deque[int] = deque()
        self._error: DataError | None = None
        self._store = Store(_known(slices.folder)["url"])
        self._pool, self._help = ThreadPoolExecutor(REQUESTS), ThreadPoolExecutor(REQUESTS)

    def chunks(self, slices: Slices) -> Ints:
        """Return the chunk of each image of `slices`, which may be a part of the split, (N,)."""
        return np.searchsorted(self._keys, _chunk_keys(slices.shards, slices.offsets))

    def begin(self, slices: Slices, order: Ints) -> None:
        """Fetch images of `slices` in the `order` in which all processes of the host need them: of their
        chunks, this process's share, and no more of what was begun before.
        """
        needed, first = np.unique(self.chunks(slices)[order], return_index=True)
        chunks = needed[np.argsort(first)]
        rank, world = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._todo.clear()
        mine = chunks[chunks % world == rank]
        self._todo.extend(mine[self._states[mine] != _WHOLE].tolist())
        for _ in range(min(REQUESTS, len(self._todo))):
            self._pool.submit(self._work)

    def wait_for(self, chunks: Ints, help_seconds: float = 0.0) -> None:
        """Wait until these chunks are on disk; after `help_seconds`, fetch them here, whoever should.
        Raises DataError: the store or the disk fails.
        """
        began, has_helped = time.monotonic(), False
        while (missing := chunks[self._states[chunks] == _MISSING]).size:
            if self._error:
                raise self._error
            if not has_helped and time.monotonic() - began >= help_seconds:
                has_helped = True
                for chunk in np.unique(missing).tolist():
                    self._help.submit(self._fetch, chunk)
            time.sleep(0.002)

    def _work(self) -> None:
        with contextlib.suppress(IndexError):  # all is done
            while not self._error and not is_ending():
                self._fetch(self._todo.popleft())

    def _fetch(self, chunk: int) -> None:
        """Bring a chunk to the disk, unless it is there; an error is raised where somebody waits for it."""
        slices, images = self._slices, self._images[self._begins[chunk] : self._ends[chunk]]
        offsets, sizes = slices.offsets[images], slices.size_bytes[images]
        begin, end = int(offsets[0]), int(offsets[-1] + sizes[-1])
        columns = offsets - begin, sizes, slices.checksums[images]
        places = list(zip(*(column.tolist() for column in columns), strict=True))
        path = slices.shard_path(slices.shards[images[0]])
        try:
            with path.open("r+b", buffering=0) as file:
                if self._states[chunk] == _WHOLE:
                    return
                content, is_whole = self._store.read_range(
                    path.name, begin, end, lambda content: not _wrong(content, places)
                )
                if not is_whole:  # zeros are no image: the loader replaces it, as it does a damaged file
                    fixed = bytearray(content[: end - begin].ljust(end - begin, b"\0"))
                    for offset, size in _wrong(content, places):
                        fixed[offset : offset + size] = bytes(size)
                    content = bytes(fixed)
                file.seek(begin)
                while content:
                    content = content[file.write(content) :]
            self._states[chunk] = _WHOLE if is_whole else _DAMAGED
        except OSError as error:
            self._error = DataError.of(error, path)
        except DataError as error:
            self._error = error


def _chunk_keys(shards: NDArray[np.integer], offsets: Ints) -> Ints:
    return (shards.astype(np.int64) << 40) | offsets // CHUNK_BYTES


def _wrong(content: bytes, places: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Return offset and size of each image whose bytes are not those of its CRC-32."""
    view = memoryview(content)
    return [
        (offset, size)
        for offset, size, checksum in places
        if offset + size > len(view) or zlib.crc32(view[offset : offset + size]) != checksum
    ]
