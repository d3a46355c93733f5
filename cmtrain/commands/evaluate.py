"""Evaluate a trained model at other sizes or on other images, by its run's own loop (`cmtrain eval`)."""

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cmtrain.commands import export, trained_model
from cmtrain.config import load, schema
from cmtrain.errors import EXIT_DONE, EXIT_EXPECTATION, ConfigError
from cmtrain.monitoring import console, units
from cmtrain.step.evaluate import Evaluation, evaluate
from cmtrain.storage import records, run_folder
from cmtrain.storage.weights import num_classes_in
from cmtrain.training import build, loaders, mistakes, schedule
from pipelines import atomic, progress
from pipelines.files.doubts import split_doubts
from pipelines.spec import DataError, print_lines

SIZES = ("weights", "image_px", "resize_px")
MEASURED = (
    "top1", "top5", "map", "balanced", "f1", "loss", "calibration_error", "num_images", "num_unreadable",
)  # fmt: skip


def evaluate_trained(options: argparse.Namespace, overrides: load.Overrides) -> int:
    """Evaluate a trained model as the `options` of `cmtrain eval` ask: a table on stderr, JSON on stdout.
    Returns the exit code: 0, or 5 if the best top-1 is below `options.expect`. Raises ConfigError: options
    that do not fit together. DataError: images, classes, weights or output files that cannot be used.
    """
    # What to evaluate, on which images
    trained = trained_model.open_trained(options.run, overrides)
    config = trained.config
    sizes = schema.sizes_of(config, options.image_px, options.resize_px)
    kinds = trained.kinds if options.weights == "both" else [options.weights]
    weights = [trained.weights(kind) for kind in kinds]
    accelerator = build.make_accelerator(config.train.precision)
    device = accelerator.device
    place, lines = loaders.place_loaders(config, accelerator)
    print_lines(*lines)
    names = trained.class_names or loaders.open_data(config, accelerator).train.class_names
    manifest = loaders.open_val(config, names, options.folder)
    print_lines(*split_doubts(manifest, "images"))
    batch_size = schedule.images_at_once(config)
    count, outputs = len(manifest), num_classes_in(weights[0], config.model.name)
    labels = [*names, *map(str, range(len(names), outputs))]
    among = None
    if options.present_classes:
        if manifest.label_sets is not None:
            raise ConfigError("--present-classes: images have several classes")
        among = torch.isin(torch.arange(outputs), torch.from_numpy(manifest.labels)).to(device)
    figures: list[dict[str, Any]] = []
    by_class: list[list[Any]] = [[*SIZES, "class", "images", "correct", "accuracy"]]
    found: list[tuple[Evaluation, schema.Config]] = []
    for image_px, resize_px in sizes:
        data = config.data.model_copy(update={"image_px": image_px, "eval_resize_px": resize_px})
        sized = config.model_copy(update={"data": data})
        loader = loaders.make_eval_loader(sized, manifest, batch_size, accelerator, place)
        for each in weights:
            model = export.make_trained_model(sized, each).to(device)
            what = f"evaluating {each.kind} at {image_px} px"
            images = progress.tracked(loader.epoch(0), what, count, per_step=batch_size)
            sets = loaders.label_sets(manifest, outputs, device)
            evaluation = evaluate(model, images, accelerator, count, outputs, sets, among)
            found.append((evaluation, sized))
            how = each.kind, image_px, resize_px
            row = {key: value for key in MEASURED if (value := getattr(evaluation, key)) is not None}
            figures.append(dict(zip(SIZES, how, strict=True)) | row)
            counts = zip(labels, evaluation.class_images, evaluation.class_correct, strict=True)
            by_class += [[*how, name, size, right, right / size] for name, size, right in counts if size]
        loader.close()

    # Write files, and report
    measure = config.best_measure
    best, config = max(found, key=lambda result: result[0].score(measure))
    if options.confusion and best.confusion is None:
        many = f"{len(labels)} classes are too many"
        why = "images have several classes" if best.map is not None else many
        raise ConfigError(f"--confusion: {why} for a matrix; use --per-class")
    report: dict[str, Any] = {"checkpoint": str(trained.checkpoint.path), "step": trained.step}
    report |= {"rejected": list(trained.checkpoint.rejected), "results": figures}
    try:
        if options.per_class:
            write_csv(Path(options.per_class), by_class)
        if options.confusion and best.confusion is not None:
            matrix = [[name, *counts] for name, counts in zip(labels, best.confusion, strict=True)]
            write_csv(Path(options.confusion), [["true \\ predicted", *labels], *matrix])
        if options.save_wrong:
            with atomic.new_folder(Path(options.save_wrong)) as temporary:
                parts = best, manifest, labels, config, accelerator, place
                rows = mistakes.draw_mistakes(temporary / run_folder.MISTAKES_NAME, *parts)
                write_csv(temporary / "mistakes.csv", [["path", "true", "predicted", "probability"], *rows])
        console.write_result(report, options.json)
    except OSError as error:
        raise DataError(f"{error.filename or 'a file'}: cannot be written: {error.strerror}") from error
    _show(figures)
    console.print_result(report, asked=options.json == "")
    top1 = max(evaluation.top1 for evaluation, _ in found)
    if options.expect is not None and top1 < options.expect:
        print_lines(f"top-1 {units.percent(top1, 2)}, expected {units.percent(options.expect, 2)}: missed")
        return EXIT_EXPECTATION
    return EXIT_DONE


def write_csv(path: Path, table: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(table)
    records.replace_file(path, text.getvalue().encode("utf-8", "surrogateescape"))


def _show(figures: Sequence[dict[str, Any]]) -> None:
    shown = {"map": "mAP", "top1": "top-1", "top5": "top-5", "balanced": "balanced"}
    shown = {key: name for key, name in shown.items() if key in figures[0]}
    names = "".join(f"  {name:>8}" for name in shown.values())
    print_lines(f"weights  image px  resize px{names}    loss   images")
    for row in figures:
        line = f"{row['weights']:<7}  {row['image_px']:>8}  {row['resize_px']:>9}"
        line += "".join(f"  {units.percent(row[key], 2):>8}" for key in shown)
        print_lines(f"{line}  {row['loss']:6.4f}  {row['num_images']:>7}")
    if unreadable := figures[0]["num_unreadable"]:
        print_lines(f"{unreadable} images could not be read and count as wrong")
