"""Classify images with a trained model, prepared as the evaluation of its run does (`cmtrain predict`)."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmtrain.commands import evaluate, export, trained_model
from cmtrain.config.load import Overrides
from cmtrain.config.schema import Config
from cmtrain.errors import EXIT_DATA, EXIT_DONE, ConfigError
from cmtrain.monitoring.units import percent
from cmtrain.step.evaluate import THRESHOLD
from cmtrain.storage import records, run_folder, weights
from cmtrain.training import build, loaders, schedule
from pipelines import atomic, progress
from pipelines.files.labels import NO_CLASS, SEPARATOR
from pipelines.files.manifest import Manifest
from pipelines.spec import UNREADABLE, DataError, print_lines, visible


def predict(files: Sequence[str], options: argparse.Namespace, overrides: Overrides) -> int:
    """Classify `files` as the `options` of `cmtrain predict` ask.
    Files that cannot be read are named on stderr and left out: the exit code is 3 then, else 0. Raises
    ConfigError: options that do not fit the model. DataError: the model, every image or an output file.
    """
    # Open the model and the images
    config, class_names, model, thresholds = open_model(options.run, overrides)
    if options.embeddings and not hasattr(model, "forward_head"):
        raise ConfigError("--embeddings: this model has logits alone, as ONNX and simple modules have")
    accelerator = build.make_accelerator(config.train.precision)
    if isinstance(model, nn.Module):
        model.to(accelerator.device)
    place, lines = loaders.place_loaders(config, accelerator)
    manifest = Manifest.from_files(files)
    batch_size = schedule.images_at_once(config)
    any_bad = replace(place, max_bad_fraction=1.0)
    loader = loaders.make_eval_loader(config, manifest, batch_size, accelerator, any_bad)
    given = {os.path.abspath(file): file for file in files}
    print_lines(*lines)

    # Predict, as `evaluate` does
    rows: list[dict[str, Any]] = []
    kept: list[list[Tensor]] = []  # logits and pooled features of each batch, if asked for
    bad = list(manifest.bad)
    batches = progress.tracked(loader.epoch(0), "predicting", len(manifest), per_step=batch_size)
    try:
        for images, labels, indices in batches:
            good = labels != UNREADABLE
            with torch.no_grad(), accelerator.autocast():
                if options.embeddings:
                    maps = model.forward_features(images)
                    outputs = [model.forward_head(maps), model.forward_head(maps, pre_logits=True)]
                    kept.append([output.float()[good].cpu() for output in outputs])
                else:
                    outputs = [model(images)]
            logits = outputs[0].float().cpu()[good.cpu()]
            names = [*class_names, *map(str, range(len(class_names), logits.shape[1]))]
            best = logits.topk(min(options.top, logits.shape[1])).indices
            several = config.data.multi_label
            all_shares = logits.sigmoid() if several else logits.softmax(1)
            fits = len(thresholds) == logits.shape[1]
            limits = torch.tensor(thresholds if fits else [THRESHOLD], dtype=torch.float64)
            for index, classes, shares in zip(indices[good].tolist(), best, all_shares, strict=True):
                row: dict[str, Any] = {"path": given[manifest.file(index)]}
                if several:
                    row["labels"] = [names[number] for number in (shares >= limits).nonzero()]
                row["classes"] = [names[number] for number in classes]
                rows.append(row | {"probabilities": shares[classes].tolist()})
    finally:
        bad += loader.take_bad_files()
        loader.close()
        print_lines(*(f"{given[file.path]}: {file.reason}" for file in bad))
    if bad:
        print_lines(f"{len(bad):,} of {len(files):,} images cannot be read")
    if rows:
        _write(rows, [torch.cat(column).numpy() for column in zip(*kept, strict=True)], options)
    return EXIT_DATA if bad else EXIT_DONE


def open_model(place: str, overrides: Overrides) -> tuple[Config, Sequence[str], Any, Sequence[float]]:
    """Return configuration, class names, model, on the CPU, and thresholds of a run or an export.
    The model is a module (a run's EMA if it has one) or a function. Raises as open_trained and read_export.
    """
    path = run_folder.find_export(place)
    if path is None:
        trained = trained_model.open_trained(place, overrides)
        names = trained.class_names or loaders.open_data(trained.config).train.class_names
        kind = trained.kinds[-1]
        model = export.make_trained_model(trained.config, trained.weights(kind))
        return trained.config, names, model, trained.thresholds.get(kind, [])
    config, labels, thresholds = trained_model.read_export(path.with_name("config.json"), overrides)
    if path.suffix == ".onnx":
        if "data.image_px" in dict(overrides):
            raise ConfigError("--data.image_px: an ONNX file has one image size; take the run")
        return config, labels, export.read_onnx(path, config.data.image_px), thresholds
    return config, labels, export.make_trained_model(config, weights.read_weights(str(path))), thresholds


def _write(rows: Sequence[dict[str, Any]], kept: Sequence[Any], options: argparse.Namespace) -> None:
    """Write the files that `options` name, or print a table or JSON. Raises DataError: cannot be written."""
    lines = [json.dumps(row) + "\n" for row in rows]
    answers = [list(zip(row["classes"], row["probabilities"], strict=True)) for row in rows]
    paths = [row["path"] for row in rows]
    labels = [[SEPARATOR.join(row["labels"]) or NO_CLASS for row in rows]] if "labels" in rows[0] else []
    try:
        if options.csv:
            ranks = range(1, len(answers[0]) + 1)
            begins: list[Sequence[str]] = [["path", "labels"] if labels else ["path"]]
            begins += zip(paths, *labels, strict=True)
            ends = [[(f"class_{rank}", f"probability_{rank}") for rank in ranks], *answers]
            table = [[*begin, *chain(*end)] for begin, end in zip(begins, ends, strict=True)]
            evaluate.write_csv(Path(options.csv), table)
        if options.jsonl:
            records.replace_file(Path(options.jsonl), "".join(lines))
        if options.embeddings:
            with atomic.replacing(Path(options.embeddings)) as file:
                np.savez(file, paths=np.array(paths, np.str_), logits=kept[0], embeddings=kept[1])
    except OSError as error:
        raise DataError(f"{error.filename or 'a file'}: cannot be written: {error.strerror}") from error
    if options.json or not (sys.stdout.isatty() or options.csv or options.jsonl):
        sys.stdout.writelines(lines)
    elif not (options.csv or options.jsonl):
        columns = [list(map(visible, column)) for column in (paths, *labels)]
        widths = [max(map(len, column)) for column in columns]
        for cells, answer in zip(zip(*columns, strict=True), answers, strict=True):
            begin = "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
            shown = ", ".join(f"{name} {percent(probability)}" for name, probability in answer)
            print_lines(f"{begin}  {shown}")
