"""Recompute the BatchNorm statistics of a run or of any trainer's weights file (`cmtrain repair-bn`).

One overflow in fp16 turns them into NaN while the weights stay healthy, and from then on every evaluation is
NaN (docs/nan.md). They are replaced by the plain mean over training batches (torch's swa_utils.update_bn). A
moving average cannot heal them, not even with momentum 1: the old value is in the sum, and 0 * NaN is NaN.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from cmtrain.commands.bench.timing import endless
from cmtrain.commands.trained_model import open_trained, read_checkpoint
from cmtrain.config.load import Overrides
from cmtrain.config.schema import Config
from cmtrain.errors import ConfigError
from cmtrain.monitoring.console import print_result
from cmtrain.monitoring.units import percent
from cmtrain.step.evaluate import Evaluation, evaluate
from cmtrain.step.mixing import mix
from cmtrain.storage import checkpoint, run_folder, state_file, weights
from cmtrain.training import build, loaders
from cmtrain.training.schedule import images_at_once, split_batch
from pipelines.atomic import replacing
from pipelines.progress import tracked
from pipelines.spec import DataError, print_lines

STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")


class Source(NamedTuple):
    """Everything in a file or checkpoint. `write` publishes it elsewhere, with a record of the repair."""

    path: Path
    content: dict[str, Any]
    write: Callable[[dict[str, Any]], Path]
    next_step: str = ""
    rejected: tuple[str, ...] = ()


class Entry(NamedTuple):
    """One state_dict of a source and its model. `keys`: the key in `state` for each name in the model."""

    label: str
    state: dict[str, Any]
    keys: dict[str, str]
    model: nn.Module
    num_classes: int

    def nonfinite(self) -> list[str]:
        return _nonfinite({f"{self.label} {name}": self.state[key] for name, key in self.keys.items()})

    def take_statistics(self) -> None:
        """Replace the running statistics in `state` by the model's, in the data types they had there."""
        own = self.model.state_dict()
        for name, key in self.keys.items():
            if name.endswith(STATISTICS):
                self.state[key] = own[name].to("cpu", self.state[key].dtype, copy=True)


def repair_bn(
    place: str, config: Config | None, overrides: Overrides, out: str | None, batches: int, *, as_json: bool
) -> None:
    """Recompute the BatchNorm statistics of all weights (model and EMA) at `place`; write a repaired copy.

    They are averaged over `batches` micro-batches of training, augmented and mixed, in fp32, which does not
    overflow where fp16 did. Prints accuracy before and after on stderr, and one JSON line on stdout.
    `place`: a run, a checkpoint, or a file by torch.save or safetensors: a state_dict, or a dictionary that
    holds some. `config`: model and data; None takes a run's own, with `overrides`. `out`: what to write;
    None: see the command's help. Raises ConfigError: no configuration, or one of another model. DataError:
    nothing usable at `place`, weights that are not finite themselves, or a write that failed.
    """
    if Path(place).is_file() or place.endswith(run_folder.WEIGHTS_SUFFIXES):
        source = _open_file(Path(place), Path(out) if out else None)
        if config is None:
            example = "--config configs/demo.yaml --model.name resnet18 --data.root photos"
            raise ConfigError(f"cmtrain repair-bn: {place} needs its model and data, e.g. {example}")
    else:
        config, source = _open_run(place, config, overrides, out)
    accelerator = build.make_accelerator(config.train.precision)
    placement, lines = loaders.place_loaders(config, accelerator)
    print_lines(*lines)
    data = loaders.open_data(config, accelerator)
    limits = {"max_batch_per_gpu": images_at_once(config)}
    config = config.model_copy(update={"train": config.train.model_copy(update=limits)})
    schedule = build.plan_steps(config, len(data.train), 1)
    split_batch(schedule.global_batch_size, schedule.max_batch_per_gpu, 1, has_batchnorm=True)
    num_classes = loaders.num_classes_of(config, data.train)

    # Load every state_dict, and refuse what new statistics cannot heal.
    how = source.path, config, num_classes, accelerator.device
    entries = [_load(*how, label, state) for label, state in _states_in(source).items()]
    nonfinite = [name for entry in entries for name in entry.nonfinite()]
    _refuse(source.path, [name for name in nonfinite if not name.endswith(STATISTICS)])

    # Evaluate, recompute, evaluate again.
    train_loader = loaders.make_train_loader(config, data.train, schedule, accelerator, placement)
    num_images, size = len(data.val), schedule.micro_batch_size
    eval_loader = loaders.make_eval_loader(config, data.val, size, accelerator, placement)

    def accuracy(entry: Entry) -> Evaluation:
        images = tracked(eval_loader.epoch(0), f"evaluating {entry.label}", num_images, per_step=size)
        sets = loaders.label_sets(data.val, entry.num_classes, accelerator.device)
        return evaluate(entry.model, images, accelerator, num_images, entry.num_classes, sets)

    before = [accuracy(entry) for entry in entries]
    torch.manual_seed(config.run.seed)  # for stochastic depth and dropout
    for entry in entries:
        sets = loaders.label_sets(data.train, entry.num_classes, accelerator.device)
        spec = build.mix_spec(config, entry.num_classes, sets)
        taken = enumerate(itertools.islice(endless(train_loader), batches))
        mixed = (mix(x.float(), labels, spec, (config.run.seed, i, 0))[0] for i, (x, labels, _) in taken)
        update_bn(tracked(mixed, f"averaging batches for {entry.label}", batches), entry.model)
        entry.take_statistics()
        if still := entry.nonfinite():
            raise DataError(f"{source.path}: {still[0]} is not finite after {batches} fp32 batches either")
    after = [accuracy(entry) for entry in entries]
    train_loader.close()
    eval_loader.close()

    # Write and report.
    written = source.write({"from": str(source.path), "statistics": nonfinite, "batches": batches})
    found = "all BatchNorm statistics were finite"
    if nonfinite:
        found = f"{len(nonfinite)} BatchNorm statistics were not finite, {nonfinite[0]} first"
    print_lines(f"{source.path}: {found}; averaged over {batches} batches")
    result: dict[str, Any] = {"out": str(written), "nonfinite_statistics": nonfinite, "batches": batches}
    result["top1"] = {}
    for entry, was, now in zip(entries, before, after, strict=True):
        nan = "" if math.isfinite(was.loss) else " (its outputs were NaN)"
        print_lines(f"{entry.label}: top-1 {percent(was.top1)} before{nan}, {percent(now.top1)} after")
        result["top1"][entry.label] = [was.top1, now.top1]
    print_lines(f"written to {written}{source.next_step}")
    print_result(result | {"rejected": list(source.rejected)}, asked=as_json)


def _open_run(
    place: str, config: Config | None, overrides: Overrides, out: str | None
) -> tuple[Config, Source]:
    """Open a checkpoint; without `config` it must belong to a run folder, whose configuration is taken."""
    if config is None:
        trained = open_trained(place, overrides)
        config, loaded = trained.config, trained.checkpoint
    else:
        loaded = read_checkpoint(Path(place))
    step = int(loaded.state["progress"]["step"])
    state = loaded.state["optimizer"]["state"]
    moments = {f"optimizer {name} {i}": state[i][name] for i in state for name in state[i]}
    _refuse(loaded.path, _nonfinite(moments))
    root = Path(out or loaded.path.absolute().parent.parent / "repaired")
    final = checkpoint.checkpoint_path(root, step)
    if final.exists():
        raise DataError(f"{final} exists already; choose another --out")

    def write(record: dict[str, Any]) -> Path:
        try:
            return checkpoint.save_checkpoint(root, step, loaded.state, loaded.meta | {"repaired": record})
        except (OSError, RuntimeError, state_file.CheckpointError) as error:
            raise DataError(f"{root}: {error}") from error

    advice = f"; continue from it with --run.name NEW --resume {final}"
    return config, Source(loaded.path, loaded.state, write, advice, loaded.rejected)


def _open_file(path: Path, out: Path | None) -> Source:
    """Read a weights file of any trainer."""
    final = out or path.with_name(f"{path.stem}-repaired{path.suffix}")
    is_safetensors = path.suffix == ".safetensors"
    if (final.suffix == ".safetensors") != is_safetensors:
        raise ConfigError(f"--out {final}: must end in {path.suffix}, because the same format is written")
    if not final.parent.is_dir() or final.is_dir() or (out is None and final.exists()):
        raise ConfigError(f"{final} exists already or cannot be made; choose another --out")
    content, metadata = weights.read_file(path)

    def write(record: dict[str, Any]) -> Path:
        try:
            with replacing(final) as file:
                if is_safetensors:
                    file.write(safetensors.torch.save(content, metadata))
                else:
                    torch.save(content, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise DataError(f"{final}: cannot be written: {error}") from error
        return final

    return Source(path, content, write)


def _states_in(source: Source) -> dict[str, dict[str, Any]]:
    """Return the state_dicts with BatchNorm statistics: all of the content as `model`, or entries of it."""
    parts = {str(name): part for name, part in source.content.items() if isinstance(part, dict)}
    everything = {"model": source.content} | parts
    states = {name: part for name, part in everything.items() if _find_key(part, "running_var")}
    if not states:
        raise DataError(f"{source.path}: has no BatchNorm statistics to repair (no key ends in running_var)")
    return states


def _load(
    path: Path, config: Config, data_classes: int, device: torch.device, label: str, state: dict[str, Any]
) -> Entry:
    """Load `state`, whose keys may share a prefix, into a new model. Raises ConfigError: it does not fit."""
    name = config.model.name
    head = getattr(timm.get_pretrained_cfg(name), "classifier", None) or "head"
    head_key = _find_key(state, f"{head}.weight")
    num_classes = len(state[head_key]) if head_key else data_classes
    if num_classes < data_classes:
        has = f"{label} has {num_classes} classes, the data {data_classes}"
        raise ConfigError(f"{path}: {has}; set data.root")
    model = build.make_model(config, num_classes, device)
    first = next((key for key in model.state_dict() if key.endswith("running_var")), None)
    if first is None:
        raise ConfigError(f"model.name: {name} has no BatchNorm; set it to the model in {path}")
    prefix = (_find_key(state, first) or first).removesuffix(first)
    tensors = [key for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)]
    keys = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
    try:
        if weights.fit(model, {key: state[keys[key]] for key in keys}, keeps_head=True):
            raise ConfigError("its position tables are of another image size")
    except ConfigError as error:
        advice = "set model.name, its options and data.image_px as in training"
        raise ConfigError(f"{path}: {label} does not fit model.name {name}: {error}; {advice}") from error
    return Entry(label, state, keys, model, num_classes)


def _find_key(state: dict[str, Any], name: str) -> str | None:
    """Return the shortest key that is `name`, alone or after a prefix; None if there is none."""
    found = [key for key in state if isinstance(key, str) and f".{key}".endswith(f".{name}")]
    return min(found, key=len, default=None)


def _nonfinite(tensors: dict[str, Any]) -> list[str]:
    return [name for name, t in tensors.items() if isinstance(t, Tensor) and not t.isfinite().all()]


def _refuse(path: Path, nonfinite: list[str]) -> None:
    if nonfinite:
        why = f"{nonfinite[0]} is not finite, and only BatchNorm statistics can be recomputed"
        raise DataError(f"{path}: {why}")
