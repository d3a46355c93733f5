"""Write the shards of one split, so that a killed run resumes where it was and ends with the same bytes.

A shard has its name only when it is whole and a record of its contents is on the disk, so that a later run
can keep it. All records together become the index, which is written last.
"""

import hashlib
import itertools
import json
import tarfile
import zlib
from collections.abc import Generator, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from pipelines import atomic, plan, progress
from pipelines.checks.bad_list import BadFile
from pipelines.checks.decode_one import Kind
from pipelines.files.manifest import Manifest, check_num_bad, read_index, write_index
from pipelines.files.shards import INDEX, Slices
from pipelines.packing.encode import Encoded, PackSpec, encode_all
from pipelines.spec import DataError

_FORMAT = 1
_SHARD = "shard-{:06d}.tar"

Samples = Iterator[tuple[int, int, Encoded]]  # place in the source, label, image


class _Record(NamedTuple):
    """The contents of a finished shard."""

    name: str
    size_bytes: int
    sha256: str
    end: int  # samples, in the order of writing, that are finished with when this shard is
    rows: NDArray[np.int64]  # (n, 6): place in the source, offset, size_bytes, height, width, CRC-32
    faults: list[tuple[int, Kind, str]]  # place, kind and reason of the images that were left out


def pack_split(
    manifest: Manifest, folder: Path, spec: PackSpec, *, processes: int, max_bad_fraction: float
) -> Manifest:
    """Write the images of `manifest` as shards and an index into `folder`, or resume an earlier run.

    Samples lie in the shards in a fixed random order, so that a sequential reader sees mixed classes, too;
    the index keeps the manifest's order. `processes` read and encode; this one writes. Returns the packed
    manifest, an earlier run's if that had finished. Raises DataError: more unusable files than the share
    `max_bad_fraction`, no space, anything else in `folder`, another run at work there.
    """
    recipe = json.dumps({"format": _FORMAT, "source": manifest.fingerprint, **spec._asdict()})
    with _locked(folder):
        if (folder / INDEX).is_file():
            found, shards = read_index(folder)
            _check_recipe(folder, found, recipe)
        else:
            # Resume after the last whole shard.
            records = _kept_records(folder, recipe)
            bad = _left_out(manifest, records, max_bad_fraction)
            keys = plan.sample_keys(0, plan.SHARD_DOMAIN, np.arange(len(manifest)))
            done = records[-1].end if records else 0
            todo = np.argsort(keys, kind="stable").tolist()[done:]
            encoded = encode_all(manifest.file, todo, spec, processes)
            bar = progress.tracked(encoded, f"{folder}: packing", len(manifest), done)
            with closing(encoded), closing(bar):
                samples = zip(todo, manifest.labels[todo].tolist(), bar, strict=True)
                while done < len(manifest):
                    name = _SHARD.format(len(records))
                    records.append(_write_shard(folder, name, done, samples, spec.shard_bytes, recipe))
                    done = records[-1].end
                    bad = _left_out(manifest, records, max_bad_fraction)
            # The index is last: it makes the folder a data set, and the records are then of no use.
            shards = _packed(manifest, folder, records, bad)
            write_index(shards, recipe)
        assert shards.packed is not None
        for shard_name in shards.packed.shard_names:
            _record_file(folder, shard_name).unlink(missing_ok=True)
    return shards


def _write_shard(
    folder: Path, name: str, begin: int, samples: Samples, shard_bytes: int, recipe: str
) -> _Record:
    """Write one shard and its record, from as many `samples` as it takes; `begin` samples come before it."""
    rows: list[tuple[int, ...]] = []
    faults: list[tuple[int, Kind, str]] = []
    digest = hashlib.sha256()
    with atomic.replacing(folder / name) as file:

        def put(data: bytes) -> None:
            file.write(data)
            digest.update(data)

        for place, label, image in samples:
            if image.fault:
                faults.append((place, *image.fault))
                continue
            offset, checksum = file.tell() + tarfile.BLOCKSIZE, zlib.crc32(image.data)
            rows.append((place, offset, len(image.data), image.height, image.width, checksum))
            put(_member(f"{place:08d}.jpg", image.data))
            put(_member(f"{place:08d}.cls", str(label).encode()))
            if file.tell() >= shard_bytes:
                break
        put(bytes(2 * tarfile.BLOCKSIZE))
        put(bytes(-file.tell() % tarfile.RECORDSIZE))
        columns = np.array(rows, np.int64).reshape(-1, 6)
        end = begin + len(rows) + len(faults)
        record = _Record(name, file.tell(), digest.hexdigest(), end, columns, faults)
        with atomic.replacing(_record_file(folder, name)) as record_file:  # before the shard gets its name
            record_file.write(json.dumps([recipe, *record._replace(rows=record.rows.tolist())]).encode())
    return record


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)  # no time and no owner: equal images make equal shards
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _packed(manifest: Manifest, folder: Path, records: list[_Record], bad: tuple[BadFile, ...]) -> Manifest:
    rows = np.concatenate([record.rows for record in records])
    shards = np.repeat(np.arange(len(records), dtype=np.int32), [len(record.rows) for record in records])
    by_place = np.argsort(rows[:, 0])
    places, offsets, sizes, heights, widths, checksums = rows[by_place].T
    names, size_bytes, digests, *_ = zip(*records, strict=True)
    shard_bytes, checksums = np.array(size_bytes, np.int64), checksums.astype(np.uint32)
    slices = Slices(folder, names, shard_bytes, digests, shards[by_place], offsets, sizes, checksums)
    shape = {"heights": heights.astype(np.int32), "widths": widths.astype(np.int32), "size_bytes": sizes}
    return replace(manifest.select(places), root=folder, bad=bad, packed=slices, **shape)


def _left_out(manifest: Manifest, records: list[_Record], max_bad_fraction: float) -> tuple[BadFile, ...]:
    """Return all bad files known so far. Raises DataError for more than allowed."""
    faults = (fault for record in records for fault in record.faults)
    found = [BadFile(manifest.file(place), kind, reason) for place, kind, reason in faults]
    bad = tuple(sorted((*manifest.bad, *found)))
    check_num_bad(manifest.root, bad, len(manifest) + len(manifest.bad), max_bad_fraction)
    return bad


def _kept_records(folder: Path, recipe: str) -> list[_Record]:
    """Return the records of an earlier run's finished shards, up to the first shard that is not whole."""
    for entry in sorted(folder.iterdir()):
        ours = entry.name == INDEX or _record_file(folder, entry.name).is_file()
        if entry.name.startswith((".shard-", f".{INDEX}.")) and entry.suffix == ".tmp":  # of a killed run
            entry.unlink()
        elif not entry.name.startswith(".") and not ours:
            what = f"holds {entry.name}, which no pack has put there"
            raise DataError(f"{folder}: {what}; give another destination")
    records: list[_Record] = []
    for number in itertools.count():
        try:
            content = _record_file(folder, _SHARD.format(number)).read_bytes()
            found, name, size_bytes, sha256, end, rows, faults = json.loads(content)
            record = _Record(name, size_bytes, sha256, end, np.array(rows, np.int64).reshape(-1, 6), faults)
        except (OSError, ValueError, TypeError):  # missing or damaged: the shard is written again
            break
        _check_recipe(folder, found, recipe)
        if not (shard := folder / record.name).is_file():
            break
        with shard.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                break
        records.append(record)
    return records


def _check_recipe(folder: Path, found: str, wanted: str) -> None:
    if found != wanted:
        have, want = json.loads(found), json.loads(wanted)
        names = ", ".join(name for name in want if have.get(name) != want[name])
        raise DataError(f"{folder}: was packed with another {names}; remove it or give another destination")


def _record_file(folder: Path, shard_name: str) -> Path:
    return folder / f".{shard_name}.json"


@contextmanager
def _locked(folder: Path) -> Generator[None, None, None]:
    """Hold the folder's lock, which ends with the process however that ends. Raises DataError."""
    again = "finished shards are kept, the same command goes on from there"
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path, timeout=0, fallback_to_soft=False):
            try:
                yield
            finally:
                path.unlink()  # while it is held: filelock gives nobody a lock on a deleted file
    except Timeout as error:
        raise DataError(f"{folder}: another process is packing there") from error
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}; {again}") from error
    except BrokenProcessPool as error:
        what = "a worker process was killed, for want of memory perhaps"
        raise DataError(f"{folder}: {what}; {again}") from error
