"""The verbs for what has been trained: eval and export."""

import argparse

from cmtrain.cli.arguments import make_parser, parse, positive
from cmtrain.errors import ConfigError

FORMATS = ("timm", "onnx", "torch-export")


def evaluate_trained(arguments: list[str]) -> int:
    """`cmtrain eval ...`: returns the exit code; errors as those of the verb."""
    parser = make_parser("eval", "Evaluate a trained model and its EMA, as its run did or otherwise.")
    _add_trained(parser)
    parser.add_argument(
        "--weights", choices=("model", "ema", "both"), default="both", help="default: both, if both are"
    )
    parser.add_argument(
        "--image-px", type=_sizes, default=[], metavar="LIST", help="image sides, such as 160,192"
    )
    parser.add_argument(
        "--resize-px",
        type=_sizes,
        default=[],
        metavar="LIST",
        help="shorter sides before the crop, such as 184,182, each with each image side (default: the run's own; for "
        "another image side in the same proportion)",
    )
    parser.add_argument(
        "--folder",
        metavar="DIR",
        help="other images: class folders named as the training classes, or else by the numbers 0, 1, ... of the "
        "classes in order, as ImageNet-V2's",
    )
    parser.add_argument(
        "--real", action="store_true", help="also by ImageNet-ReaL's labels, for ImageNet's val images"
    )
    parser.add_argument(
        "--per-class", metavar="FILE", help="write images and accuracy of every class as CSV"
    )
    parser.add_argument(
        "--confusion", metavar="FILE", help="write the best result's confusion matrix as CSV"
    )
    parser.add_argument(
        "--expect", type=_fraction, metavar="TOP1", help="exit code 5 where the best top-1 is below it"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    options, overrides = parse(parser, arguments)
    _check_trained(parser, options)
    from cmtrain.commands.evaluate import EvalRequest, evaluate_trained
    from cmtrain.commands.trained_model import open_trained

    request = EvalRequest(
        kinds=("model", "ema") if options.weights == "both" else (options.weights,),
        must_have=options.weights != "both",
        image_px=tuple(options.image_px),
        resize_px=tuple(options.resize_px),
        folder=options.folder,
        real=options.real,
    )
    return evaluate_trained(
        open_trained(options.run, overrides),
        request,
        per_class=options.per_class,
        confusion=options.confusion,
        expect=options.expect,
        json_path=options.json,
    )


def export_trained(arguments: list[str]) -> int:
    """`cmtrain export ...`: returns the exit code; errors as those of the verb."""
    parser = make_parser(
        "export", "Write a trained model as files for others, compared with it before they appear."
    )
    _add_trained(parser)
    parser.add_argument("--format", choices=(*FORMATS, "all"), default="timm", help="default: timm")
    parser.add_argument("--out", metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--weights", choices=("model", "ema"), help="default: ema, if there is one")
    parser.add_argument(
        "--fold-bn", action="store_true", help="absorb BatchNorm where that is exact; not with timm"
    )
    options, overrides = parse(parser, arguments)
    _check_trained(parser, options)
    if options.out is None:
        raise ConfigError("cmtrain export: --out is missing, e.g. --out exported")
    from cmtrain.commands.export import export
    from cmtrain.commands.trained_model import open_trained

    return export(
        open_trained(options.run, overrides),
        formats=FORMATS if options.format == "all" else (options.format,),
        out=options.out,
        kind=options.weights,
        fold_bn=options.fold_bn,
    )


def _add_trained(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="run folder, the name of one below runs, or a checkpoint"
    )


def _check_trained(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.run is None:
        raise ConfigError(f"{parser.prog}: of which run? e.g. {parser.prog} runs/demo")


def _sizes(text: str) -> list[int]:
    return [positive(part.strip()) for part in text.split(",")]


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a share 0..1, got {text}")
    return value
