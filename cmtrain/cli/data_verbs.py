"""The verbs of `cmtrain data`."""

from collections.abc import Callable

from cmtrain.cli.arguments import did_you_mean, load, make_parser, parse, parse_alone, positive
from cmtrain.errors import ConfigError


def data(arguments: list[str]) -> int:
    """`cmtrain data ...`: returns the exit code; errors as those of the verb."""
    what = arguments.pop(0) if arguments else ""
    if what not in _DATA_VERBS:
        close = did_you_mean(what, list(_DATA_VERBS)) or f"; there are {', '.join(_DATA_VERBS)}"
        raise ConfigError(f"cmtrain data {what}: unknown verb{close}".replace("data :", "data:"))
    return _DATA_VERBS[what](arguments)


def _data_check(arguments: list[str]) -> int:
    parser = make_parser(
        "data check", "Find the images that cannot be read; training leaves them out from then on."
    )
    parser.add_argument(
        "root", metavar="DIR", help="folder with train/ and val/, or one tree of class folders"
    )
    parser.add_argument("--headers-only", action="store_true", help="read headers, do not decode")
    parser.add_argument("--processes", type=positive, metavar="N", help="default: one per core")
    parser.add_argument(
        "--out", metavar="FILE", help="write the list there instead; training does not look there"
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="data.cache_dir of the runs, if they have one")
    options = parse_alone(parser, arguments)
    from cmtrain.commands.data_check import check

    return check(
        options.root,
        full=not options.headers_only,
        processes=options.processes,
        out=options.out,
        cache_dir=options.cache_dir,
    )


def _data_pack(arguments: list[str]) -> int:
    parser = make_parser(
        "data pack", "Write an image folder as tar shards with an index, readable by webdataset, too."
    )
    parser.add_argument("source", metavar="SRC", help="folder with train/ and val/")
    parser.add_argument("destination", metavar="DST", help="folder to write; the same command resumes")
    parser.add_argument(
        "--resize-shorter", type=positive, metavar="PX", help="shrink the shorter side to PX pixels"
    )
    parser.add_argument(
        "--quality", type=positive, default=90, metavar="Q", help="of re-encoded JPEGs (default: 90)"
    )
    parser.add_argument(
        "--shard-size", type=positive, default=256, metavar="MIB", help="MiB a shard (default: 256)"
    )
    parser.add_argument("--processes", type=positive, metavar="N", help="default: one per core")
    parser.add_argument(
        "--max-bad-fraction", type=float, metavar="X", help="unreadable share to refuse (default: 0.1)"
    )
    parser.add_argument(
        "--train-list", metavar="FILE", help="list of training images below SRC, instead of train/"
    )
    parser.add_argument("--val-list", metavar="FILE", help="the same for validation")
    options = parse_alone(parser, arguments)
    from cmtrain.commands.data_pack import pack

    return pack(
        options.source,
        options.destination,
        resize_shorter=options.resize_shorter,
        quality=options.quality,
        shard_mib=options.shard_size,
        processes=options.processes,
        train_list=options.train_list,
        val_list=options.val_list,
        **({} if options.max_bad_fraction is None else {"max_bad_fraction": options.max_bad_fraction}),
    )


def _data_preview(arguments: list[str]) -> int:
    parser = make_parser(
        "data preview", "Draw augmented training images: a row is one image, its columns are epochs."
    )
    parser.add_argument(
        "--config", metavar="FILE", help="configuration file, or one that ships with cmtrain"
    )
    parser.add_argument(
        "--out", default="preview.png", metavar="FILE", help="PNG to write (default: preview.png)"
    )
    parser.add_argument("--rows", type=positive, default=8, metavar="N", help="images (default: 8)")
    parser.add_argument("--columns", type=positive, default=8, metavar="N", help="epochs (default: 8)")
    parser.add_argument("--epoch", type=int, default=0, metavar="N", help="the first one (default: 0)")
    options, overrides = parse(parser, arguments)
    config = load("data preview", options.config, overrides).config
    from cmtrain.commands.data_preview import preview

    return preview(config, out=options.out, rows=options.rows, columns=options.columns, epoch=options.epoch)


def _data_stats(arguments: list[str]) -> int:
    parser = make_parser("data stats", "Count and measure the images of a configuration.")
    parser.add_argument(
        "--config", metavar="FILE", help="configuration file, or one that ships with cmtrain"
    )
    options, overrides = parse(parser, arguments)
    config = load("data stats", options.config, overrides).config
    from cmtrain.commands.data_preview import stats

    return stats(config)


_DATA_VERBS: dict[str, Callable[[list[str]], int]] = {
    "check": _data_check,
    "pack": _data_pack,
    "preview": _data_preview,
    "stats": _data_stats,
}
