"""Measure the accuracy of a trained model: other weights, sizes, images and labels (`cmtrain eval`).

The images go through the run's own evaluation loop and loader.
"""

import argparse
import csv
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from timm.data import RealLabelsImagenet

from cmtrain.commands.evaluation_sizes import sizes_of
from cmtrain.commands.export import make_trained_model
from cmtrain.commands.trained_model import open_trained
from cmtrain.config.load import Overrides
from cmtrain.config.schema import Config
from cmtrain.errors import EXIT_DONE, EXIT_EXPECTATION, ConfigError
from cmtrain.monitoring.console import Console, print_result
from cmtrain.monitoring.units import percent
from cmtrain.step.evaluate import Evaluation, evaluate
from cmtrain.storage.checkpoint import new_folder
from cmtrain.storage.records import replace_file
from cmtrain.storage.weights import num_classes_in
from cmtrain.training import build, loaders
from cmtrain.training.schedule import split_batch
from pipelines.files.doubts import split_doubts
from pipelines.files.labels import some
from pipelines.files.manifest import Manifest
from pipelines.preview import MAX_IMAGES, contact_sheet
from pipelines.progress import tracked
from pipelines.spec import DataError, Placement, print_lines

NUM_REAL_FILES, NUM_IMAGENET_CLASSES = 50_000, 1_000
SIZES = ("weights", "image_px", "resize_px")
MEASURED = ("top1", "top5", "balanced", "f1", "loss", "num_images", "num_unreadable")


def evaluate_trained(options: argparse.Namespace, overrides: Overrides) -> int:
    """Evaluate a trained model as the `options` of `cmtrain eval` ask: a table on stderr, JSON on stdout.

    Returns the exit code: 0, or 5 if the best top-1 is below `options.expect`. Raises ConfigError: sizes or
    options that do not fit together. DataError: images, classes or weights that are missing or unusable, or
    a file that cannot be written.
    """
    # What to evaluate, on which images
    trained = open_trained(options.run, overrides)
    config = trained.config
    sizes = sizes_of(config, options.image_px, options.resize_px)
    kinds = trained.kinds if options.weights == "both" else [options.weights]
    weights = [trained.weights(kind) for kind in kinds]
    accelerator = build.make_accelerator(config.train.precision)
    place, lines = loaders.place_loaders(config, accelerator)
    print_lines(*lines)
    names = trained.class_names or loaders.open_data(config, accelerator).train.class_names
    manifest = loaders.open_val(config, names, options.folder)
    print_lines(*split_doubts(manifest, "images"))
    real = real_labels(manifest) if options.real else None
    numbers = imagenet_numbers(names) if options.real else []
    batch_size, _ = split_batch(config.train.global_batch_size, config.train.max_batch_per_gpu, 1)
    figures: list[dict[str, Any]] = []
    evaluations, configs = list[Evaluation](), list[Config]()
    for image_px, resize_px in sizes:
        data = config.data.model_copy(update={"image_px": image_px, "eval_resize_px": resize_px})
        sized = config.model_copy(update={"data": data})
        loader = loaders.make_eval_loader(sized, manifest, batch_size, accelerator, place)
        for each in weights:
            model = make_trained_model(sized, each).to(accelerator.device)
            count, outputs = len(manifest), num_classes_in(each, config.model.name)
            what = f"evaluating {each.kind} at {image_px} px"
            images = tracked(loader.epoch(0), what, count, per_step=batch_size)
            ranks = options.real or options.save_wrong is not None
            evaluation = evaluate(model, images, accelerator, count, outputs, keeps_ranked=ranks)
            row = dict(zip(SIZES, (each.kind, image_px, resize_px), strict=True))
            figures.append(row | {key: getattr(evaluation, key) for key in MEASURED})
            if real is not None:
                figures[-1]["real_top1"] = real_accuracy(real, evaluation, numbers)
            evaluations.append(evaluation)
            configs.append(sized)
        loader.close()

    # Write files, and report
    best = max(evaluations, key=lambda evaluation: evaluation.top1)
    labels = [*names, *map(str, range(len(names), len(best.class_images)))]
    if options.confusion and best.confusion is None:
        raise ConfigError(f"--confusion: {len(labels)} classes are too many for a matrix; use --per-class")
    report: dict[str, Any] = {"checkpoint": str(trained.checkpoint.path), "step": trained.step}
    report |= {"rejected": list(trained.checkpoint.rejected), "results": figures}
    try:
        if options.per_class:
            write_csv(Path(options.per_class), class_rows(figures, evaluations, labels))
        if options.confusion and best.confusion is not None:
            matrix = [[name, *counts] for name, counts in zip(labels, best.confusion, strict=True)]
            write_csv(Path(options.confusion), [["true \\ predicted", *labels], *matrix])
        if options.save_wrong:
            seen = configs[evaluations.index(best)], accelerator, place
            save_mistakes(Path(options.save_wrong), best, manifest, labels, *seen)
        if options.json:
            replace_file(Path(options.json), json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{error.filename or 'a file'}: cannot be written: {error.strerror}") from error
    _show(figures)
    print_result(report, asked=options.json == "")
    if options.expect is not None and best.top1 < options.expect:
        missed = f"top-1 {percent(best.top1, 2)}, expected {percent(options.expect, 2)}: missed"
        Console(enabled=True).line(missed)
        return EXIT_EXPECTATION
    return EXIT_DONE


def real_labels(manifest: Manifest) -> RealLabelsImagenet:
    """Return ImageNet-ReaL's labels (arXiv 2006.07159) of ImageNet's validation images. Raises DataError."""
    files = [manifest.file(index) for index in range(len(manifest))]
    if len(files) != NUM_REAL_FILES:
        expected = f"has labels of ImageNet's {NUM_REAL_FILES} validation images"
        raise DataError(f"--real: {expected}; here are {len(files)}")
    real = RealLabelsImagenet(files)
    for file in files:
        if os.path.basename(file) not in real.real_labels:
            example = "such as ILSVRC2012_val_00000001.JPEG"
            raise DataError(f"--real: {file} is no validation image of ImageNet, {example}")
    return real


def imagenet_numbers(class_names: Sequence[str]) -> list[int]:
    """Return ImageNet's number of each class. Raises DataError unless they are 0..999 or its synsets."""
    if len(class_names) == NUM_IMAGENET_CLASSES:
        if set(class_names) == set(map(str, range(NUM_IMAGENET_CLASSES))):
            return list(map(int, class_names))  # in the order of text: 0, 1, 10, 100
        if all(re.fullmatch("n[0-9]{8}", name) for name in class_names):
            in_order = sorted(class_names)
            return [in_order.index(name) for name in class_names]
    what = f"the run's {len(class_names):,} classes ({some(class_names)}) are neither 0 to 999"
    raise DataError(f"--real: its labels are numbers of ImageNet's classes; {what} nor such as n01440764")


def real_accuracy(real: RealLabelsImagenet, evaluation: Evaluation, numbers: Sequence[int]) -> float:
    """Return the share of the images with real labels whose likeliest class is among them.

    `numbers`: ImageNet's number of each class of the model.
    """
    assert evaluation.ranked is not None
    number_of = dict(enumerate(numbers))  # a model may have more outputs than classes
    likeliest = [number_of.get(place) for place in evaluation.ranked[:, 0].tolist()]
    labels = (real.real_labels[os.path.basename(file)] for file in real.filenames)
    return float(np.mean([answer in true for answer, true in zip(likeliest, labels, strict=True) if true]))


def class_rows(
    figures: Sequence[dict[str, Any]], evaluations: Sequence[Evaluation], class_names: Sequence[str]
) -> list[list[Any]]:
    """Return a table with its header: images, correct ones and accuracy of each class, by evaluation."""
    table: list[list[Any]] = [[*SIZES, "class", "images", "correct", "accuracy"]]
    for row, evaluation in zip(figures, evaluations, strict=True):
        sizes = [row[key] for key in SIZES]
        counts = zip(class_names, evaluation.class_images, evaluation.class_correct, strict=True)
        table += [[*sizes, name, images, right, right / images] for name, images, right in counts if images]
    return table


def save_mistakes(
    folder: Path, evaluation: Evaluation, manifest: Manifest, labels: Sequence[str], config: Config,
    accelerator: Accelerator, place: Placement,
) -> None:  # fmt: skip
    """Write the mistakes of `evaluation`, the most confident first, into the new `folder`.

    mistakes.csv has all of them, mistakes.png the first MAX_IMAGES, as the model sees them. Raises OSError.
    """
    assert evaluation.ranked is not None
    assert evaluation.confidence is not None
    predicted, confidence = evaluation.ranked[:, 0].numpy(), evaluation.confidence.numpy()
    wrong = np.flatnonzero((predicted != manifest.labels) & (predicted >= 0))
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    shown = manifest.select(wrong[:MAX_IMAGES])
    rows = [
        [manifest.file(index), labels[manifest.labels[index]], labels[predicted[index]], confidence[index]]
        for index in wrong.tolist()
    ]
    temporary = folder.absolute().parent / f".{folder.name}.{os.getpid()}"
    with new_folder(folder, temporary):
        write_csv(temporary / "mistakes.csv", [["path", "true", "predicted", "probability"], *rows])
        if rows:
            loader = loaders.make_eval_loader(config, shown, len(shown), accelerator, place)
            (batch,) = loader.epoch(0)
            captions = [[f"true: {true}", f"{percent(share)} {name}"] for _, true, name, share in rows]
            how = config.data.mean, config.data.std, temporary / "mistakes.png"
            contact_sheet(batch.images, *how, captions=captions)
            loader.close()


def write_csv(path: Path, table: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(table)
    replace_file(path, text.getvalue().encode("utf-8", "surrogateescape"))


def _show(figures: Sequence[dict[str, Any]]) -> None:
    console = Console(enabled=True)
    header = "weights  image px  resize px     top-1     top-5  balanced    loss   images"
    console.line(header + "   ReaL top-1" if "real_top1" in figures[0] else header)
    for row in figures:
        top1, top5 = percent(row["top1"], 2), percent(row["top5"], 2)
        line = f"{row['weights']:<7}  {row['image_px']:>8}  {row['resize_px']:>9}  {top1:>8}  {top5:>8}"
        line += f"  {percent(row['balanced'], 2):>8}  {row['loss']:6.4f}  {row['num_images']:>7}"
        console.line(line + (f"   {percent(row['real_top1'], 2):>10}" if "real_top1" in row else ""))
    if unreadable := figures[0]["num_unreadable"]:
        console.line(f"{unreadable} images could not be read and count as wrong")
