"""Write a trained model as files for others: timm's hub layout, ONNX, torch.export.

Each function writes into a folder and returns the model as it is read back from there, for comparison. All
take a batch of any size at the model's one image size.
"""

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

ONNX_NAME, PROGRAM_NAME = "model.onnx", "model.pt2"
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
Logits = Callable[[Tensor], Tensor]  # (B, 3, px, px) fp32, normalised -> (B, num_classes)


def to_timm(
    folder: Path,
    model: nn.Module,
    *,
    model_args: dict[str, Any],
    preprocessing: dict[str, Any],
    labels: Sequence[str],
) -> Logits:
    """Write model.safetensors and config.json, for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
        model: a model with contiguous parameters, as safetensors needs them.
        model_args: arguments of timm.create_model beside the name.
        preprocessing: pretrained_cfg's input_size, mean, std, crop_pct and interpolation.
        labels: names of the outputs; empty if they are not known.
    """
    described: dict[str, Any] = {"pretrained_cfg": preprocessing | {"num_classes": model.num_classes}}
    if labels:
        described["label_names"] = list(labels)
    save_for_hf(model, str(folder), model_config=described, model_args=model_args, safe_serialization=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def to_onnx(folder: Path, model: nn.Module, example: Tensor) -> Logits:
    """Write model.onnx, with input `images` and output `logits`. `example`: (B, 3, px, px), B > 1."""
    with _quiet():
        torch.onnx.export(
            model,
            (example,),
            folder / ONNX_NAME,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    onnxruntime = importlib.import_module("onnxruntime")  # an extra, not always there
    session = onnxruntime.InferenceSession(str(folder / ONNX_NAME), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def to_program(folder: Path, model: nn.Module, example: Tensor) -> Logits:
    """Write model.pt2, for torch.export.load without this package. `example`: as for to_onnx."""
    with _quiet():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, folder / PROGRAM_NAME)
        return torch.export.load(folder / PROGRAM_NAME).module()


def missing_packages() -> list[str]:
    """Return the packages that to_onnx needs and that are not installed."""
    return [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]


def crop_pct_of(image_px: int, resize_px: int) -> float:
    """Return the crop_pct with which timm resizes to `resize_px`: it takes floor(image_px / crop_pct)."""
    crop_pct = image_px / resize_px
    return crop_pct if math.floor(image_px / crop_pct) == resize_px else math.nextafter(crop_pct, 0)


@contextmanager
def _quiet() -> Iterator[None]:
    # Both exporters warn about their own internals, differently in every version; the results are compared.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
