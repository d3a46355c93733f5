"""Draw augmented images, and measure a data set (`cmtrain data preview` and `cmtrain data stats`)."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageStat
from rich.console import Console
from rich.table import Table

from cmtrain.config.schema import Config
from cmtrain.monitoring.console import print_result
from cmtrain.step.mixing import mix
from cmtrain.training import build, loaders
from pipelines.checks import decode_one, pixels
from pipelines.files.manifest import Manifest
from pipelines.preview import contact_sheet
from pipelines.progress import tracked
from pipelines.spec import DataError, os_errors_in_one_line, print_lines, visible

_PERCENTILES = (0, 5, 50, 95, 100)
_SAMPLED_IMAGES = 1000  # decoded for mean and std, evenly spread over the split


def preview(config: Config, *, out: str, rows: int = 8, columns: int = 8, epoch: int = 0) -> None:
    """Write a PNG of augmented training images: one row per image, one column per epoch from `epoch` on.
    The images are spread evenly over the training split, and augmented as in training, with other draws. If
    the recipe mixes or erases, `<out>-mixed.png` shows that. Raises as training, and DataError for `out`.
    """
    accelerator = build.make_accelerator("auto")
    data = loaders.open_data(config, accelerator)
    print_lines(*data.notes)
    chosen = np.unique(np.linspace(0, len(data.train) - 1, rows).astype(np.int64))
    shown = data.train.select(chosen)
    schedule = build.plan_steps(config, len(data.train), accelerator.num_processes)
    schedule = replace(schedule, global_batch_size=len(chosen), max_batch_per_gpu=len(chosen), world_size=1)
    once = config.model_copy(update={"augment": config.augment.model_copy(update={"repeats": 1})})
    place, _ = loaders.place_loaders(config, accelerator)
    loader = loaders.make_train_loader(once, shown, schedule, accelerator, place)
    num_classes = len(data.train.class_names)
    sets = loaders.label_sets(data.train, num_classes, accelerator.device)
    spec = build.mix_spec(config, num_classes, sets)

    plain, mixed = [], []
    for number in range(epoch, epoch + columns):
        (batch,) = loader.epoch(number)
        by_row = torch.argsort(batch.indices)
        plain.append(batch.images[by_row])
        mixed.append(mix(batch.images, batch.labels, spec, (config.run.seed, number))[0][by_row])
    loader.close()

    path, names = Path(out), [data.train.label_name(label) for label in shown.labels]
    _write_grid(plain, names, config, path)
    if config.mixing.mixup or config.mixing.cutmix or config.mixing.reprob or config.augment.extra:
        _write_grid(mixed, names, config, path.with_name(f"{path.stem}-mixed.png"))


def stats(config: Config, *, as_json: bool = False) -> None:
    """Count and measure both splits: a table on stderr, one JSON line on stdout (see print_result).
    `mean` and `std` are the values for data.mean and data.std: over all pixels, with equal weight for every
    image. They and `undecodable` come from at most 1,000 images. Raises as training does.
    """
    data = loaders.open_data(config, build.make_accelerator("auto", checks_gpus=False))
    print_lines(*data.notes)
    report = {"train": _split_stats(data.train, config), "val": _split_stats(data.val, config)}
    table = Table("", *report)
    for key in report["train"]:
        table.add_row(key, *(_text(figures[key]) for figures in report.values()))
    Console(stderr=True).print(table)
    print_result(report, asked=as_json)


def _split_stats(manifest: Manifest, config: Config) -> dict[str, Any]:
    per_class = manifest.class_counts()
    shorter = np.minimum(manifest.heights, manifest.widths)
    return {
        "images": len(manifest), "left_out": len(manifest.bad), "not_used": dict(manifest.skipped),
        "classes": len(manifest.class_names), "images_per_class": _percentiles(per_class, (0, 50, 100)),
        "height_px": _percentiles(manifest.heights, _PERCENTILES),
        "width_px": _percentiles(manifest.widths, _PERCENTILES),
        "smaller_than_crop": float((shorter < config.data.image_px).mean()),
        "bytes": int(manifest.size_bytes.sum()), **_pixel_stats(manifest),
    }  # fmt: skip


def _percentiles(values: NDArray[Any], percents: tuple[int, ...]) -> dict[str, float]:
    names = {0: "min", 50: "median", 100: "max"}
    found = np.percentile(values, percents).tolist()
    return {names.get(percent, f"p{percent}"): value for percent, value in zip(percents, found, strict=True)}


def _pixel_stats(manifest: Manifest) -> dict[str, Any]:
    chosen = np.unique(np.linspace(0, len(manifest) - 1, _SAMPLED_IMAGES).astype(np.int64)).tolist()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, os_errors_in_one_line():
        decoded = pool.map(lambda index: _moments(manifest, index), chosen)
        found = list(tracked(decoded, f"{manifest.root}: decoding", len(chosen)))
    moments = np.array([moment for moment in found if not isinstance(moment, str)]).reshape(-1, 2, 3)
    failures = [(index, why) for index, why in zip(chosen, found, strict=True) if isinstance(why, str)]
    print_lines(*(f"cannot be decoded: {manifest.file(index)}: {why}" for index, why in failures))
    mean, square = moments.mean(axis=0) if len(moments) else np.full((2, 3), np.nan)
    variance = np.maximum(square - mean**2, 0)  # rounding leaves images of one colour below
    return {
        "mean": np.round(mean, 4).tolist(), "std": np.round(np.sqrt(variance), 4).tolist(),
        "decoded": len(chosen), "undecodable": len(failures),
    }  # fmt: skip


def _moments(manifest: Manifest, index: int) -> NDArray[np.float64] | str:
    """Return (2, 3): mean and mean square of R, G and B in 0..1; or the reason why there are none."""
    packed = manifest.packed
    try:
        path = Path(manifest.file(index))
        content = packed.read(index) if packed else decode_one.patiently(path.read_bytes, path)
        with Image.open(io.BytesIO(content), formats=decode_one.FORMATS) as image:
            found = ImageStat.Stat(pixels.grey_or_rgb(image).convert("RGB"))
            return np.array([found.mean, np.square(found.rms)]) / [[255], [255**2]]
    except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
        if decode_one.is_trouble(error) or isinstance(error, DataError | MemoryError):
            raise
        return decode_one.fault_of(error).reason


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return visible("  ".join(f"{name} {_text(number)}" for name, number in value.items()))
    if isinstance(value, list):
        return " ".join(f"{number:.4f}" for number in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _write_grid(epochs: list[torch.Tensor], names: list[str], config: Config, path: Path) -> None:
    """Write a grid with one column for each of `epochs`, (rows, 3, H, W). `names`: of each row's class."""
    images = torch.stack(epochs, dim=1).flatten(0, 1)  # -> (rows * columns, 3, H, W)
    mean, std = config.data.mean, config.data.std
    captions = [[name] for name in names for _ in epochs]
    try:
        contact_sheet(images, mean, std, path, len(images), len(epochs), captions)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    print_lines(path)
