"""`cmtrain eval`: the accuracy of what a run has learned, as the run itself measured it or under other conditions.

The images go through the run's own evaluation loop and loader; what differs is which weights, sizes, images and labels.
"""

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import RealLabelsImagenet

from cmtrain.commands.export import make_trained_model
from cmtrain.commands.trained_model import Trained
from cmtrain.config.schema import Config
from cmtrain.errors import EXIT_DONE, EXIT_EXPECTATION, ConfigError
from cmtrain.monitoring.console import Console
from cmtrain.step.evaluate import Evaluation, evaluate
from cmtrain.storage.weights import num_classes_in
from cmtrain.training import build
from cmtrain.training.schedule import split_batch
from pipelines.files.manifest import Manifest
from pipelines.spec import DataError

NUM_REAL_FILES = 50_000


@dataclass(frozen=True)
class Request:
    """What to evaluate. Sizes that are empty are the run's own.

    `kinds`: of weights, `model` and `ema`; where `must_have` is false those that there are. `folder`: other images than
    the run's validation split. `real`: by ImageNet-ReaL's labels, too.
    """

    kinds: tuple[str, ...] = ("model", "ema")
    must_have: bool = False
    image_px: tuple[int, ...] = ()
    resize_px: tuple[int, ...] = ()
    folder: str | None = None
    real: bool = False


@dataclass(frozen=True)
class Row:
    """One result. `real_top1`: by ImageNet-ReaL's labels; None if they were not asked for."""

    weights: str
    image_px: int
    resize_px: int
    evaluation: Evaluation
    real_top1: float | None = None

    def figures(self) -> dict[str, Any]:
        evaluation = self.evaluation
        shared = {
            key: getattr(evaluation, key) for key in ("top1", "top5", "loss", "num_images", "num_unreadable")
        }
        sizes = {"weights": self.weights, "image_px": self.image_px, "resize_px": self.resize_px}
        return sizes | shared | ({} if self.real_top1 is None else {"real_top1": self.real_top1})


def evaluate_trained(
    trained: Trained,
    request: Request,
    *,
    per_class: str | None = None,
    confusion: str | None = None,
    expect: float | None = None,
    json_path: str | None = None,
) -> int:
    """Evaluate `trained` as `request` says: a table on stderr, one JSON line on stdout.

    Args:
        per_class, confusion: CSV files to write: of every result, and of the best one.
        expect: the top-1, a share 0..1, that the best result must reach.
        json_path: a file for what stdout is given, too.

    Returns:
        The process exit code: 0, or 5 where `expect` was missed.

    Raises:
        ConfigError: sizes or options that do not go together.
        DataError: images, classes or weights that are missing or unusable, or a file that cannot be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("cmtrain eval: runs in one process, without a launcher")
    config = trained.config
    configs = [
        _with_sizes(config, *sizes) for sizes in sizes_of(config, request.image_px, request.resize_px)
    ]
    kinds = [kind for kind in request.kinds if request.must_have or kind in trained.kinds]
    weights = [trained.weights(kind) for kind in kinds]
    accelerator = build.make_accelerator(config.train.precision)
    threads = build.split_threads(config, accelerator)
    names = trained.class_names or build.open_data(config, accelerator).train.class_names
    manifest = (
        open_folder(request.folder, names, config) if request.folder else build.open_val(config, names)
    )
    real = real_labels(manifest) if request.real else None
    batch_size, _ = split_batch(config.train.global_batch_size, config.train.max_batch_per_gpu, 1)
    rows = []
    for sized in configs:
        loader = build.make_eval_loader(sized, manifest, batch_size, accelerator, threads)
        for each in weights:
            model = make_trained_model(sized, each).to(accelerator.device)
            evaluation = evaluate(
                model,
                loader.epoch(0),
                autocast=accelerator.autocast(),
                device=accelerator.device,
                num_images=len(manifest),
                num_classes=num_classes_in(each, config.model.name),
                keeps_ranked=request.real,
            )
            real_top1 = None if real is None else real_accuracy(real, evaluation)
            rows.append(
                Row(each.kind, sized.data.image_px, sized.data.eval_resize_px, evaluation, real_top1)
            )
        loader.close()
    best = max(rows, key=lambda row: row.evaluation.top1)
    labels = [*names, *map(str, range(len(names), len(best.evaluation.class_images)))]
    if confusion and best.evaluation.confusion is None:
        raise ConfigError(
            f"--confusion: {len(labels)} classes are too many for a matrix; --per-class has them"
        )
    figures = [row.figures() for row in rows]
    result = {"checkpoint": str(trained.checkpoint.path), "step": trained.step, "results": figures}
    try:
        if per_class:
            _write_csv(per_class, class_rows(rows, labels))
        if confusion and best.evaluation.confusion is not None:
            matrix = zip(labels, best.evaluation.confusion, strict=True)
            _write_csv(
                confusion, [["true \\ predicted", *labels], *([name, *counts] for name, counts in matrix)]
            )
        if json_path:
            Path(json_path).write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error
    missed = expect is not None and best.evaluation.top1 < expect
    _tell(figures, f"top-1 {best.evaluation.top1:.4f}, expected {expect:g}: missed" if missed else "")
    print(json.dumps(result), flush=True)  # noqa: T201
    return EXIT_EXPECTATION if missed else EXIT_DONE


def sizes_of(config: Config, image_px: Sequence[int], resize_px: Sequence[int]) -> list[tuple[int, int]]:
    """(image side, shorter side before the crop) pairs: each of one with each of the other, in the order given.

    Without `resize_px` it is the run's own, in the proportion of another image side to the run's.

    Raises:
        ConfigError: a crop larger than the image, or a side that the model cannot have.
    """
    data = config.data
    pairs = []
    for side in image_px or (data.image_px,):
        if side % 32:
            raise ConfigError(f"--image-px: must be multiples of 32, got {side}")
        for resize in resize_px or (round(data.eval_resize_px * side / data.image_px),):
            if resize < side:
                raise ConfigError(f"--resize-px: {resize} is less than the image side {side}")
            pairs.append((side, resize))
    return pairs


def open_folder(folder: str, class_names: Sequence[str], config: Config) -> Manifest:
    """The images below `folder`, whose class folders have training's names, or else the numbers of training's classes.

    Raises:
        DataError: a class that training does not know, or nothing to read.
    """
    scan: dict[str, Any] = {
        "cache_dir": build.cache_folder(config),
        "max_bad_fraction": config.data.max_bad_fraction,
    }
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise DataError(f"--folder {folder}: {error.strerror}") from error
    if set(found) <= set(class_names):
        return Manifest.from_folder(folder, class_names=class_names, **scan)
    numbers = [str(number) for number in range(len(class_names))]
    if set(found) <= set(numbers):
        return Manifest.from_folder(folder, class_names=numbers, **scan)
    strange = next(name for name in found if name not in class_names and name not in numbers)
    raise DataError(
        f"--folder {folder}: {strange} is neither a class of training, such as {class_names[0]}, nor a number below "
        f"{len(class_names)}"
    )


def real_labels(manifest: Manifest) -> RealLabelsImagenet:
    """ImageNet-ReaL (arXiv 2006.07159) for ImageNet's validation images, in the order of `manifest`.

    Raises:
        DataError: these are not they.
    """
    files = [manifest.file(index) for index in range(len(manifest))]
    if len(files) != NUM_REAL_FILES:
        raise DataError(
            f"--real: has labels of ImageNet's {NUM_REAL_FILES} validation images; here are {len(files)}"
        )
    real = RealLabelsImagenet(files)
    strange = next((file for file in files if os.path.basename(file) not in real.real_labels), None)
    if strange is not None:
        raise DataError(
            f"--real: {strange} is no validation image of ImageNet, such as ILSVRC2012_val_00000001.JPEG"
        )
    return real


def real_accuracy(real: RealLabelsImagenet, evaluation: Evaluation) -> float:
    """Share of the images with any real label whose likeliest class is one of their labels."""
    assert evaluation.ranked is not None
    likeliest = evaluation.ranked[:, 0].tolist()
    labels = (real.real_labels[os.path.basename(file)] for file in real.filenames)
    return float(np.mean([answer in true for answer, true in zip(likeliest, labels, strict=True) if true]))


def class_rows(rows: Sequence[Row], class_names: Sequence[str]) -> list[list[Any]]:
    """A table with its header: images, correct ones and accuracy of each class that has images, for each result."""
    table: list[list[Any]] = [["weights", "image_px", "resize_px", "class", "images", "correct", "accuracy"]]
    for row in rows:
        counts = zip(class_names, row.evaluation.class_images, row.evaluation.class_correct, strict=True)
        sizes = [row.weights, row.image_px, row.resize_px]
        table += [[*sizes, name, images, right, right / images] for name, images, right in counts if images]
    return table


def _with_sizes(config: Config, image_px: int, resize_px: int) -> Config:
    data = config.data.model_copy(update={"image_px": image_px, "eval_resize_px": resize_px})
    return config.model_copy(update={"data": data})


def _write_csv(path: str, table: Sequence[Sequence[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows(table)


def _tell(figures: Sequence[dict[str, Any]], verdict: str) -> None:
    console = Console(enabled=True)
    real = "real_top1" in figures[0]
    console.line("weights  image px  resize px   top-1   top-5    loss   images" + "   ReaL top-1" * real)
    for row in figures:
        line = (
            f"{row['weights']:<7}  {row['image_px']:>8}  {row['resize_px']:>9}  {100 * row['top1']:6.2f}  "
        )
        line += f"{100 * row['top5']:6.2f}  {row['loss']:6.4f}  {row['num_images']:>7}"
        console.line(line + (f"   {100 * row['real_top1']:10.2f}" if real else ""))
    if unreadable := figures[0]["num_unreadable"]:
        console.line(f"{unreadable} images could not be read and count as wrong")
    if verdict:
        console.line(verdict)
