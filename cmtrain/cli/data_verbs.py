"""Parse `cmtrain data ...`: split, check, pack, preview, stats."""

import argparse
from functools import partial
from typing import Any

from cmtrain.cli import start
from cmtrain.cli.arguments import Parser, Verb, count, out_file, positive, share
from cmtrain.config.schema import Config

SHARE: dict[str, Any] = {"type": share, "default": argparse.SUPPRESS, "metavar": "X"}


def _data_split(arguments: list[str]) -> None:
    parser = Parser("data split", "Divide a folder of classes into lists for training and validation.")
    add = parser.add_argument
    add("root", metavar="DIR", help="folder with one folder of images per class; no image is moved")
    add("--val", type=share, default=0.2, metavar="X", help="share for validation (default: 0.2)")
    add("--test", type=share, default=0.0, metavar="X", help="share for a third list (default: 0)")
    same = "keep images on one side in whose path this finds the same text, such as 'patient-([0-9]+)'"
    add("--group-by", metavar="REGEX", help=same)
    add("--no-compare", dest="compare", action="store_false", help="do not look for near-duplicates")
    add("--seed", type=count, default=0, metavar="N", help="another number, another split (default: 0)")
    add("--out", metavar="DIR", help="folder for the lists (default: the folder itself)")
    options = vars(parser.parse_alone(arguments))
    start.announce(f"data split of {options['root']}")
    from cmtrain.commands.data_split import split

    split(options.pop("root"), **options)


def _data_check(arguments: list[str]) -> int:
    parser = Parser("data check", "Find unreadable images; training leaves them out from then on.")
    add = parser.add_argument
    add("root", metavar="DIR", help="folder with train/ and val/, or one tree of class folders")
    add("--processes", type=positive, metavar="N", help="default: one per core")
    add("--out", type=out_file, metavar="FILE", help="write the list there, where training does not look")
    add("--cache-dir", metavar="DIR", help="data.cache_dir of the runs, if they have one")
    add("--max-bad-fraction", **SHARE, help="exit code 3 above this share (default: 0.1)")
    options = vars(parser.parse_alone(arguments))
    from cmtrain.commands.data_check import check

    return check(options.pop("root"), **options)


def _data_pack(arguments: list[str]) -> None:
    parser = Parser("data pack", "Write an image folder as tar shards with an index.")
    add = parser.add_argument
    add("source", metavar="SRC", help="folder with train/ and val/")
    add("destination", metavar="DST", help="folder to write; the same command continues")
    add("--resize-shorter", type=positive, metavar="PX", help="shrink the shorter side to PX pixels")
    quality = "of re-encoded JPEGs (default: 90)"
    add("--quality", type=partial(positive, most=100), default=90, metavar="Q", help=quality)
    mib = "MiB per shard (default: 256)"
    add("--shard-size", dest="shard_mib", type=positive, default=256, metavar="MIB", help=mib)
    add("--processes", type=positive, metavar="N", help="default: one per core")
    add("--max-bad-fraction", **SHARE, help="unreadable share to refuse (default: 0.1)")
    add("--train-list", metavar="FILE", help="list of training images below SRC, instead of train/")
    add("--val-list", metavar="FILE", help="the same for validation")
    add("--multi-label", action="store_true", help="labels name several classes, as cat;dog does")
    parser.add_json()
    options = vars(parser.parse_alone(arguments))
    from cmtrain.commands.data_pack import pack

    pack(options.pop("source"), options.pop("destination"), as_json=options.pop("json"), **options)


def _data_preview(arguments: list[str]) -> None:
    parser = Parser("data preview", "Draw augmented images: a row per image, a column per epoch.")
    add = parser.add_argument
    what = "PNG to write (default: preview.png)"
    add("--out", type=out_file, default="preview.png", metavar="FILE", help=what)
    add("--rows", type=positive, default=8, metavar="N", help="images (default: 8)")
    add("--columns", type=positive, default=8, metavar="N", help="epochs (default: 8)")
    add("--epoch", type=count, default=0, metavar="N", help="the first one (default: 0)")
    config, options = _parse_and_start(parser, arguments)
    from cmtrain.commands.data_preview import preview

    preview(config, **options)


def _data_stats(arguments: list[str]) -> None:
    parser = Parser("data stats", "Count and measure the images of a configuration.")
    parser.add_json()
    config, options = _parse_and_start(parser, arguments)
    from cmtrain.commands.data_preview import stats

    stats(config, as_json=options["json"])


def _parse_and_start(parser: Parser, arguments: list[str]) -> tuple[Config, dict[str, Any]]:
    """Return the configuration of a verb and its own options, once the images are known to be there."""
    options, resolved = parser.parse_with_config(arguments)
    start.announce(f"{parser.prog.removeprefix('cmtrain ')} of {resolved.config.data.root}")
    start.check_places(resolved.config)
    start.loading()
    del options.config
    return resolved.config, vars(options)


DATA_VERBS: dict[str, Verb] = {
    "split": _data_split, "check": _data_check, "pack": _data_pack, "preview": _data_preview,
    "stats": _data_stats,
}  # fmt: skip
