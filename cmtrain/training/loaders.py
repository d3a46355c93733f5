"""Open the images of a run and make its loaders. Loads no torch, so that mistakes are found before it."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cmtrain.config.schema import Config
from cmtrain.errors import ConfigError
from cmtrain.training.schedule import Schedule
from pipelines.checks.bad_list import user_cache
from pipelines.decoder_probe import WAYS, choose_decode
from pipelines.files import demo_images, doubts, mirror, shards
from pipelines.files.manifest import Manifest
from pipelines.plan import ClassSampling, Plan
from pipelines.spec import AugmentSpec, Batch, DataError, EvalSpec, Loader, Placement, is_url

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from pipelines.loader import DaliLoader


class Data(NamedTuple):
    """The images of both splits. `notes`: what about them is likely a mistake, one line each, on rank 0."""

    train: Manifest
    val: Manifest
    notes: tuple[str, ...] = ()


def cache_folder(config: Config) -> Path:
    """Return the folder of manifests and demo images: data.cache_dir, else the user's cache."""
    return Path(config.data.cache_dir) if config.data.cache_dir else user_cache()


def place_loaders(
    config: Config, accelerator: Accelerator, control: Any = None
) -> tuple[Placement, list[str]]:
    """Decide where and with how many threads this process decodes: all ranks (of `control`) in the same way.
    Returns also a line for each way to decode that failed a test here. Raises DataError: no usable DALI.
    """
    import pipelines.loader  # noqa: F401 - without DALI a run ends here
    from cmtrain.processes.collectives import gather

    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    given = {"decode", "prefetch_batches", "max_bad_fraction", "hw_decoder_load"}
    limits = config.data.model_dump(include=given)
    place = Placement(rank, world, device, threads=split_threads(config, device), **limits)
    if device.type != "cuda":
        return place, []  # DALI itself refuses "mixed" on a CPU
    # The GPUs of a host are alike, so one of its processes tries for all.
    tries = control is None or accelerator.is_local_main_process
    results = list(filter(None, gather(choose_decode(place) if tries else None, control)))
    decode = max((decode for decode, _ in results), key=WAYS.index)
    lines = dict.fromkeys(line for _, lines in results for line in lines)
    return replace(place, decode=decode), list(lines)


def split_threads(config: Config, device: torch.device) -> int:
    """Share this process's cores between decoding and, on a CPU, the model. Returns the decode threads.
    Two pools that together have more threads than there are cores spin at each other's barriers.
    """
    cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device.type == "cuda":
        # DALI keeps 32 MiB of GPU memory and of pinned memory for each decoding thread, for either loader.
        return config.data.threads or min(cores, 24)
    threads = config.data.threads or max(1, cores // 4)
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, cores - threads))
    return threads


def check_places(config: Config, *, trains: bool = True) -> None:
    """Raise DataError, as open_data would, where images are missing; unless it `trains`, only for val."""
    root = _root_of(config, trains=trains)
    for split in ("train", "val") if trains else ("val",):
        folder, listed = _place_of(config, root, split)
        if not (listed or folder).exists():
            _open_split(config, root, split, None)


def open_data(config: Config, accelerator: Accelerator | None = None) -> Data:
    """Index both splits; of the processes that share a cache, one scans the files for all.
    Without `accelerator`, each rank may write the demo images. Raises DataError: missing or unusable files.
    """
    data = config.data
    with accelerator.local_main_process_first() if accelerator else nullcontext():
        root = _root_of(config)
    # Outside: the others would wait at a barrier, which a first look at a large folder outlasts.
    train = _open_split(config, root, "train", None)
    val = _open_split(config, root, "val", train.class_names)
    if data.fraction < 1:
        train = train.fraction(data.fraction, config.run.seed)
    if accelerator and not accelerator.is_main_process:
        return Data(train, val)
    notes = [*scale_doubts(data.mean, data.std), *doubts.split_doubts(train, "training")]
    notes += [*doubts.split_doubts(val, "validation"), *doubts.pair_doubts(train, val)]
    return Data(train, val, tuple(notes))


def scale_doubts(mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """Return a line if data.mean and data.std are of pixels in 0..255, multiply, or are swapped."""
    given = f"data.mean {list(mean)}, data.std {list(std)}"
    if max(*mean, *std) > 1 or min(mean) < 0:
        return [f"{given}: they are for pixels in 0..1; if these are for 0..255, divide them by 255"]
    if min(std) < 0.02:
        return [f"{given}: pixels in 0..1 are divided by std; if this one multiplies, give its inverse"]
    return [f"{given}: are they swapped?"] if (mean, std) == (EvalSpec.std, EvalSpec.mean) else []


def _root_of(config: Config, *, trains: bool = True) -> Path:
    """Return data.root; demo images are written first if they do not exist.
    Of a bucket it is a folder of copies, without the training images unless `trains`.
    """
    data, url = config.data, config.data.root.rstrip("/")
    if not is_url(url):
        name = data.root.removeprefix("demo:")
        return demo_images.demo_folder(name, cache_folder(config)) if name != data.root else Path(data.root)
    folder = cache_folder(config) / "buckets" / hashlib.sha256(url.encode()).hexdigest()[:16]
    room = int(data.cache_gb * 1e9)
    for split in (data.val_dir, data.train_dir)[: 1 + trains]:
        # The first process of a host has just looked.
        if os.environ.get("LOCAL_RANK", "0") == "0" or not (folder / split / mirror.SOURCE).is_file():
            room -= mirror.mirror_split(f"{url}/{split}", folder / split, room)
    return folder


def _open_split(config: Config, root: Path, split: str, class_names: Sequence[str] | None) -> Manifest:
    folder, listed = _place_of(config, root, split)
    return open_folder(config, root if listed else folder, class_names, image_list=listed)


def open_folder(config: Config, folder: Path, class_names: Sequence[str] | None, **options: Any) -> Manifest:
    """Index the images of `folder`, packed or not. Raises DataError: no images, or another class."""
    classes: dict[str, Any] = {"class_names": class_names, "multi_label": config.data.multi_label}
    if options.get("image_list") is None and shards.is_packed(folder):
        return Manifest.from_shards(folder, **classes)
    options |= {"cache_dir": cache_folder(config), "max_bad_fraction": config.data.max_bad_fraction}
    return Manifest.from_folder(folder, **classes, **options)


def _place_of(config: Config, root: Path, split: str) -> tuple[Path, Path | None]:
    """Return folder and list of a split: without both the list that `cmtrain data split` writes instead."""
    folder = root / getattr(config.data, f"{split}_dir")
    if (listed := getattr(config.data, f"{split}_list")) is not None:
        return folder, root / listed
    written = Path(f"{folder}.csv")
    return folder, written if not folder.exists() and written.is_file() else None


def open_val(config: Config, class_names: Sequence[str], folder: str | None = None) -> Manifest:
    """Index the validation split alone, or another `folder`, by the `class_names` of training.
    Class folders of another folder may be named by their positions. Raises DataError as open_folder.
    """
    if folder:
        return open_folder(config, Path(folder), class_names, positions=True)
    root = _root_of(config, trains=False)
    return _open_split(config, root, "val", class_names)


def make_train_loader(
    config: Config, manifest: Manifest, schedule: Schedule, accelerator: Accelerator, place: Placement
) -> DaliLoader:
    """Make the loader of training batches. Raises DataError where DALI cannot be loaded."""
    from pipelines.loader import train_loader

    plan = make_plan(config, manifest, schedule)
    return train_loader(manifest, plan, augment_spec(config, accelerator), place)


def make_plan(config: Config, manifest: Manifest, schedule: Schedule) -> Plan:
    sampling = None
    if config.data.sampling:  # balanced, or power: and a number
        sampling = ClassSampling(manifest.labels, float(config.data.sampling.partition(":")[2] or 0))
    return Plan(
        config.run.seed, len(manifest), schedule.global_batch_size, schedule.micro_batch_size,
        repeats=config.augment.repeats, sampling=sampling,
    )  # fmt: skip


def batches_from(step: int, loader: Loader, schedule: Schedule) -> Iterator[Batch]:
    """Yield this rank's micro-batches from optimizer step `step` on, epoch after epoch, without end."""
    while True:
        epoch, steps_into_epoch = divmod(step, schedule.steps_per_epoch)
        yield from loader.epoch(epoch, start=steps_into_epoch * schedule.global_batch_size)
        step = (epoch + 1) * schedule.steps_per_epoch


def class_weights(config: Config, manifest: Manifest, num_classes: int) -> list[float] | None:
    """Return mixing.class_weights, by output: 1 without images. Raises DataError: a mistake in the file."""
    given, names = config.mixing.class_weights, manifest.class_names
    if given is None:
        return None
    weights = [1.0] * num_classes
    if given == "auto":
        counts = manifest.class_counts().tolist()
        mean = sum(counts) / sum(count > 0 for count in counts)
        weights[: len(counts)] = [mean / count if count else 1.0 for count in counts]
        return weights
    missing = dict.fromkeys(names)
    try:
        with open(given, newline="", encoding="utf-8-sig") as file:
            for row in filter(None, reader := csv.reader(file)):
                name, number = ",".join(row[:-1]), row[-1].strip()
                is_plain = re.fullmatch(r"[0-9]*[.]?[0-9]+(e[-+]?[0-9]{1,2})?", number)
                weight = float(number) if is_plain else 0.0
                if name not in missing or not 1e-9 <= weight <= 1e9:  # the loss has 32 bits
                    wanted = "a class that has no weight yet, a comma and a number from 1e-9 to 1e9"
                    raise DataError(f"mixing.class_weights: {given}:{reader.line_num}: not {wanted}")
                del missing[name]
                weights[names.index(name)] = weight
    except (OSError, UnicodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"mixing.class_weights: {given}: {why}") from error
    if missing:
        raise DataError(f"mixing.class_weights: {given}: no weight for class {next(iter(missing))!r}")
    return weights


def label_sets(manifest: Manifest, num_classes: int, device: torch.device | str) -> torch.Tensor | None:
    """Return MixSpec's label_sets for a model of `num_classes` outputs; None where an image has a class."""
    import torch

    if manifest.label_sets is None:
        return None
    if (more := num_classes - len(manifest.class_names)) < 0:
        what = f"has {len(manifest.class_names)} classes, more than the model's {num_classes} outputs"
        raise DataError(f"{manifest.root}: {what}")
    return torch.from_numpy(np.pad(manifest.label_sets, ((0, 0), (0, more)))).float().to(device)


def make_eval_loader(
    config: Config, manifest: Manifest, batch_size: int, accelerator: Accelerator, place: Placement
) -> DaliLoader:
    """Make the loader of evaluation batches, `batch_size` images each. Raises DataError as for training."""
    from pipelines.loader import eval_loader

    data, fp16 = config.data, accelerator.mixed_precision == "fp16"
    spec = EvalSpec(data.image_px, data.eval_resize_px, data.eval_interpolation, data.mean, data.std, fp16)
    return eval_loader(manifest, spec, place, batch_size=batch_size)


def augment_spec(config: Config, accelerator: Accelerator) -> AugmentSpec:
    geometry = config.data.model_dump(include={"image_px", "interpolation", "mean", "std"})
    draws = config.augment.model_dump(exclude={"repeats", "extra"})
    return AugmentSpec(**geometry, **draws, fp16=accelerator.mixed_precision == "fp16")


def num_classes_of(config: Config, manifest: Manifest) -> int:
    """Return model.num_classes, else that of the data. Raises ConfigError: it is too small."""
    found, stated = len(manifest.class_names), config.model.num_classes
    if stated is not None and stated < found:
        raise ConfigError(f"model.num_classes: {stated}, but the training data has {found} classes")
    return stated or found
