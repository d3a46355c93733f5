"""Parse the verbs for runs that have trained: eval, export, predict, replay, diff and verify."""

import os
from contextlib import suppress

from cmtrain.cli import start
from cmtrain.cli.arguments import Parser, Verb, out_file, positive, share
from cmtrain.config import load, schema
from cmtrain.errors import ConfigError
from cmtrain.storage.run_folder import find_export, find_run
from pipelines.spec import DataError

RUN_HELP = "run folder, the name of one below runs, or a checkpoint"
FORMATS = ("timm", "onnx", "torch-export")


def _evaluate(arguments: list[str]) -> int:
    parser = Parser("eval", "Evaluate a trained model and its EMA, as its run did or otherwise.")
    add = parser.add_argument
    add("run", metavar="RUN", help=RUN_HELP)
    add("--weights", choices=("model", "ema", "both"), default="both", help="default: both, if both exist")
    add("--image-px", type=_sizes, default=[], metavar="LIST", help="image sides, such as 160,192")
    resize = (
        "shorter sides before the crop, such as 184,182: one for each image side, or several for one "
        "(default: the run's own; for another image side in the same proportion)"
    )
    add("--resize-px", type=_sizes, default=[], metavar="LIST", help=resize)
    folder = (
        "other images: class folders named as the training classes, or by the numbers 0, 1, ... of the "
        "classes in order, as ImageNet-V2's"
    )
    add("--folder", metavar="DIR", help=folder)
    present = "choose among the classes that the images have, as published figures of ImageNet-A and -R do"
    add("--present-classes", action="store_true", help=present)
    add("--per-class", type=out_file, metavar="FILE", help="write images and accuracy of every class as CSV")
    add("--confusion", type=out_file, metavar="FILE", help="write the best result's confusion matrix as CSV")
    wrong = "write all mistakes as CSV, and a sheet of the most confident ones, to this new folder"
    add("--save-wrong", metavar="DIR", help=wrong)
    add("--expect", type=share, metavar="TOP1", help="exit code 5 where the best top-1 is below it")
    parser.add_json(to_file=True)
    options, overrides = parser.parse(arguments)
    start.announce(f"eval of {options.run}")
    config = start.check_trained(options.run, overrides)
    if config:
        schema.sizes_of(config, options.image_px, options.resize_px)
    if options.save_wrong and os.path.lexists(options.save_wrong):
        raise ConfigError(f"--save-wrong {options.save_wrong}: exists already; choose another folder")
    if options.folder and not os.path.isdir(options.folder):
        raise DataError(f"--folder {options.folder}: no such folder")
    if config and not options.folder:
        start.check_places(config, trains=False)
    start.loading()
    from cmtrain.commands.evaluate import evaluate_trained

    return evaluate_trained(options, overrides)


def _export(arguments: list[str]) -> None:
    parser = Parser("export", "Write a trained model as files for others, compared with it.")
    add = parser.add_argument
    add("run", metavar="RUN", help=RUN_HELP)
    add("--format", choices=(*FORMATS, "all"), default="timm", help="default: timm")
    add("--out", required=True, metavar="DIR", help="folder to write; must not exist")
    add("--weights", choices=("model", "ema"), help="default: ema, if there is one")
    add("--fold-bn", action="store_true", help="absorb BatchNorm where that is exact; not with timm")
    parser.add_json()
    options, overrides = parser.parse(arguments)
    start.announce(f"export of {options.run}")
    start.check_trained(options.run, overrides)
    if os.path.lexists(options.out):
        raise ConfigError(f"--out {options.out}: exists already; choose another folder")
    start.loading()
    from cmtrain.commands.export import export
    from cmtrain.commands.trained_model import open_trained

    formats = FORMATS if options.format == "all" else (options.format,)
    how = {"kind": options.weights, "fold_bn": options.fold_bn, "as_json": options.json}
    export(open_trained(options.run, overrides), formats=formats, out=options.out, **how)


def _predict(arguments: list[str]) -> int:
    parser = Parser("predict", "Classify images, prepared as the evaluation of the model's run does.")
    add = parser.add_argument
    add("run", metavar="RUN|EXPORT", help=f"{RUN_HELP}; or what `cmtrain export` wrote for timm, or as ONNX")
    images = "image, folder, pattern, or list (.csv, .txt: one path per line, relative to its folder)"
    add("images", nargs="+", metavar="IMAGES", help=images)
    add("--top", type=positive, default=5, metavar="K", help="classes to give for each image (default: 5)")
    add("--csv", type=out_file, metavar="FILE", help="write the predictions as CSV")
    add("--jsonl", type=out_file, metavar="FILE", help="write them as JSON lines, as stdout has them")
    pooled = "write the features before the classifier, the logits and the paths as .npz"
    add("--embeddings", type=out_file, metavar="FILE", help=pooled)
    parser.add_json()
    options, overrides = parser.parse(arguments)
    named = [os.path.realpath(file) for file in (options.csv, options.jsonl, options.embeddings) if file]
    if len({*named}) < len(named):
        raise ConfigError("--csv, --jsonl and --embeddings: two of them name one file")
    start.announce(f"predict by {options.run}")
    if not find_export(options.run):
        start.check_trained(options.run, overrides)
    from pipelines.files.lists import find_images  # with numpy

    files = find_images(options.images)
    start.loading()
    from cmtrain.commands.predict import predict

    return predict(files, options, overrides)


def _replay(arguments: list[str]) -> None:
    parser = Parser("replay", "Take one step of a run again: its images, and what each layer did with them.")
    parser.add_argument("run", metavar="RUN", help="run folder, or the name of one below runs")
    what = "which step, counted from 1 as in the log; it begins at the last checkpoint before"
    parser.add_argument("--step", type=positive, required=True, metavar="N", help=what)
    sheet = "PNG of the step's images (default: RUN/replay-N.png)"
    parser.add_argument("--out", type=out_file, metavar="FILE", help=sheet)
    parser.add_json()
    options, overrides = parser.parse(arguments)
    start.announce(f"replay of {options.run}")
    run = find_run(options.run, trained=False)[0]
    with suppress(ConfigError):  # a checkpoint has a copy
        start.check_places(load.load_config(run / "config.yaml", overrides).config)
    start.loading()
    from cmtrain.commands.again.replay import replay

    replay(options.run, overrides, step=options.step, out=options.out, as_json=options.json)


def _verify(arguments: list[str]) -> int:
    parser = Parser("verify", "Check a run by its receipt, and by taking stretches of it again.")
    parser.add_argument("run", metavar="RUN", help="run folder, or the name of one below runs")
    what = "stretches between checkpoints to take again, drawn at random (default: 3)"
    parser.add_argument("--segments", type=positive, default=3, metavar="N", help=what)
    allowed = "relative difference of the loss that is allowed (default: 0 on a CPU, else 0.02)"
    parser.add_argument("--tolerance", type=share, metavar="X", help=allowed)
    parser.add_json()
    options, overrides = parser.parse(arguments)
    start.announce(f"verify of {options.run}")
    start.check_trained(options.run, overrides)
    start.loading()
    from cmtrain.commands.again.verify import verify

    how = {"segments": options.segments, "tolerance": options.tolerance, "as_json": options.json}
    return verify(options.run, overrides, **how)


def _diff(arguments: list[str]) -> int:
    parser = Parser("diff", "Find the first step at which two runs differ, and in what.")
    parser.add_argument("runs", nargs=2, metavar="RUN", help="run folder, or the name of one below runs")
    parser.add_json()
    options = parser.parse_alone(arguments)
    start.announce(f"diff of {' and '.join(options.runs)}")
    for run in options.runs:
        find_run(run, trained=False)
    start.loading()
    from cmtrain.commands.again.diff import diff

    return diff(options.runs, as_json=options.json)


def _sizes(text: str) -> list[int]:
    return [positive(part.strip()) for part in text.split(",")]


MODEL_VERBS: dict[str, Verb] = {
    "eval": _evaluate, "predict": _predict, "export": _export, "replay": _replay, "diff": _diff,
    "verify": _verify,
}  # fmt: skip
