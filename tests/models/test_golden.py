"""Test that the model is CMT: it reproduces both public references, with weights made of key names."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.photographs import squares

from cmtrain.models import load_reference_checkpoint, to_reference_state_dict

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "official_cmt_ti_160": {"model_name": "cmt_ti"},
    "official_cmt_s_224": {"model_name": "cmt_s"},
    "blog_cmt_ti_160_rpe_qkvbias": {"model_name": "cmt_ti", "variant": "reimpl"},
    "blog_cmt_ti_160_ape": {
        "model_name": "cmt_ti",
        "variant": "reimpl",
        "attention_bias": "none",
        "absolute_position": True,
    },
    "blog_cmt_ti_160_pe_nd_noqkvbias": {
        "model_name": "cmt_ti",
        "variant": "reimpl",
        "attention_bias": "pairwise",
        "qkv_bias": False,
    },
}
LABELS = torch.tensor([3, 707])


def golden_weight(key: str, shape: list[int], seed: int) -> torch.Tensor:
    """Return a weight made of the reference's key name and the case's seed, for every implementation."""
    x = np.random.default_rng([seed, zlib.crc32(key.encode())]).standard_normal(shape)
    if key.endswith("running_var"):
        x = 1 + 0.1 * np.abs(x)
    elif key.endswith("num_batches_tracked"):
        x = np.zeros(shape, np.int64)
    elif len(shape) == 1:
        x = 1 + 0.1 * x if key.endswith("weight") else 0.1 * x
    elif len(shape) >= 2 and key.endswith("weight"):
        x = x / np.sqrt(np.prod(shape[1:]))
    else:
        x = 0.5 * x
    return torch.as_tensor(x)


def load_case(name: str, dtype: torch.dtype):
    """Return a model with the case's weights, images (2, 3, px, px), numbers, and logits (2, 1000)."""
    torch.set_num_threads(1)
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    px, seed = case["resolution"], case["seed"]
    model = timm.create_model(img_size=px, **CASES[name]).to(dtype)
    load_reference_checkpoint(
        model, {key: golden_weight(key, shape, seed) for key, shape in case["keys"].items()}
    )
    images = torch.as_tensor(np.random.default_rng(seed + 1).standard_normal((2, 3, px, px)), dtype=dtype)
    return model, images, case, torch.as_tensor(np.load(GOLDEN / f"{name}.npz")["logits"])


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_golden_float64(name):
    model, images, case, logits = load_case(name, torch.float64)
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    model.eval()
    with torch.no_grad():
        assert relative_error(model(images), logits) < 1e-9

    model.train()
    loss = F.cross_entropy(model(images), LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(case["train_loss"], rel=1e-9)

    gradients = to_reference_state_dict(model, {key: p.grad for key, p in model.named_parameters()})
    assert gradients.keys() == case["grad_norms"].keys()
    # Some gradients vanish exactly (a key bias under softmax, a bias before BatchNorm): their norms are
    # noise.
    noise = 1e-12 * max(case["grad_norms"].values())
    for key, norm in case["grad_norms"].items():
        assert gradients[key].norm().item() == pytest.approx(norm, rel=1e-8, abs=noise), key

    buffers = to_reference_state_dict(model)
    for key, norm in case["running_norms_after_one_step"].items():
        assert buffers[key].norm().item() == pytest.approx(norm, rel=1e-10), key


@pytest.mark.parametrize("name", CASES)
def test_golden_float32(name):
    model, images, _, logits = load_case(name, torch.float32)
    model.eval()
    with torch.no_grad():
        assert relative_error(model(images).double(), logits) < 1e-4


@pytest.mark.parametrize("name", ["official_cmt_ti_160", "blog_cmt_ti_160_rpe_qkvbias"])
def test_half_precision_on_photographs(name):
    """Logits under autocast are within four roundings of fp16 (2^-11) or bf16 (2^-8) of float64's."""
    model, _, case, _ = load_case(name, torch.float64)
    photos = torch.as_tensor(squares(case["resolution"])[:4]).permute(0, 3, 1, 2) / 255
    photos = (photos - 0.45) / 0.226
    model.eval()
    with torch.no_grad():
        exact = model(photos.double())
        model.float()
        errors = {}
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype):
                logits = model(photos).double()
            errors[dtype] = float((logits - exact).norm() / exact.norm())
    print(f"\n{name}: " + ", ".join(f"{dtype} {error:.1e}" for dtype, error in errors.items()))
    assert errors[torch.float16] < 4 * 2**-11
    assert errors[torch.bfloat16] < 4 * 2**-8
