"""`cmtrain data pack`: folders or lists of image files into tar shards with an index."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from pipelines.files.manifest import Manifest
from pipelines.files.shards import damage, is_packed
from pipelines.packing.shard_writer import pack_split
from pipelines.spec import MAX_BAD_FRACTION, DataError

SPLITS = ("train", "val")


def pack(
    source: str,
    destination: str,
    *,
    resize_shorter: int | None,
    quality: int,
    shard_mib: int,
    processes: int | None,
    train_list: str | None = None,
    val_list: str | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    cache_dir: str | None = None,
) -> int:
    """Pack the training and the validation images of `source`; `destination` is then a data.root.

    Killed or out of space, the same command goes on where it was; finished, it verifies what is there. Ends with one
    JSON line on stdout; images that were left out are listed on stderr.

    Args:
        source: holds train/<class>/* and val/<class>/*, or the files that the lists name; a split that is not there is
            left out, but not both.
        resize_shorter: longest shorter side in pixels, larger images are reduced; None keeps all sizes.
        quality: of the JPEGs that are written; JPEGs that need no change are copied as they are.
        shard_mib: size at which a shard is closed.
        processes: that read and encode; None is one per core.
        train_list, val_list: list files, relative to `source`, used instead of the folders.
        max_bad_fraction: share of unusable files of a split above which it is refused.
        cache_dir: where image sizes are remembered, as data.cache_dir.

    Returns:
        The process exit code, 0.

    Raises:
        DataError: nothing to pack, too many bad images, no space, a destination in use, a damaged shard.
    """
    root = Path(source)
    listed = {"train": train_list, "val": val_list}
    found = [split for split in SPLITS if listed[split] or (root / split).is_dir()]
    if not found:
        raise DataError(f"{root}: holds neither train/<class>/ nor val/<class>/, and no list is given")
    report: dict[str, dict[str, int]] = {}
    class_names: tuple[str, ...] | None = None
    for split in found:
        options: dict[str, Any] = {
            "class_names": class_names,
            "cache_dir": cache_dir,
            "max_bad_fraction": max_bad_fraction,
        }
        if list_name := listed[split]:
            manifest = Manifest.from_list(root / list_name, root, **options)
        elif is_packed(root / split):
            raise DataError(f"{root / split}: is packed already; give the folder that holds the image files")
        else:
            manifest = Manifest.from_folder(root / split, **options)
        class_names = manifest.class_names
        folder = Path(destination).absolute() / split
        shards = pack_split(
            manifest,
            folder,
            resize_shorter=resize_shorter,
            quality=quality,
            shard_bytes=shard_mib * 2**20,
            processes=processes or len(os.sched_getaffinity(0)),
            max_bad_fraction=max_bad_fraction,
        )
        for path, _, reason in shards.bad:
            _say(f"left out: {path}: {reason}")
        assert shards.packed is not None
        if damaged := damage(shards.packed, shards.paths):
            raise DataError(
                f"{'; '.join(damaged[:3])} ({len(damaged)} such): remove {folder} and pack again"
            )
        size_bytes = int(shards.packed.shard_bytes.sum())
        num_shards = len(shards.packed.shard_names)
        report[split] = {"images": len(shards), "left_out": len(shards.bad), "shards": num_shards}
        report[split]["bytes"] = size_bytes
        _say(f"{folder}: {len(shards):,} images in {num_shards} shards, {size_bytes:,} bytes, verified")
    print(json.dumps({"destination": destination, **report}), flush=True)  # noqa: T201
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
