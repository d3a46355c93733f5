"""Writes the shards of one split, so that a killed run goes on where it was and ends with the same bytes.

A shard has its name only when it is whole and a record of it is on the disk. The record says what is in it and its
SHA-256, so that a later run can keep it. All records together become the index, which is written last.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Generator, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.files.manifest import BadFile, Manifest
from pipelines.files.shards import INDEX, Index, Slices, read_index, write_index
from pipelines.packing.encode import Encoded, encode_all
from pipelines.plan import sample_keys
from pipelines.progress import tracked
from pipelines.spec import DataError

_FORMAT = 1
_SHARD_DOMAIN = 4  # keeps the order inside shards apart from the plan's uses of a seed
_PLACE, _OFFSET, _SIZE, _HEIGHT, _WIDTH, _CHECKSUM = range(6)  # columns of _Record.rows


@dataclass(frozen=True, eq=False)
class _Record:
    """What is in a finished shard."""

    name: str
    size_bytes: int
    sha256: str
    end: int  # so many samples, in the order of writing, are done with when this shard is
    rows: NDArray[
        np.int64
    ]  # (n, 6): place in the source's manifest, offset, size_bytes, height, width, CRC-32
    bad: dict[int, str]  # reasons by place


def pack_split(
    manifest: Manifest,
    folder: Path,
    *,
    resize_shorter: int | None,
    quality: int,
    shard_bytes: int,
    processes: int,
    max_bad_fraction: float,
) -> Index:
    """Writes the images of `manifest` as shards and an index into `folder`, or goes on with what is there.

    Samples lie in the shards in a fixed random order, so that a sequential reader sees mixed classes, too; the index
    keeps the manifest's order. Returns the index, that of an earlier run if that one had finished.

    Args:
        resize_shorter, quality: see `encode.encode`.
        shard_bytes: a shard is closed when it has reached this size.
        processes: that read and encode; this one writes.
        max_bad_fraction: more unusable files than this fraction are an error.

    Raises:
        DataError: too many bad images, no space, anything else in `folder`, another run at work there.
    """
    recipe = json.dumps(
        {
            "format": _FORMAT,
            "source": manifest.fingerprint,
            "resize_shorter": resize_shorter,
            "quality": quality,
            "shard_bytes": shard_bytes,
        }
    )
    with _told_in_one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if (folder / INDEX).is_file():
                index = read_index(folder)
                _check_recipe(folder, index.recipe, recipe)
            else:
                records = _kept_records(folder, recipe)
                _check_bad(manifest, records, max_bad_fraction)
                order = np.argsort(
                    sample_keys(0, _SHARD_DOMAIN, np.arange(len(manifest))), kind="stable"
                ).tolist()
                done = records[-1].end if records else 0
                files = encode_all(manifest.file, order[done:], resize_shorter, quality, processes)
                with (
                    closing(files),
                    closing(tracked(files, f"{folder}: packing", len(order), done)) as images,
                ):
                    samples = zip(order[done:], images, strict=True)
                    while done < len(order):
                        shard = _write_shard(
                            folder, len(records), samples, manifest.labels, shard_bytes, done, recipe
                        )
                        records.append(shard)
                        done = shard.end
                        _check_bad(manifest, records, max_bad_fraction)
                index = _index(manifest, folder, recipe, records)
                write_index(index)
            for number in range(len(index.slices.shard_names)):
                _record_file(folder, number).unlink(missing_ok=True)
    return index


def _write_shard(
    folder: Path,
    number: int,
    samples: Iterator[tuple[int, Encoded]],
    labels: NDArray[np.int64],
    shard_bytes: int,
    begin: int,
    recipe: str,
) -> _Record:
    name = _shard_name(number)
    partial = folder / f".{name}.tmp"
    rows: list[tuple[int, ...]] = []
    bad: dict[int, str] = {}
    try:
        with partial.open("wb") as file:
            digest, size = hashlib.sha256(), 0

            def put(data: bytes) -> None:
                nonlocal size
                file.write(data)
                digest.update(data)
                size += len(data)

            for place, image in samples:
                if image.reason:
                    bad[place] = image.reason
                    continue
                offset = size + tarfile.BLOCKSIZE
                rows.append(
                    (place, offset, len(image.data), image.height, image.width, zlib.crc32(image.data))
                )
                put(_member(f"{place:08d}.jpg", image.data))
                put(_member(f"{place:08d}.cls", str(labels[place]).encode()))
                if size >= shard_bytes:
                    break
            put(bytes(2 * tarfile.BLOCKSIZE))
            put(bytes(-size % tarfile.RECORDSIZE))
            file.flush()
            os.fsync(file.fileno())
        columns = np.array(rows, np.int64).reshape(-1, 6)
        end = begin + len(rows) + len(bad)
        record = _Record(name, size, digest.hexdigest(), end, columns, bad)
        _store_record(_record_file(folder, number), record, recipe)
        partial.replace(folder / name)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return record


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)  # no time and no owner: equal images make equal shards
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _index(manifest: Manifest, folder: Path, recipe: str, records: list[_Record]) -> Index:
    rows = np.concatenate([record.rows for record in records])
    shards = np.repeat(np.arange(len(records), dtype=np.int32), [len(record.rows) for record in records])
    by_place = np.argsort(rows[:, _PLACE])
    rows = rows[by_place]
    places = rows[:, _PLACE]
    left_out = [
        BadFile(manifest.file(place), reason) for record in records for place, reason in record.bad.items()
    ]
    return Index(
        recipe=recipe,
        paths=manifest.paths.select(places),
        labels=manifest.labels[places],
        heights=rows[:, _HEIGHT].astype(np.int32),
        widths=rows[:, _WIDTH].astype(np.int32),
        class_names=manifest.class_names,
        bad=tuple(sorted((*manifest.bad, *left_out))),
        slices=Slices(
            folder=folder,
            shard_names=tuple(record.name for record in records),
            shard_bytes=np.array([record.size_bytes for record in records], np.int64),
            shard_sha256=tuple(record.sha256 for record in records),
            shards=shards[by_place],
            offsets=rows[:, _OFFSET],
            size_bytes=rows[:, _SIZE],
            checksums=rows[:, _CHECKSUM].astype(np.uint32),
        ),
    )


def _kept_records(folder: Path, recipe: str) -> list[_Record]:
    """The records of the shards, from the first on, that an earlier run has finished and that are still whole."""
    for entry in sorted(folder.iterdir()):
        ours = entry.name == INDEX or (folder / f".{entry.name}.npz").is_file()
        if not entry.name.startswith(".") and not ours:
            raise DataError(
                f"{folder}: holds {entry.name}, which no pack has put there; give another destination"
            )
    records: list[_Record] = []
    for number in itertools.count():
        record = _load_record(folder, number, recipe)
        if record is None:
            return records
        shard = folder / record.name
        if not shard.is_file() or shard.stat().st_size != record.size_bytes:
            return records
        with shard.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                return records
        records.append(record)
    raise AssertionError


def _store_record(path: Path, record: _Record, recipe: str) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("wb") as file:
        np.savez(
            file,
            recipe=np.array(recipe),
            name=np.array(record.name),
            size_bytes=record.size_bytes,
            sha256=np.array(record.sha256),
            end=record.end,
            rows=record.rows,
            bad_places=np.array(list(record.bad), np.int64),
            bad_reasons=np.array(list(record.bad.values()), np.str_),
        )
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _load_record(folder: Path, number: int, recipe: str) -> _Record | None:
    try:
        with _record_file(folder, number).open("rb") as file, np.load(file, allow_pickle=False) as data:
            found = str(data["recipe"])
            bad = dict(zip(data["bad_places"].tolist(), data["bad_reasons"].tolist(), strict=True))
            name, sha256, rows = str(data["name"]), str(data["sha256"]), data["rows"]
            record = _Record(name, int(data["size_bytes"]), sha256, int(data["end"]), rows, bad)
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ):  # absent or damaged: write again
        return None
    _check_recipe(folder, found, recipe)
    return record


def _check_recipe(folder: Path, found: str, wanted: str) -> None:
    if found != wanted:
        have, want = json.loads(found), json.loads(wanted)
        names = ", ".join(name for name in want if have.get(name) != want[name])
        raise DataError(f"{folder}: was packed with another {names}; remove it or give another destination")


def _check_bad(manifest: Manifest, records: list[_Record], max_bad_fraction: float) -> None:
    bad = [
        f"{manifest.paths[place]}: {reason}" for record in records for place, reason in record.bad.items()
    ]
    bad += [f"{file.path}: {file.reason}" for file in manifest.bad]
    total = len(manifest) + len(manifest.bad)
    if len(bad) > max_bad_fraction * total or len(bad) == total:
        raise DataError(
            f"{manifest.root}: {len(bad)} of {total} images cannot be used, more than max_bad_fraction "
            f"{max_bad_fraction:g} allows: {'; '.join(bad[:3])}"
        )


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _record_file(folder: Path, number: int) -> Path:
    return folder / f".{_shard_name(number)}.npz"


@contextmanager
def _alone(folder: Path) -> Generator[None, None, None]:
    """Holds the folder's lock, which ends with the process however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DataError(f"{folder}: another process is packing there") from error
    finally:
        os.close(descriptor)


@contextmanager
def _told_in_one_line(folder: Path) -> Generator[None, None, None]:
    again = "finished shards are kept, the same command goes on from there"
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}; {again}") from error
    except BrokenProcessPool as error:
        raise DataError(
            f"{folder}: a worker process was killed, for want of memory perhaps; {again}"
        ) from error
