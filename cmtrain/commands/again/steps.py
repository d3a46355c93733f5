"""Take steps of a run again, in one process, from one of its checkpoints or from the beginning.

All that is random is a function of (seed, epoch, sample) or (seed, step), so a step sees the same pixels,
mixed the same, with the same dropout, however many ranks the run had.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from cmtrain.commands.trained_model import config_in
from cmtrain.config.load import Overrides, load_config
from cmtrain.config.schema import Config, flat
from cmtrain.config.strict_yaml import emit
from cmtrain.errors import ConfigError
from cmtrain.step.measure import StepReport
from cmtrain.storage.checkpoint import checkpoint_path, checkpoint_steps, read_manifest
from cmtrain.storage.records import retried
from cmtrain.storage.run_folder import RunLock, read_events
from cmtrain.storage.state_file import CheckpointError
from cmtrain.training import build, loaders
from cmtrain.training.resume import restore
from cmtrain.training.schedule import split_batch
from pipelines.spec import Batch, DataError, os_errors_in_one_line, print_lines

# Keys that are of the machine, and change nothing that a step makes
LOCAL = ("data.root", "data.cache_dir", "data.cache_gb", "data.threads", "data.decode",
         "data.hw_decoder_load", "data.prefetch_batches")  # fmt: skip
STARTS = ("started", "resumed")

Marks = dict[str, str]  # what a step makes, in that order: name -> value, or "#" and a digest of it


class Again:
    """The parts of a run, which takes its steps again. `done`: steps taken, those before it included."""

    @os_errors_in_one_line()
    def __init__(self, run: Path, overrides: Overrides, step: int, *, since: int | None = None) -> None:
        """Open `run` at the last whole checkpoint before `step`, or at that of the step `since` (0: at the
        beginning); with the recipe that it had at `step`. Raises ConfigError: no such step; as training.
        """
        root = run / "checkpoints"
        steps = retried(checkpoint_steps, root)
        later, meta = [saved for saved in steps if saved >= step], dict[str, Any]()
        for saved in [*later[:1], *reversed(steps)]:  # the one after it has its recipe, whatever came later
            with contextlib.suppress(CheckpointError, OSError):
                meta = meta or read_manifest(checkpoint_path(root, saved))[1]
        self.meta, config = meta, _config_at(run, overrides, meta, then=bool(later))
        self.log_every_steps = config.train.log_every_steps
        micro_batch_size, events = meta.get("micro_batch_size"), read_events(run)
        if not micro_batch_size:
            sizes = [event["world_size"] for event in events if str(event.get("world_size")).isdecimal()]
            train = config.train.global_batch_size, config.train.max_batch_per_gpu, int([*sizes, 1][0])
            micro_batch_size = split_batch(*train)[0]
        before = [saved for saved in steps if saved < step][-2:]  # two, should the newest be damaged
        with tempfile.TemporaryDirectory() as folder:  # the run itself may go on, and is left as it is
            for saved in before if since is None else {since} - {0}:
                path = checkpoint_path(root, saved)
                target = Path(folder) / str(config.run.name) / "checkpoints" / path.name
                shutil.copytree(path, target, copy_function=_link)
            self.parts = _parts(config, micro_batch_size, Path(folder))
        self.learner, self.done = self.parts.learner, self.parts.start.step
        if meta and meta["fingerprint"] != self.parts.fingerprint:
            print_lines(f"{self.parts.data.train.root}: other training images than at step {step}")
        if not 1 <= step <= self.parts.schedule.total_steps:
            raise ConfigError(f"--step {step}: the run has {self.parts.schedule.total_steps:,} steps")
        if checkpoint := self.parts.start.checkpoint:
            restore(self.learner, checkpoint)
            self.parts.recovery.load_state_dict(checkpoint.state["recovery"])
        # Of the process that took this step; another may have had more memory.
        begun = max((place for place, e in enumerate(events) if e["event"] in STARTS), default=0)
        lacks = [event for event in events[begun:] if event["event"] == "out_of_memory"]
        tail = [(event["step"], event["images_per_pass"]) for event in lacks]
        self.passes = dict(meta.get("passes", ()) if later else tail)
        self.learner.any_rank = _refuse_smaller_passes
        self.batches = loaders.batches_from(self.done, self.parts.train_loader, self.parts.schedule)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.parts.schedule.lr_at(self.done) * self.parts.recovery.lr_factor(self.done)

    def step(self) -> list[Batch]:
        """Take the next step; return its micro-batches."""
        taken = list(itertools.islice(self.batches, self.parts.schedule.accumulation))
        self.learner.images_per_pass = self.passes.get(self.done + 1, self.learner.images_per_pass)
        self.last_lr = self.lr
        self.learner.step(iter(taken), self.done, self.last_lr)
        self.done += 1
        return taken

    def report(self) -> StepReport:
        """Return what the run logged after the step just taken, but the epoch, if that was a log point."""
        resets = self.done % self.log_every_steps == 0
        return self.learner.report(self.done, 0, self.last_lr, reset=resets)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of model, EMA and optimizer by name; see tensors_in."""
        return tensors_in(self.learner.state_dict())

    def trace(self) -> Marks:
        """Take the next step; return all that it makes, from the learning rate to the new weights."""
        manifest, model, size = (
            self.parts.data.train,
            self.learner.model,
            self.parts.schedule.micro_batch_size,
        )
        marks = {"micro-batch size": str(size), "learning rate": repr(self.lr)}
        forward: Marks = {}
        with contextlib.ExitStack() as hooks:
            note = functools.partial(_note, forward, "mixed images", itertools.count(1))
            hooks.enter_context(model.register_forward_pre_hook(note))
            for name, module in leaves_of(model):
                note = functools.partial(_note, forward, f"output of {name}", itertools.count(1))
                hooks.enter_context(module.register_forward_hook(note))
            taken = self.step()
        for turn, batch in enumerate(taken, 1):
            for place, (index, image) in enumerate(
                zip(batch.indices.tolist(), batch.images, strict=True), 1
            ):
                sample, label = f"sample {place} of pass {turn}", int(manifest.labels[index])
                marks |= {sample: manifest.paths[index], f"label of {sample}": manifest.label_name(label)}
                marks[f"pixels of {sample}, {manifest.paths[index]},"] = digest(image)
        loss, _ = self.learner.buffer.read()[-1]
        gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        marks |= forward | {"loss": repr(loss)}
        marks |= {f"gradient of {name}": digest(gradient) for name, gradient in reversed(gradients)}
        return marks | {f"{name} after the step": digest(tensor) for name, tensor in self.state().items()}

    def close(self) -> None:
        self.parts.train_loader.close()


def tensors_in(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of weights, EMA and optimizer in a state, by names such as `model head.weight`."""
    found = {}
    for part in ("model", "ema", "optimizer"):
        leaves, _ = tree_flatten_with_path(state.get(part, {}))
        for path, leaf in leaves:
            if isinstance(leaf, Tensor):
                name = keystr(path).replace("']['", " ").replace("['", "").replace("']", "")
                found[f"{part} {name}"] = leaf
    return found


def digest(tensor: Tensor) -> str:
    """Return `#` and a digest of all bits of `tensor`, whatever its strides and device."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"#{hashlib.blake2b(content.data, digest_size=12).hexdigest()}"


def leaves_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of `model` that have none of their own, by name."""
    return [(name, module) for name, module in model.named_modules() if not list(module.children())]


def _note(marks: Marks, what: str, turns: Iterator[int], module: nn.Module, *seen: Any) -> None:
    tensors = [leaf for leaf in tree_leaves(seen[-1]) if isinstance(leaf, Tensor)]
    marks[f"{what}, pass {next(turns)},"] = " ".join(map(digest, tensors))


def _refuse_smaller_passes(failed: bool) -> bool:
    if failed:
        raise DataError("out of memory: a step taken again needs as much as the run had")
    return False


def _config_at(run: Path, overrides: Overrides, meta: dict[str, Any], *, then: bool) -> Config:
    """Return the configuration of `run`: in `then`, that in `meta`, but for what is of the machine; else, or
    if it is damaged, that in config.yaml.
    """
    try:
        today = load_config(run / "config.yaml", overrides).config
        if not (then and meta):
            return today
        overrides = [*((key, emit(value)) for key, value in flat(today).items() if key in LOCAL), *overrides]
    except ConfigError:
        if not meta:
            raise
    return config_in(meta, overrides)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _parts(config: Config, micro_batch_size: int, folder: Path) -> build.Parts:
    # Mixing and BatchNorm are by micro-batch, whichever rank had it.
    train = {"compile": False, "compile_mode": "default", "max_batch_per_gpu": micro_batch_size}
    sections: dict[str, Any] = {"train": config.train.model_copy(update=train)}
    sections["metrics"] = config.metrics.model_copy(update={"trackers": ()})
    sections["run"] = config.run.model_copy(update={"dir": str(folder)})
    config = config.model_copy(update=sections)
    with closing(RunLock(folder / str(config.run.name))) as lock:
        return build.assemble(config, lock, "force")
