"""Take steps of a run again, in one process, and show what one of them did (`cmtrain replay`).

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from cmtrain.commands.trained_model import config_in
from cmtrain.config.load import Overrides, load_config
from cmtrain.config.schema import Config, flat
from cmtrain.config.strict_yaml import emit
from cmtrain.errors import ConfigError
from cmtrain.monitoring.console import print_result
from cmtrain.step.measure import StepReport
from cmtrain.storage.checkpoint import checkpoint_path, checkpoint_steps, read_manifest
from cmtrain.storage.records import finite, retried
from cmtrain.storage.run_folder import RunLock, find_run, read_events, read_status
from cmtrain.storage.state_file import CheckpointError
from cmtrain.training import build, loaders
from cmtrain.training.build import Parts
from cmtrain.training.resume import restore
from cmtrain.training.schedule import split_batch
from pipelines.plan import augment_params
from pipelines.preview import contact_sheet
from pipelines.progress import tracked
from pipelines.rand_augment import Branch
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
        manifest, model = self.parts.data.train, self.learner.model
        size = self.parts.schedule.micro_batch_size
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
            pairs = zip(batch.indices.tolist(), batch.images, strict=True)
            for place, (index, image) in enumerate(pairs, 1):
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


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in tensors.items()}


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


FP16_MAX = torch.finfo(torch.float16).max
SHOWN = 12  # layers in the table, after those that are not finite


@dataclass
class Layer:
    """What a layer gave in the step: the largest finite value, and how many values are not finite."""

    layer: str
    kind: str
    largest: float = 0.0
    nonfinite: int = 0
    grad_norm: float | None = None  # of its own parameters, clipped as in the step; None: it has none


class Replayed(NamedTuple):
    """The step: images (B, 3, H, W) of each micro-batch as the model saw them, and what came of them."""

    images: list[Tensor]
    samples: list[dict[str, Any]]  # in the order of the images: file, label, crop, operations
    loss: float
    grad_norm: float
    layers: list[Layer]


def replay(place: str, overrides: Overrides, *, step: int, out: str | None, as_json: bool = False) -> None:
    """Take step number `step` of the run at `place` again; print its layers, and write its images to `out`.
    `step` counts from 1, as log points do. Raises ConfigError: no such step. DataError: as training, or
    `out` cannot be written.
    """
    run = find_run(place, trained=False)[0]
    again = Again(run, overrides, step)
    parts, before = again.parts, again.done
    print_lines(*parts.notes, f"{run}: from {f'step {before}' if before else 'the beginning'} to {step}")
    back = [event["step"] for event in read_events(run) if event["event"] == "rollback"]
    print_lines(*(f"the run went back to an older state at step {at}; this does not" for at in back
                  if before < at < step))  # fmt: skip
    if (read_status(run) or {}).get("step", step) < step:
        print_lines(f"the run has not taken step {step}; this is what it would be")
    found = _replayed(again, step)
    again.close()
    path = Path(out or run / f"replay-{step}.png")
    captions = [[Path(s["file"]).name, s["label"], s["crop"], s["operations"]] for s in found.samples]
    try:
        data = parts.config.data
        contact_sheet(torch.cat(found.images), data.mean, data.std, path, captions=captions)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    Console(stderr=True).print(_table(found))
    print_lines(f"step {step}: loss {found.loss:.6g}, gradient norm {found.grad_norm:.4g}", path)
    numbers = {"step": step, "from_step": before}
    numbers |= {"loss": finite(found.loss), "grad_norm": finite(found.grad_norm)}
    layers = [{key: finite(value) for key, value in asdict(layer).items()} for layer in found.layers]
    print_result(numbers | {"images": str(path), "samples": found.samples, "layers": layers}, asked=as_json)


def _replayed(again: Again, step: int) -> Replayed:
    learner, before = again.learner, again.done
    for _ in tracked(range(before, step - 1), "taking the steps before", step - 1 - before):
        again.step()
    images: list[Tensor] = []
    layers: dict[str, Layer] = {}
    with contextlib.ExitStack() as hooks:
        see = learner.model.register_forward_pre_hook(lambda _, given: images.append(given[0].clone()))
        hooks.enter_context(see)
        for name, module in leaves_of(learner.model):
            layers[name] = Layer(name, type(module).__name__)
            hooks.enter_context(module.register_forward_hook(functools.partial(_look, layers[name])))
        taken = again.step()
    for name, layer in layers.items():
        own = learner.model.get_submodule(name).parameters(recurse=False)
        gradients = [parameter.grad for parameter in own if parameter.grad is not None]
        layer.grad_norm = float(nn.utils.get_total_norm(gradients)) if gradients else None
    loss, grad_norm = learner.buffer.read()[-1]
    return Replayed(images, list(_samples(again.parts, step, taken)), loss, grad_norm, list(layers.values()))


def _look(layer: Layer, module: nn.Module, inputs: Any, output: Any) -> None:
    for part in (leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
        good = torch.isfinite(part)
        layer.nonfinite += int((~good).sum())
        if good.any():
            layer.largest = max(layer.largest, float(part[good].abs().max()))


def _samples(parts: Parts, step: int, taken: list[Batch]) -> Iterator[dict[str, Any]]:
    """Yield file, label, crop (height x width + left + top) and operations of each sample of the step."""
    manifest, schedule, config = parts.data.train, parts.schedule, parts.config
    plan = loaders.make_plan(config, manifest, schedule)
    spec = loaders.augment_spec(config, parts.accelerator)
    epoch, steps_into_epoch = divmod(step - 1, schedule.steps_per_epoch)
    planned = plan.micro_batches(epoch, steps_into_epoch * schedule.global_batch_size, 0, 1)
    for batch, micro in zip(taken, planned, strict=False):
        given = batch.indices.cpu().numpy()  # stand-ins of bad files included
        sizes = manifest.heights[given], manifest.widths[given]
        params = augment_params(plan, micro._replace(indices=given), *sizes, spec)
        for place, index in enumerate(given.tolist()):
            top, left, height, width = params.windows[place].tolist()
            branches = params.layers.branches[place].tolist() if params.layers else []
            names = [Branch(branch).name.lower() for branch in branches if branch]
            yield {
                "file": manifest.file(index), "label": manifest.label_name(int(manifest.labels[index])),
                "crop": f"{height}x{width}+{left}+{top}",
                "operations": " ".join([*["mirrored"] * int(params.flips[place]), *names]),
            }  # fmt: skip


def _table(found: Replayed) -> Table:
    table = Table("layer", "kind", "largest", "% of fp16", "not finite", "gradient", box=None)
    table.columns[0].overflow = "fold"
    bad, good = ([x for x in found.layers if bool(x.nonfinite) == is_bad] for is_bad in (True, False))
    for layer in [*bad[:SHOWN], *sorted(good, key=lambda layer: -layer.largest)[:SHOWN]]:
        norm = "" if layer.grad_norm is None else f"{layer.grad_norm:.3g}"
        share = f"{100 * layer.largest / FP16_MAX:.2g}"
        table.add_row(layer.layer, layer.kind, f"{layer.largest:.3g}", share, f"{layer.nonfinite:,}", norm)
    return table
