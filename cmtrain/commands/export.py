"""Export a trained model; each format is read back and compared before publishing (`cmtrain export`)."""

import importlib.util
import math
import platform
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import Tensor, nn

from cmtrain import __version__
from cmtrain.commands.trained_model import Trained
from cmtrain.config.schema import CMT_OPTIONS, Config, to_yaml
from cmtrain.errors import ConfigError
from cmtrain.models import cmt, fold
from cmtrain.monitoring.console import print_result
from cmtrain.monitoring.report.rendering import make_templates
from cmtrain.step.evaluate import THRESHOLD
from cmtrain.storage import records, run_record
from cmtrain.storage.weights import WEIGHTS_NAME, Weights, fit, num_classes_in
from cmtrain.training import build
from pipelines.atomic import new_folder, sync
from pipelines.spec import DataError, print_lines

TOLERANCE = 1e-5  # of logits, against the largest of them or 1
FOLDED_TOLERANCE = 1e-4
ONNX_NAME, PROGRAM_NAME = "model.onnx", "model.pt2"
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
Logits = Callable[[Tensor], Tensor]  # (B, 3, px, px) fp32, normalised -> (B, num_classes)
ANY_BATCH = ({0: torch.export.Dim("batch")},)
CHECKED_BATCHES = (1, 3)  # images; neither is the size that the exporters trace


def export(
    trained: Trained, *, formats: Sequence[str], out: str, kind: str | None, fold_bn: bool,
    as_json: bool = False,
) -> None:  # fmt: skip
    """Write `trained` to the new folder `out` in each of `formats` (keys of _write), with a model card.

    Every format is read back and must give the model's logits before the folder appears, by one rename.
    Prints what was written on stderr, and one JSON line on stdout. `kind`: `model` or `ema`; None: the EMA
    if there is one. `fold_bn`: absorb BatchNorm where that is exact; not in timm's layout, which has a place
    for each norm. Raises ConfigError: these options do not fit together. DataError: no such weights, they
    are not finite, a package is missing, a format computes something else, or the files cannot be written.
    """
    config, final = trained.config, Path(out)
    is_cmt = config.model.name.startswith("cmt_")
    if fold_bn and (not is_cmt or list(formats) == ["timm"]):
        why = "not for timm's layout, which has a place for every norm" if is_cmt else "for CMT only"
        raise ConfigError(f"--fold-bn: {why}; leave it out, or export onnx or torch-export")
    if "onnx" in formats and (missing := missing_packages()):
        raise DataError(f"--format onnx: needs {', '.join(missing)}; pip install 'cmtrain[export]'")
    weights = trained.weights(kind or trained.kinds[-1])
    model = make_trained_model(config, weights)
    records.remove_leftovers(final.parent, final.name)
    try:
        with new_folder(final) as temporary:
            differences = _write(temporary, model, formats, trained, weights.kind, fold_bn)
            card = temporary / "README.md"
            card.write_text(_card(trained, weights, model, differences, fold_bn))
            for path in temporary.iterdir():  # safetensors writes for its owner alone
                path.chmod(card.stat().st_mode)
                sync(path)
    # torch and safetensors have their own for a full disk.
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(f"--out {out}: cannot be written: {records.reason_of(error)}") from error
    for name, difference in differences.items():
        print_lines(f"{name}: logits differ from the {weights.kind}'s by at most {difference:.1e}")
    print_lines(f"written to {final}")
    files = sorted(path.name for path in final.iterdir())
    result = {"out": str(final), "checkpoint": str(weights.path), "weights": weights.kind, "files": files}
    found = {"rejected": list(trained.checkpoint.rejected), "max_difference": differences}
    print_result(result | found, asked=as_json)


def make_trained_model(config: Config, weights: Weights) -> nn.Module:
    """Return the model of `config` with `weights`, in eval() and fp32 on the CPU; see `fit` for its size."""
    num_classes = num_classes_in(weights, config.model.name)
    # Contiguous, because the layout of a training step means nothing to a user of the files.
    model = build.make_model(config, num_classes).to(memory_format=torch.contiguous_format)
    try:
        fit(model, weights.tensors, keeps_head=True)
    except ConfigError as error:
        raise ConfigError(f"{weights.path} does not fit this model: {error}") from error
    return model.eval().requires_grad_(False)


def _write(
    folder: Path, model: nn.Module, formats: Sequence[str], trained: Trained, kind: str, fold_bn: bool
) -> dict[str, float]:
    """Write each format and compare it with `model`. Returns its largest difference."""
    config, side = trained.config, trained.config.data.image_px
    sample = torch.randn(max(CHECKED_BATCHES), 3, side, side, generator=torch.Generator().manual_seed(0))
    for_inference = fold.folded(model) if fold_bn and isinstance(model, cmt.CMT) else model
    thresholds = trained.thresholds.get(kind, [])
    writers: dict[str, Callable[[], Logits]] = {
        "timm": lambda: to_timm(folder, model, config, trained.class_names, thresholds),
        "onnx": lambda: to_onnx(folder, for_inference, sample[:2]),
        "torch-export": lambda: to_program(folder, for_inference, sample[:2]),
    }
    if "timm" not in formats:  # its config.json is for all formats: it says how images are prepared
        writers["timm"]()
        (folder / WEIGHTS_NAME).unlink()
    differences = {}
    for name in formats:
        tolerance = FOLDED_TOLERANCE if fold_bn and name != "timm" else TOLERANCE
        differences[name] = difference = largest_difference(model, writers[name](), sample)
        if not difference <= tolerance:
            found = f"its logits differ by {difference:.1e}, more than {tolerance:g}"
            raise DataError(f"--format {name}: {found}")
    return differences


@torch.no_grad()
def largest_difference(model: Logits, other: Logits, sample: Tensor) -> float:
    """Compare the logits of both, relative to the largest of them or 1; NaN if there is one."""
    worst = torch.zeros(())
    for images in (sample[:size] for size in CHECKED_BATCHES):
        expected = model(images)
        difference = (other(images) - expected).abs().max() / expected.abs().max().clamp(min=1)
        worst = torch.maximum(worst, difference)
    return worst.item()


def _card(
    trained: Trained, weights: Weights, model: nn.Module, differences: dict[str, float], fold_bn: bool
) -> str:
    """Return the README.md of the export, from the run's own record."""
    evaluations, metrics = run_record.read_run(trained.run).evaluations, dict[str, float]()
    prefix = "eval_ema" if weights.kind == "ema" else "eval"
    for place in np.flatnonzero(evaluations["step"] == trained.step):
        found = {key: evaluations.get(f"{prefix}_{key}") for key in ("map", "top1", "top5", "loss")}
        metrics = {key: float(column[place]) for key, column in found.items() if column is not None}
    return make_templates().get_template("model_card.md").render(
        trained=trained, config=trained.config, config_yaml=to_yaml(trained.config), metrics=metrics,
        weights=weights.kind, differences=differences, fold_bn=fold_bn, num_classes=model.num_classes,
        thresholds=list(zip(trained.class_names, trained.thresholds.get(weights.kind, []), strict=False)),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        exported_by={"cmtrain": __version__, "torch": torch.__version__, "timm": timm.__version__,
                     "python": platform.python_version()},
    )  # fmt: skip


# Each of the next functions writes one format and returns the model as it is read back, for comparison.
# All take a batch of any size at the model's one image size.


def to_timm(
    folder: Path, model: nn.Module, config: Config, class_names: Sequence[str],
    thresholds: Sequence[float] = (),
) -> Logits:  # fmt: skip
    """Write model.safetensors and config.json, for `timm.create_model("local-dir:FOLDER", pretrained=True)`.
    The parameters of `model` must be contiguous. `class_names` that are not one per output are left out.
    `thresholds`: by output, of a model for several labels.
    """
    if not hasattr(model, "pretrained_cfg"):
        what = f"{type(model).__name__} has no pretrained_cfg, which an export needs"
        raise ConfigError(f"{config.model.name}: {what}; build it with timm's build_model_with_cfg")
    data, name, args = config.data, config.model.name, dict[str, Any]()
    described: dict[str, Any] = {"pretrained_cfg": {
        "input_size": [3, data.image_px, data.image_px], "mean": list(data.mean), "std": list(data.std),
        "crop_pct": crop_pct_of(data.image_px, data.eval_resize_px), "crop_mode": "center",
        "interpolation": data.eval_interpolation, "num_classes": model.num_classes,
    }}  # fmt: skip
    if class_names and len(class_names) == model.num_classes:
        described["label_names"] = list(class_names)
    if config.data.multi_label:
        described["multi_label"] = True
        described["thresholds"] = list(thresholds) or [THRESHOLD] * int(model.num_classes)  # type: ignore
    if name.startswith("cmt_"):  # without dropout
        args = config.model.model_dump(include=set(CMT_OPTIONS) - {"attn_drop_rate", "proj_drop_rate"})
    if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        args["img_size"] = data.image_px
    save_for_hf(model, str(folder), model_config=described, model_args=args, safe_serialization=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def to_onnx(folder: Path, model: nn.Module, example: Tensor) -> Logits:
    """Write model.onnx, with input `images` and output `logits`. `example`: (B, 3, px, px), B > 1."""
    with warnings.catch_warnings(action="ignore"):  # of its own internals, differently in every version
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        how = names | {"dynamic_shapes": ANY_BATCH, "external_data": False, "verbose": False}
        torch.onnx.export(model, (example,), folder / ONNX_NAME, dynamo=True, **how)
    return read_onnx(folder / ONNX_NAME, example.shape[-1])


def read_onnx(path: Path, image_px: int) -> Logits:
    """Return the model in `path`, on the CPU. Raises DataError: cannot be loaded, or takes other images."""
    try:
        onnxruntime = importlib.import_module("onnxruntime")  # an extra, not always there
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for every fault
        raise DataError(f"{path}: {error}; ONNX needs pip install 'cmtrain[export]'") from error
    given, wanted = session.get_inputs()[0], [3, image_px, image_px]
    if given.shape[1:] != wanted:
        raise DataError(f"{path}: takes {given.name} of {given.shape[1:]}, and config.json says {wanted}")
    return lambda images: torch.from_numpy(session.run(None, {"images": images.float().cpu().numpy()})[0])


def to_program(folder: Path, model: nn.Module, example: Tensor) -> Logits:
    """Write model.pt2, for torch.export.load without this package. `example`: as for to_onnx."""
    with warnings.catch_warnings(action="ignore"):  # as above
        program = torch.export.export(model, (example,), dynamic_shapes=ANY_BATCH)
        torch.export.save(program, folder / PROGRAM_NAME)
        return torch.export.load(folder / PROGRAM_NAME).module()


def missing_packages() -> list[str]:
    """Return the packages that to_onnx needs and that are not installed."""
    return [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]


def crop_pct_of(image_px: int, resize_px: int) -> float:
    """Return the crop_pct with which timm resizes to `resize_px`: it takes floor(image_px / crop_pct)."""
    crop_pct = image_px / resize_px
    return crop_pct if math.floor(image_px / crop_pct) == resize_px else math.nextafter(crop_pct, 0)
