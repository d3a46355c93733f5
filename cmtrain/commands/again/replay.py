"""Take one step of a run again, and show what the model saw and did (`cmtrain replay`)."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cmtrain.commands.again.steps import Again, leaves_of
from cmtrain.config.load import Overrides
from cmtrain.monitoring.console import print_result
from cmtrain.storage.records import finite
from cmtrain.storage.run_folder import find_run, read_events, read_status
from cmtrain.training import loaders
from cmtrain.training.build import Parts
from pipelines.plan import augment_params
from pipelines.preview import contact_sheet
from pipelines.progress import tracked
from pipelines.rand_augment import Branch
from pipelines.spec import Batch, DataError, print_lines

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


@dataclass(frozen=True)
class Replayed:
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
    bad, good = (
        [each for each in found.layers if bool(each.nonfinite) == is_bad] for is_bad in (True, False)
    )
    for layer in [*bad[:SHOWN], *sorted(good, key=lambda layer: -layer.largest)[:SHOWN]]:
        norm = "" if layer.grad_norm is None else f"{layer.grad_norm:.3g}"
        share = f"{100 * layer.largest / FP16_MAX:.2g}"
        table.add_row(layer.layer, layer.kind, f"{layer.largest:.3g}", share, f"{layer.nonfinite:,}", norm)
    return table
