"""`cmtrain export`: a trained model leaves as files that are whole, and that compute what the model computes."""

import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cmtrain import __version__
from cmtrain.commands import export_formats
from cmtrain.commands.export_formats import Run, crop_pct_of
from cmtrain.commands.trained_model import Trained
from cmtrain.config.schema import CMT_OPTIONS, Config, to_yaml
from cmtrain.errors import ConfigError
from cmtrain.models.cmt import CMT
from cmtrain.models.fold import folded
from cmtrain.monitoring.console import Console
from cmtrain.monitoring.report.templating import make_templates
from cmtrain.storage.atomic import new_folder, sync
from cmtrain.storage.run_record import read_run
from cmtrain.storage.weights import Weights, fit, num_classes_in
from cmtrain.training import build
from pipelines.spec import DataError

FORMATS = ("timm", "onnx", "torch-export")
TOLERANCE = 1e-5  # of logits, against the largest of them or 1
FOLDED_TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 3)  # images; neither is the size that the exporters trace


def export(trained: Trained, *, formats: Sequence[str], out: str, kind: str | None, fold_bn: bool) -> int:
    """Write `trained` to the folder `out` in each of `formats` (of FORMATS), with a model card.

    Every format is read back and must give the model's logits before the folder appears, by one rename. Says on stderr
    what was written, and one JSON line on stdout.

    Args:
        out: a folder that does not exist yet.
        kind: `model` or `ema`; None: the EMA if there is one.
        fold_bn: absorb BatchNorm where that is exact; not in timm's layout, which has a place for every norm.

    Returns:
        The process exit code, 0.

    Raises:
        ConfigError: `out` exists, or these options do not go together.
        DataError: no such weights, they are not finite, a package is missing, a format computes something else, or the
            files cannot be written. Nothing is left behind.
    """
    config, final = trained.config, Path(out)
    is_cmt = config.model.name.startswith("cmt_")
    if os.path.lexists(final):
        raise ConfigError(f"--out {out}: exists already; choose another folder")
    if fold_bn and (not is_cmt or list(formats) == ["timm"]):
        why = "of CMT only" if not is_cmt else "not for timm's layout, which has a place for every norm"
        raise ConfigError(f"--fold-bn: {why}; leave it out, or export onnx or torch-export")
    if "onnx" in formats and (missing := export_formats.missing_packages()):
        raise DataError(f"--format onnx: needs {', '.join(missing)}; pip install 'cmtrain[export]'")
    weights = trained.weights(kind or trained.kinds[-1])
    model = make_trained_model(config, weights)
    temporary = final.absolute().parent / f".{final.name}.{os.getpid()}"
    try:
        with new_folder(final, temporary):
            differences = _write(temporary, model, formats, trained, fold_bn=fold_bn)
            card = _card(trained, weights, model, differences, fold_bn=fold_bn)
            (temporary / "README.md").write_text(card)
            for path in temporary.iterdir():  # safetensors writes for its owner alone
                path.chmod((temporary / "README.md").stat().st_mode)
                sync(path)
    except OSError as error:
        raise DataError(f"--out {out}: {error.strerror or error}") from error
    console = Console(enabled=True)
    for name, difference in differences.items():
        console.line(f"{name}: logits differ from the {weights.kind}'s by at most {difference:.1e}")
    console.line(f"written to {final}")
    files = sorted(path.name for path in final.iterdir())
    result = {"out": str(final), "checkpoint": str(weights.path), "weights": weights.kind, "files": files}
    print(json.dumps(result | {"max_difference": differences}), flush=True)  # noqa: T201
    return 0


def make_trained_model(config: Config, weights: Weights) -> nn.Module:
    """The model of `config` with `weights`, in eval() and fp32 on the CPU; another data.image_px resizes its tables."""
    num_classes = num_classes_in(weights, config.model.name)
    # Contiguous, since the layout of a training step means nothing to whoever loads the files.
    model = build.make_model(config, num_classes).to(memory_format=torch.contiguous_format)
    try:
        fit(model, weights.tensors, keeps_head=True)
    except ConfigError as error:
        raise ConfigError(f"{weights.path} does not fit this model: {error}") from error
    return model.eval().requires_grad_(False)


def _write(
    folder: Path, model: nn.Module, formats: Sequence[str], trained: Trained, *, fold_bn: bool
) -> dict[str, float]:
    """Write each format and compare. Returns its largest difference."""
    config = trained.config
    labels = trained.class_names if len(trained.class_names) == model.num_classes else ()
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(
        max(CHECKED_BATCHES), 3, config.data.image_px, config.data.image_px, generator=generator
    )
    for_inference = folded(model) if fold_bn and isinstance(model, CMT) else model
    writers: dict[str, Callable[[], Run]] = {
        "timm": lambda: export_formats.to_timm(
            folder,
            model,
            model_args=model_args_of(config),
            preprocessing=preprocessing_of(config),
            labels=labels,
        ),
        "onnx": lambda: export_formats.to_onnx(folder, for_inference, sample[:2]),
        "torch-export": lambda: export_formats.to_program(folder, for_inference, sample[:2]),
    }
    differences = {}
    for name in formats:
        tolerance = FOLDED_TOLERANCE if fold_bn and name != "timm" else TOLERANCE
        differences[name] = difference = largest_difference(model, writers[name](), sample)
        if not difference <= tolerance:
            raise DataError(
                f"--format {name}: its logits differ by {difference:.1e}, more than {tolerance:g}"
            )
    return differences


@torch.no_grad()
def largest_difference(model: Run, other: Run, sample: Tensor) -> float:
    """Between the logits of both, relative to the largest of them or 1; NaN if there is one."""
    worst = torch.zeros(())
    for images in (sample[:size] for size in CHECKED_BATCHES):
        expected = model(images)
        worst = torch.maximum(
            worst, (other(images) - expected).abs().max() / expected.abs().max().clamp(min=1)
        )
    return worst.item()


def model_args_of(config: Config) -> dict[str, Any]:
    """What timm.create_model needs beside name and number of classes; dropout is of no use to whoever loads it."""
    drops = {"attn_drop_rate", "proj_drop_rate"}
    options = (
        config.model.model_dump(include=set(CMT_OPTIONS) - drops)
        if config.model.name.startswith("cmt_")
        else {}
    )
    pretrained_cfg = timm.get_pretrained_cfg(config.model.name)
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        options["img_size"] = config.data.image_px
    return options


def preprocessing_of(config: Config) -> dict[str, Any]:
    """As timm's pretrained_cfg says it."""
    data = config.data
    return {
        "input_size": [3, data.image_px, data.image_px],
        "mean": list(data.mean),
        "std": list(data.std),
        "crop_pct": crop_pct_of(data.image_px, data.eval_resize_px),
        "crop_mode": "center",
        "interpolation": data.eval_interpolation,
    }


def _card(
    trained: Trained, weights: Weights, model: nn.Module, differences: dict[str, float], *, fold_bn: bool
) -> str:
    """README.md of the export, from the run's own record."""
    config = trained.config
    evaluations = read_run(trained.run).evaluations
    prefix = "eval_ema" if weights.kind == "ema" else "eval"
    at = {int(step): place for place, step in enumerate(evaluations["step"])}.get(trained.step)
    columns = {key: evaluations.get(f"{prefix}_{key}") for key in ("top1", "top5", "loss")}
    metrics = {
        key: float(column[at]) for key, column in columns.items() if at is not None and column is not None
    }
    versions = trained.checkpoint.meta.get("versions", {})
    exported_by = {"cmtrain": __version__, "torch": torch.__version__, "timm": timm.__version__}
    return (
        make_templates()
        .get_template("model_card.md")
        .render(
            name=config.run.name,
            config=config,
            config_yaml=to_yaml(config),
            weights=weights.kind,
            step=trained.step,
            metrics=metrics,
            num_parameters=sum(p.numel() for p in model.parameters()),
            num_classes=model.num_classes,
            class_names=trained.class_names,
            differences=differences,
            fold_bn=fold_bn,
            trained_with=versions,
            exported_by=exported_by | {"python": platform.python_version()},
        )
    )
