"""Test the products of tokens and patches against autograd: on a GPU if there is one, else interpreted."""

import pytest
import torch
import torch.nn.functional as F
from helpers.compiled import compiled_for_gpus
from timm.layers import DropPath
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cmtrain.models import ffn_operators, linear_kernels
from cmtrain.models.blocks import Attention, BlockOptions, PatchConv, Stem
from cmtrain.models.cmt import HEADS, REDUCTIONS, SIZES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = {
    (name, stage): (dim, heads, reduction)
    for name, size in SIZES.items()
    for stage, (dim, heads, reduction) in enumerate(zip(size.dims, HEADS, REDUCTIONS, strict=True))
}
FAST = [("cmt_ti", 1), ("cmt_b", 0), ("cmt_micro", 3)]
STAGES = pytest.mark.parametrize(
    ("name", "stage"),
    [pytest.param(*each, marks=[] if each in FAST else [pytest.mark.slow]) for each in WIDTHS],
)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """Enlarge the tiles: the interpreter takes as long for an operation on any tile."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if DEVICE == "cpu":
        for name, size in {"GEMM_COLUMNS": 512, "GEMM_CHANNELS": 512, "GEMM_INNER": 512}.items():
            monkeypatch.setattr(ffn_operators, name, size)


def pictures(channels: int, side: int, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, side, side, channels, device=DEVICE).permute(0, 3, 1, 2)


def errors(
    part: nn.Module, forward, *inputs: torch.Tensor, dtype: torch.dtype = torch.float32
) -> list[float]:
    """Return the errors of result and gradients against float64; one of 0 is compared with the others."""
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.3)
    found = []
    for kernel, precision in (("fused", dtype), ("eager", torch.float64)):
        part = part.to(DEVICE, torch.float32 if kernel == "fused" else torch.float64)
        for module in part.modules():
            module.kernel = kernel
        given = [each.detach().to(precision).requires_grad_() for each in inputs]
        torch.manual_seed(1)  # of the dropped paths
        with torch.autocast(DEVICE, dtype, enabled=precision == torch.float16):
            out = forward(part, *given)
        weights = torch.linspace(-1, 2, out.numel(), device=DEVICE, dtype=precision).view(out.shape)
        found.append([out, *torch.autograd.grad((out * weights).sum(), [*given, *part.parameters()])])
    floor = 1e-2 * max(part.detach().norm() for part in found[1])
    return [
        float((ours.detach().double() - theirs.detach()).norm() / theirs.detach().norm().clamp(min=floor))
        for ours, theirs in zip(*found, strict=True)
    ]


def attend(
    attention: Attention, x: torch.Tensor, residual: torch.Tensor, share: float = 0.5
) -> torch.Tensor:
    return attention(x.permute(0, 2, 3, 1), None, residual.permute(0, 2, 3, 1), DropPath(share))


@STAGES
def test_a_convolution_whose_stride_is_its_kernel_equals_autograd(name, stage):
    dim, _, reduction = WIDTHS[name, stage]
    convs = [PatchConv(dim, 2 * dim, 2), PatchConv(dim, dim, reduction, groups=dim)]
    for conv in convs if reduction > 1 else convs[:1]:
        found = errors(conv, lambda conv, x: conv(x), pictures(dim, 2 * conv.stride[0]))
        assert max(found) < 1e-5, found


@pytest.mark.parametrize(("channels", "out", "height", "width"), [(3, 16, 32, 32), (1, 38, 16, 24)])
def test_the_stems_first_convolution_equals_autograd(monkeypatch, channels, out, height, width):
    """Its patches overlap, and one pixel pads the map above and to the left."""
    monkeypatch.setattr(linear_kernels, "PART_ROWS", 64)  # several parts
    conv = nn.Conv2d(channels, out, 3, stride=2, padding=1).to(DEVICE, memory_format=torch.channels_last)
    x = pictures(channels, max(height, width))[:, :, :height, :width]
    results = []
    for given, forward in (
        (
            x.contiguous(memory_format=torch.channels_last),
            lambda x: linear_kernels.patch_conv(x, conv, conv.bias),
        ),
        (x.double(), lambda x: conv.double()(x)),
    ):
        y = forward(given)
        weights = torch.linspace(-1, 2, y.numel(), device=DEVICE, dtype=y.dtype).view(y.shape)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [conv.weight, conv.bias])])
    for ours, theirs in zip(*results, strict=True):
        assert (ours.detach().double() - theirs.detach()).norm() / theirs.detach().norm() < 1e-5


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_stem_takes_its_kernel_unless_pictures_need_a_gradient(needs_gradient):
    x = pictures(3, 32).detach().requires_grad_(needs_gradient)
    given, results = [x] * needs_gradient, []
    for kernel in ("fused", "eager"):
        torch.manual_seed(2)
        stem = Stem(3, 16, kernel).to(DEVICE)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            y = stem(x)
        loss = (y * torch.linspace(-1, 2, y.numel(), device=DEVICE).view(y.shape)).sum()
        convolutions = sum(event.name == "aten::convolution" for event in profiled.events())
        assert convolutions == (3 if needs_gradient or kernel == "eager" else 2)
        results.append([y, *torch.autograd.grad(loss, [*given, stem.conv1.weight])])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", ["paper", "reimpl"])
@STAGES
def test_attention_with_its_addition_and_dropped_paths_equals_autograd(name, stage, variant):
    dim, heads, reduction = WIDTHS[name, stage]
    attention = Attention(dim, heads, reduction, BlockOptions(variant, True, 0.0, 0.0, "fused"))
    found = errors(attention, attend, pictures(dim, 8), pictures(dim, 8).contiguous())
    assert max(found) < 2e-5, found


def test_in_half_precision_it_is_as_exact_as_its_numbers():
    attention = Attention(46, 1, 2, BlockOptions("paper", True, 0.0, 0.0, "fused"))
    found = errors(attention, attend, pictures(46, 8).half(), pictures(46, 8).half(), dtype=torch.float16)
    assert max(found[:4]) < 4e-3, found
    conv = PatchConv(46, 92, 2)
    found = errors(conv, lambda conv, x: conv(x), pictures(46, 8).half(), dtype=torch.float16)
    assert max(found) < 2**-10, found


@pytest.mark.parametrize("form", ["numbers", "images", "all"])
def test_dropout_and_the_addition_are_those_of_the_formula(form):
    """Drop the same numbers in result and gradients, multiply the rest, and add to it what is added."""
    kept = {"numbers": torch.rand(3, 2, 5, 92, device=DEVICE) < 0.8, "all": None}.get(
        form, torch.tensor([0.0, 1.25, 1.25], device=DEVICE)
    )
    factor = 1.25 if form == "numbers" else 1.0
    x, residual = torch.randn(3, 2, 5, 92, device=DEVICE), torch.randn(3, 2, 5, 92, device=DEVICE)
    padded = F.pad(x.unflatten(-1, (2, 46)), (0, 2)).flatten(-2)
    layer = nn.Linear(92, 92).to(DEVICE)
    given = [padded.requires_grad_(), residual.requires_grad_()]
    ours, _ = linear_kernels.project(
        given[0], layer, in_head=46, residual=given[1], kept=kept, factor=factor
    )
    scale = (
        1.0 if kept is None else factor * kept.double().view(3, *[1] * 3 if form == "images" else (2, 5, 92))
    )
    real = given[0].unflatten(-1, (2, 48))[..., :46].flatten(-2).double()
    exact = given[1].double() + scale * F.linear(real, layer.weight.double(), layer.bias.double())
    weights = torch.randn_like(exact)
    over = [*given, *layer.parameters()]
    pairs = zip(
        [ours, *torch.autograd.grad((ours * weights).sum(), over)],
        [exact, *torch.autograd.grad((exact * weights).sum(), over)],
        strict=True,
    )
    assert all(torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5) for a, b in pairs)


def test_a_model_with_dropout_drops_that_share_and_only_in_training():
    attention = Attention(64, 1, 1, BlockOptions("reimpl", True, 0.0, 0.3, "fused")).to(DEVICE)
    x, zeros = pictures(64, 8), torch.zeros(3, 64, 8, 8, device=DEVICE)
    with torch.no_grad():
        dropped = attend(attention, x, zeros, 0.0)
        assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
        both = attend(attention, x, zeros, 0.5)
        kept = both.flatten(1).abs().sum(1) > 0
        assert (both[kept] == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
        attention.eval()
        whole = attend(attention, x, zeros, 0.0)
    assert (whole == 0).float().mean().item() < 0.01
    assert torch.allclose(dropped[dropped != 0] * 0.7, whole[dropped != 0], rtol=1e-5, atol=1e-6)


def test_the_operators_are_what_torch_wants_of_operators():
    x, weight, bias = torch.randn(15, 46, device=DEVICE), torch.randn(46, 46, device=DEVICE), None
    shape = linear_kernels.layer_shape(48, 46, out_heads=(46, 48))
    torch.library.opcheck(linear_kernels.linear, (x, weight, bias, None, None, 1.0, shape, False))
    dy = torch.randn(15, 48, device=DEVICE)
    torch.library.opcheck(linear_kernels.linear, (dy, weight, bias, x, None, 1.0, shape, True))
    torch.library.opcheck(linear_kernels.weight_grad, (dy, x, None, 1.0, shape, False))


# ---- compiled

# Of a number of the product's left side, in fp16. An H100 issues some 10 while it reads one of its bytes.
CEILINGS = {"linear": 20, "weight_grad": 34}
STEM_CEILING = 60  # of the 16 outputs of a patch: most of it reads its 27 numbers
REGISTERS = {"90": 168, "80": 224}  # of 128 threads: three programs fit a multiprocessor, two of sm_80


@pytest.mark.slow
@pytest.mark.parametrize("sm", ["80", "90"])
def test_compiled_for_a_gpu_the_first_stage_takes_few_instructions_and_no_spill(sm):
    found = compiled_for_gpus(sm, "fp16", (46,), kernels=CEILINGS)
    assert {kernel["kernel"] for kernel in found} == set(CEILINGS)
    forms = {form for each in found for form in each["forms"]}
    assert {"depthwise", "backward", "skip", "pixels", "height"} <= forms
    costs = [(kernel["kernel"], kernel["instructions"], kernel["registers"]) for kernel in found]
    ceilings = [
        STEM_CEILING
        if (kernel["kernel"], kernel["forms"][-1]) == ("linear", "height")
        else CEILINGS[kernel["kernel"]]
        for kernel in found
    ]
    assert all(cost <= most for (_, cost, _), most in zip(costs, ceilings, strict=True)), costs
    assert max(registers for *_, registers in costs) <= REGISTERS[sm], costs
    assert max(kernel["spilled_bytes"] for kernel in found) == 0
