"""Keep a packed split of a bucket on local disk: what the plan needs first is fetched first.

The copy is a packed split itself: the index, and shards of full length that begin as holes. A chunk
is the images that begin in the same CHUNK_BYTES of a shard. One request fetches it; each image is checked by
its CRC-32; it is written into its shard and marked in `states`, which all processes of the host share. So
what reads packed splits reads this one, once the chunks that it needs are there.
"""

import contextlib
import fcntl
import io
import json
import os
import re
import shutil
import threading
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.atomic import locked, replacing
from pipelines.files.listing import Ints
from pipelines.files.objects import Store, is_ending
from pipelines.files.shards import INDEX, NO_INDEX, Slices
from pipelines.spec import DataError, os_errors_in_one_line

CHUNK_BYTES = 4 << 20  # smaller ones are too many requests for a store, larger ones delay the first step
REQUESTS = 32  # of a process at a time: at 20 ms and 80 MB/s a connection 1.9 GB/s

SOURCE = "source.json"  # where a copy comes from; what has one is a copy
_STATES = "states"
_MISSING, _WHOLE, _DAMAGED = range(3)


@os_errors_in_one_line()
def mirror_split(url: str, folder: Path, room_bytes: int) -> int:
    """Make or renew the copy in `folder` of the packed split at `url`, still without images.

    Returns the bytes that it will take. A copy of another version is removed, unless a run uses it. After a
    restart of the host images are fetched again: a power failure may have left holes. Raises DataError: no
    packed split is there, it cannot be read, takes more than `room_bytes`, or such a run is at work.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"reads the index of {url}"):
        known = _known(folder)
        found = Store(url).read(INDEX, known.get("tag"))
        index, tag = found or ((folder / INDEX).read_bytes(), known["tag"])
        try:
            with np.load(io.BytesIO(index), allow_pickle=False) as data:
                columns = dict(data)  # all of them, so that their checksums are looked at
            num_chunks = len(np.unique(_chunk_keys(columns["shards"], columns["offsets"])))
            names, lengths = columns["shard_names"].tolist(), columns["shard_bytes"].tolist()
            if not num_chunks or not all(re.fullmatch(r"shard-\d+[.]tar", name) for name in names):
                raise ValueError("no images, or a shard with another name")
            sizes = dict(zip((*names, _STATES), (*lengths, num_chunks), strict=True))
            taken = sum(lengths)
        except NO_INDEX as error:
            raise DataError(f"{url}/{INDEX}: no index of packed images ({type(error).__name__})") from error
        if taken > room_bytes:
            takes = f"{url}: takes {taken / 1e9:.1f} GB of local disk, and {room_bytes / 1e9:.1f} GB"
            raise DataError(f"{takes} of data.cache_gb are left; raise it, or pack with --resize-shorter")
        found_sizes = {name: (folder / name).stat().st_size for name in sizes if (folder / name).is_file()}
        if found_sizes != sizes or known.get("crc") != zlib.crc32(index):
            known = {}
            _check_unused(folder)
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
            file.write(json.dumps({"url": url, "tag": tag, "boot": boot, "crc": zlib.crc32(index)}).encode())
    return taken


def _known(folder: Path) -> dict[str, Any]:
    """Return what is recorded of a copy whose index is whole, else nothing."""
    try:
        known = dict(json.loads((folder / SOURCE).read_bytes()))
        return known if known.get("crc") == zlib.crc32((folder / INDEX).read_bytes()) else {}
    except (OSError, ValueError, TypeError):
        return {}


def _check_unused(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError), (folder / _STATES).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = "the bucket has another version of the images than the run that is at work here"
            raise DataError(f"{folder}: {what}; wait for its end, or set data.cache_dir") from error


class Mirror:
    """The chunks of a copy, and the threads that fetch them for this process."""

    def __init__(self, slices: Slices) -> None:
        """Open the copy in the folder of `slices`, which are all images of the split."""
        self._slices = slices
        self._images = np.lexsort((slices.offsets, slices.shards))  # in the order of their bytes
        keys = _chunk_keys(slices.shards, slices.offsets)[self._images]
        self._keys, self._begins = np.unique(keys, return_index=True)  # of each chunk: its first image
        self._ends = np.append(self._begins[1:], len(keys))
        with (slices.folder / _STATES).open("r+b") as file:  # the map holds the lock as long as it lives
            fcntl.flock(file, fcntl.LOCK_SH)
            self._states = np.memmap(file, np.uint8, "r+")
        self._todo: list[Future[None]] = []
        self._coming, self._lock = set[int](), threading.Lock()  # the chunks that are being fetched
        self._error: DataError | None = None
        self._store = Store(_known(slices.folder)["url"])
        self._pool, self._help = ThreadPoolExecutor(REQUESTS), ThreadPoolExecutor(REQUESTS)

    def chunks(self, slices: Slices) -> Ints:
        """Return the chunk of each image of `slices`, which may be a part of the split, (N,)."""
        return np.searchsorted(self._keys, _chunk_keys(slices.shards, slices.offsets))

    def begin(self, slices: Slices, order: Ints) -> None:
        """Fetch this process's share of images of `slices`, in the `order` in which the host needs them."""
        needed, first = np.unique(self.chunks(slices)[order], return_index=True)
        chunks = needed[np.argsort(first)]
        rank, world = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        for future in self._todo:
            future.cancel()
        mine = chunks[chunks % world == rank]
        todo = mine[self._states[mine] != _WHOLE].tolist()
        self._todo = [self._pool.submit(self._fetch, chunk) for chunk in todo]

    def wait_for(self, chunks: Ints, help_seconds: float = 0.0) -> None:
        """Wait until these chunks are on disk; after `help_seconds`, fetch also those of other processes.
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

    def _fetch(self, chunk: int) -> None:
        """Bring a chunk to the disk, unless it is there; an error is raised where somebody waits for it."""
        with self._lock:
            if self._error or is_ending() or chunk in self._coming or self._states[chunk] == _WHOLE:
                return
            self._coming.add(chunk)
        slices, images = self._slices, self._images[self._begins[chunk] : self._ends[chunk]]
        offsets, sizes = slices.offsets[images], slices.size_bytes[images]
        begin, end = int(offsets[0]), int(offsets[-1] + sizes[-1])
        columns = offsets - begin, sizes, slices.checksums[images]
        places = list(zip(*(column.tolist() for column in columns), strict=True))
        path = slices.shard_path(slices.shards[images[0]])
        try:
            content, is_whole = self._store.read_range(
                path.name, begin, end, lambda content: len(_right(content, places)) == len(places)
            )
            with path.open("r+b") as file:
                # A hole stays where an image is wrong, which the loader replaces as a damaged file.
                for offset, size in _right(content, places):
                    file.seek(begin + offset)
                    file.write(content[offset : offset + size])
            self._states[chunk] = _WHOLE if is_whole else _DAMAGED
        except DataError as error:
            self._error = error
        except BaseException as error:  # obstore's panics are no Exceptions
            what = f"{path}: {type(error).__name__}"  # its text may hold a key
            self._error = DataError.of(error, path) if isinstance(error, OSError) else DataError(what)
        self._coming.discard(chunk)


def _chunk_keys(shards: np.ndarray, offsets: Ints) -> Ints:
    return (shards.astype(np.int64) << 40) | offsets // CHUNK_BYTES


def _right(content: bytes, places: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Return offset and size of each image whose bytes are those of its CRC-32."""
    view = memoryview(content)
    return [(begin, size) for begin, size, crc in places if zlib.crc32(view[begin : begin + size]) == crc]
