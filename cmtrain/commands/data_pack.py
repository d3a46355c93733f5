"""Pack folders or lists of image files into tar shards with an index (`cmtrain data pack`)."""

import os
from pathlib import Path
from typing import Any

from cmtrain.monitoring.console import print_result
from pipelines.checks.bad_list import SPLITS
from pipelines.files.doubts import split_doubts
from pipelines.files.manifest import Manifest
from pipelines.files.shards import damage, is_packed
from pipelines.packing.encode import PackSpec
from pipelines.packing.shard_writer import pack_split
from pipelines.spec import MAX_BAD_FRACTION, DataError, os_errors_in_one_line, print_lines


@os_errors_in_one_line()
def pack(
    source: str, destination: str, *, shard_mib: int, processes: int | None, train_list: str | None = None,
    val_list: str | None = None, max_bad_fraction: float = MAX_BAD_FRACTION, cache_dir: str | None = None,
    multi_label: bool = False, as_json: bool = False, **encoding: Any,
) -> None:  # fmt: skip
    """Pack the training and the validation images of `source`; `destination` is then a data.root.

    After a kill or a full disk the same command continues; after success it verifies the shards. Prints one
    JSON line on stdout, and the images that were left out on stderr. `source` holds train/<class>/* and
    val/<class>/*, or the files on the lists, which are relative to it; one split may be missing.
    `shard_mib`: size at which a shard is closed. `max_bad_fraction`: share of unusable files above which a
    split is refused. `encoding`: `resize_shorter` and `quality`, see PackSpec. Raises DataError: nothing to
    pack, too many bad images, no space, a destination in use, a damaged shard.
    """
    root = Path(source)
    listed = {"train": train_list, "val": val_list}
    found = [split for split in SPLITS if listed[split] or (root / split).is_dir()]
    if not found:
        raise DataError(f"{root}: holds neither train/<class>/ nor val/<class>/, and no list is given")
    for split in [split for split in found if not listed[split]]:
        if Path(os.path.realpath(destination)).is_relative_to(os.path.realpath(root / split)):
            inside = f"lies in {root / split}, whose folders are classes"
            raise DataError(f"{destination}: {inside}; give another")
    spec = PackSpec(shard_bytes=shard_mib * 2**20, **encoding)
    workers = processes or len(os.sched_getaffinity(0))
    report: dict[str, dict[str, int]] = {}
    options: dict[str, Any] = {"cache_dir": cache_dir, "max_bad_fraction": max_bad_fraction}
    options["multi_label"] = multi_label
    for split in found:
        if list_name := listed[split]:
            manifest = Manifest.from_folder(root, image_list=root / list_name, **options)
        elif is_packed(root / split):
            raise DataError(f"{root / split}: is packed already; give the folder that holds the image files")
        else:
            manifest = Manifest.from_folder(root / split, **options)
        options["class_names"] = manifest.class_names
        print_lines(*split_doubts(manifest, split))
        manifest = manifest.with_sets_as_classes() if multi_label else manifest
        folder = Path(destination).absolute() / split
        done = pack_split(manifest, folder, spec, processes=workers, max_bad_fraction=max_bad_fraction)
        print_lines(*(f"left out: {path}: {reason}" for path, _, reason in done.bad))
        shards = done.packed
        assert shards is not None
        if damaged := damage(shards, done.paths):
            first = "; ".join(damaged[:3])
            raise DataError(f"{first} ({len(damaged)} such): remove {folder} and pack again")
        counts = {"images": len(done), "left_out": len(done.bad), "shards": len(shards.shard_names)}
        report[split] = counts | {"bytes": int(shards.shard_bytes.sum())}
        written = "{images:,} images in {shards} shards, {bytes:,} bytes".format(**report[split])
        print_lines(f"{folder}: {written}, verified")
    print_result({"destination": destination, **report}, asked=as_json)
