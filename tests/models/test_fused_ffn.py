"""Test that the Triton kernels compute what blocks.py does: on a GPU if there is one, else interpreted."""

import ast
import copy
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from helpers.compiled import compiled_for_gpus, predicted_kernels
from timm.layers import DropPath
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cmtrain.models import blocks, ffn_check, ffn_operators, fused_ffn, linear_kernels, norm_kernels
from cmtrain.models.blocks import FeedForward, FusedPart, ResidualDepthwiseConv
from cmtrain.models.cmt import SIZES
from cmtrain.models.ffn_check import TOLERANCES, use_fused_where_it_agrees, worst_error
from cmtrain.processes.collectives import set_cuda_math
from cmtrain.step.guard import Guard, running_statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STAGES = {
    (name, stage): (dim, int(dim * SIZES[name].ffn_ratio))
    for name in SIZES
    for stage, dim in enumerate(SIZES[name].dims)
}


# By default odd widths, wide ones, powers of two and a multiple of 4 alone. On a GPU each compiles kernels
# of its own, half a second each.
FAST = [("cmt_ti", 0), ("cmt_ti", 3), ("cmt_s", 0), ("cmt_b", 0)]


def others_slow(fast: list, cases: Iterable) -> list:
    """Return `cases`, all but the `fast` ones marked slow."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else [case]), marks=[] if case in fast else [pytest.mark.slow]
        )
        for case in cases
    ]


@pytest.fixture(autouse=True)
def exact_fp32():
    """Let torch compute what is compared in fp32 exactly: by default its convolutions on a GPU do not."""
    set_cuda_math("fp32")
    yield
    set_cuda_math("fp32")


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """Enlarge the tiles: the interpreter takes as long for an operation on any tile."""
    torch.set_num_threads(1)
    if DEVICE == "cpu":
        sizes = {"ROWS": 16, "GRAD_ROWS": 16, "MAP_COLUMNS": 1024, "MIN_PROGRAMS": 1}
        sizes |= {"GEMM_COLUMNS": 512, "GEMM_CHANNELS": 512, "GEMM_INNER": 512}
        for name, size in sizes.items():
            monkeypatch.setattr(ffn_operators, name, size)


def networks(channels: int, hidden: int, *, variant: str = "paper") -> tuple[FeedForward, FeedForward]:
    """Build (fused in float32, eager in float64), equal; no parameter has a value that hides a mistake."""
    torch.manual_seed(0)
    fused = FeedForward(channels, hidden, variant=variant, drop=0.0, kernel="fused")
    eager = FeedForward(channels, hidden, variant=variant, drop=0.0, kernel="eager")
    with torch.no_grad():
        for key, parameter in fused.named_parameters():
            nn.init.normal_(parameter, std=0.3)
            if key.endswith("norm.weight"):
                parameter += 1
        for norm in (fused.expand_norm, fused.depthwise_norm, fused.project_norm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    eager.load_state_dict(fused.state_dict())
    for network in (fused, eager):
        network.project_norm.eval()  # batch statistics would pass no gradient on to the shifts before it
    return fused.to(DEVICE), eager.to(DEVICE, torch.float64)


def perception_units(channels: int) -> tuple[ResidualDepthwiseConv, ResidualDepthwiseConv]:
    """Build (fused in float32, eager in float64), equal."""
    torch.manual_seed(0)
    fused, eager = ResidualDepthwiseConv(channels, "fused"), ResidualDepthwiseConv(channels, "eager")
    eager.load_state_dict(fused.state_dict())
    return fused.to(DEVICE), eager.to(DEVICE, torch.float64)


VARIANTS = pytest.mark.parametrize("variant", ["paper", "reimpl"])


def pictures(channels: int, height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, device=DEVICE).to(memory_format=torch.channels_last)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(
        (ours.detach().double() - theirs.detach().double()).norm() / theirs.detach().double().norm()
    )


def compare(fused: nn.Module, eager: nn.Module, x: torch.Tensor, forward=None) -> dict[str, float]:
    """Return relative errors of output, gradients and running statistics after one training step."""
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    ours_out, theirs_out = fused(ours) if forward is None else forward(ours), eager(theirs)
    dy = torch.randn_like(theirs_out)
    ours_out.backward(dy.to(ours_out.dtype))
    theirs_out.backward(dy)
    assert ours_out.is_contiguous(memory_format=torch.channels_last)
    errors = {"output": error(ours_out, theirs_out), "input": error(ours.grad, theirs.grad)}
    for (key, parameter), other in zip(fused.named_parameters(), eager.parameters(), strict=True):
        errors[key] = error(parameter.grad, other.grad)
    for (key, buffer), other in zip(fused.named_buffers(), eager.buffers(), strict=True):
        if not key.startswith("project_norm"):
            errors[key] = error(buffer, other)
    assert all(map(math.isfinite, errors.values())), errors
    return errors


@VARIANTS
@pytest.mark.parametrize(("name", "stage"), others_slow(FAST, STAGES))
def test_forward_and_backward_equal_autograd(name, stage, variant):
    """Compare all stage widths, on small maps for the interpreter: 18 positions, no multiple of a tile."""
    fused, eager = networks(*STAGES[name, stage], variant=variant)
    errors = compare(fused, eager, pictures(STAGES[name, stage][0], 3, 3))
    assert max(errors.values()) < 1e-5, errors


@VARIANTS
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize(("name", "stage"), others_slow([("cmt_ti", 0)], STAGES))
def test_the_last_norm_the_dropped_paths_and_the_addition_equal_autograd(name, stage, share, variant):
    """A gradient that BatchNorm cancels is compared with the others."""
    channels, hidden = STAGES[name, stage]
    fused, eager = networks(channels, hidden, variant=variant)
    fused.train(), eager.train()
    x, residual = pictures(channels, 3, 3, 3), pictures(channels, 3, 3, 3).contiguous()
    found = []
    for network, dtype in ((fused, torch.float32), (eager, torch.float64)):
        torch.manual_seed(3)  # of the dropped paths
        inputs = [part.detach().to(dtype).requires_grad_() for part in (x, residual)]
        out = network(*inputs, DropPath(share))
        weights = torch.linspace(-1, 2, out.numel(), dtype=dtype, device=DEVICE).view(out.shape)
        gradients = torch.autograd.grad((out * weights).sum(), [*inputs, *network.parameters()])
        found.append([part.detach() for part in (out, *gradients, *network.buffers())])
    largest = max(part.double().norm() for part in found[1])
    errors = [
        float((ours.double() - theirs).norm() / theirs.double().norm().clamp(min=1e-2 * largest))
        for ours, theirs in zip(*found, strict=True)
    ]
    assert max(errors) < 1e-5, errors


@pytest.mark.parametrize(
    "channels",
    others_slow([STAGES[size][0] for size in FAST], sorted({channels for channels, _ in STAGES.values()})),
)
def test_the_perception_unit_equals_autograd(channels):
    errors = compare(*perception_units(channels), pictures(channels, 3, 3))
    assert max(errors.values()) < 1e-6, errors


@VARIANTS
@pytest.mark.parametrize(("height", "width", "batch"), [(1, 1, 2), (2, 3, 1), (1, 9, 3), (16, 4, 3)])
def test_maps_of_any_shape(monkeypatch, height, width, batch, variant):
    """Use the tiles of a GPU, several of them per program."""
    monkeypatch.undo()
    monkeypatch.setattr(ffn_operators, "MIN_PROGRAMS", 1)
    fused, eager = networks(6, 37, variant=variant)
    errors = compare(fused, eager, pictures(6, height, width, batch))
    if (height, width) == (1, 1):  # two values have no spread that rounding leaves alone
        errors = {"output": errors["output"]}
    errors |= compare(*perception_units(37), pictures(37, height, width, batch))
    assert max(errors.values()) < 2e-5, errors


NEEDS_GPU = pytest.mark.skipif(
    DEVICE == "cpu", reason="needs a CUDA device: Triton's interpreter multiplies the bits of bfloat16"
)


@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)])
def test_in_half_precision_it_is_no_worse_than_operation_by_operation(dtype, variant):
    fused, eager = networks(46, 165, variant=variant)
    other, _ = networks(46, 165, variant=variant)
    other.kernel = "eager"
    x = pictures(46, 8, 8).to(dtype)
    with torch.autocast(DEVICE, dtype):
        ours, theirs = compare(fused, copy.deepcopy(eager), x), compare(other, eager, x)
    print({key: f"{ours[key]:.1e} {theirs[key]:.1e}" for key in ours})
    assert all(ours[key] < 2 * theirs[key] for key in ours if theirs[key])


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)])
def test_in_half_precision_the_perception_unit_is_no_worse(dtype):
    fused, eager = perception_units(46)
    other = copy.deepcopy(fused)
    other.kernel = "eager"
    x = pictures(46, 8, 8).to(dtype)
    with torch.autocast(DEVICE, dtype):
        ours, theirs = compare(fused, eager, x), compare(other, copy.deepcopy(eager), x)
    print({key: f"{ours[key]:.1e} {theirs[key]:.1e}" for key in ours})
    assert all(ours[key] < 1.2 * theirs[key] for key in ours)


@VARIANTS
def test_evaluation_uses_the_running_statistics(variant):
    fused, eager = networks(46, 165, variant=variant)
    x = pictures(46, 5, 4)
    fused.eval(), eager.eval()
    before = copy.deepcopy(fused.state_dict())
    with torch.no_grad():
        assert error(fused(x), eager(x.double())) < 1e-6
        fused.depthwise_norm = eager.depthwise_norm = nn.Identity()  # what folding leaves
        assert error(fused(x), eager(x.double())) < 1e-6
    assert all(torch.equal(tensor, before[key]) for key, tensor in fused.state_dict().items())
    x.requires_grad_()  # there is no backward of evaluation
    fused(x).sum().backward()
    assert x.grad is not None


class Padding(TorchDispatchMode):
    """Records the largest number that a kernel of ours wrote into the padding of a hidden tensor."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden, self.largest, self.num_tensors = hidden, 0.0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "cmtrain" and "normalise" not in func._opname:
            for tensor in out if isinstance(out, tuple) else (out,):
                if tensor.numel() and tensor.shape[-1] == ffn_operators.padded(self.hidden):
                    self.num_tensors += 1
                    self.largest = max(self.largest, tensor[..., self.hidden :].abs().max().item())
        return out


@VARIANTS
def test_padding_is_zero_forward_and_backward_and_parameters_have_none(variant):
    fused, eager = networks(46, 165, variant=variant)
    with Padding(165) as padding:
        fused(pictures(46, 4, 4).requires_grad_()).square().sum().backward()
    assert padding.num_tensors >= 8
    assert padding.largest == 0
    assert all(parameter.grad.shape == parameter.shape for parameter in fused.parameters())
    assert fused.state_dict().keys() == eager.state_dict().keys()


class Products(TorchDispatchMode):
    """Records (M, K, N) of every matrix product of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.sizes.append((*args[0].shape, args[1].shape[1]))
        return func(*args, **(kwargs or {}))


@VARIANTS
def test_no_product_is_left_to_cublas(variant):
    """Rows of 46 or 165 numbers are no multiples of the 16 bytes that its fast kernels want."""
    fused, _ = networks(46, 165, variant=variant)
    with Products() as products:
        fused(pictures(46, 4, 4).requires_grad_()).square().sum().backward()
    assert products.sizes == []


# ---- inside a model


def models(**options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    build = {"num_classes": 5, "drop_path_rate": 0.1, **options}
    fused = timm.create_model("cmt_micro", ffn_kernel="fused", **build).to(DEVICE)
    eager = timm.create_model("cmt_micro", ffn_kernel="eager", **build).to(DEVICE)
    eager.load_state_dict(fused.state_dict())
    return fused, eager


def train_once(model: nn.Module, forward=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return logits, and all gradients and buffers after the step."""
    torch.manual_seed(1)
    forward = model if forward is None else forward
    images = torch.randn(3, 3, 32, 32, device=DEVICE)  # a deviation of two is ill-conditioned
    logits = forward(images.to(next(model.parameters()).dtype))
    logits.square().sum().backward()
    return logits, {key: p.grad for key, p in model.named_parameters()} | dict(model.named_buffers())


@VARIANTS
def test_a_model_trains_the_same_with_either_kernel(variant):
    """Be as near to float64 as operation by operation: BatchNorm of a 1x1 map enlarges rounding errors."""
    fused, eager = models(variant=variant)
    (exact_logits, exact), *ours_and_theirs = map(train_once, (copy.deepcopy(eager).double(), fused, eager))
    moved = [key for key in exact if exact[key].double().norm() > 1e-6]  # BatchNorm cancels the rest
    ours, theirs = (
        {"logits": error(logits, exact_logits)} | {key: error(left[key], exact[key]) for key in moved}
        for logits, left in ours_and_theirs
    )
    assert max(ours.values()) < 0.02
    # By luck of rounding, which differs between CPUs, one tensor of theirs may be nearer than all others.
    usual = statistics.median(theirs.values())
    far = {key: (ours[key], theirs[key]) for key in ours if ours[key] >= 5 * max(theirs[key], usual)}
    assert far == {}


@VARIANTS
def test_blocks_that_are_computed_twice_change_no_number(variant):
    model, _ = models(variant=variant)
    twice = copy.deepcopy(model)
    twice.set_grad_checkpointing()
    (logits, left), (logits_twice, left_twice) = map(train_once, (model, twice))
    assert torch.equal(logits, logits_twice)
    assert [key for key in left if not torch.equal(left[key], left_twice[key])] == []


@VARIANTS
def test_compiled_it_is_one_graph_and_the_same(variant):
    fused, eager = networks(6, 37, variant=variant)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    errors = compare(fused, eager, pictures(6, 4, 4), compiled)
    assert max(errors.values()) < 1e-5, errors


def test_hooks_see_every_layer():
    fused, _ = networks(6, 37)
    seen = []
    for name, layer in fused.named_children():
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    fused(pictures(6, 4, 4))
    assert set(seen) == {name for name, _ in fused.named_children()}


def test_the_guard_takes_back_what_an_overflow_wrote():
    fused, _ = models()
    guard = Guard(fused)
    committed = [statistic.clone() for statistic in running_statistics(fused)]
    with torch.no_grad():
        fused.stages[0].blocks[0].ffn.expand.bias[3] = torch.inf
    with np.errstate(all="ignore"), guard.uncounted():  # errors are the interpreter's
        fused(torch.randn(2, 3, 32, 32, device=DEVICE))
    written = fused.stages[0].blocks[0].ffn.expand_norm.running_var
    assert not written.isfinite().all()
    guard.propose()
    guard.commit_or_restore(torch.tensor(True, device=DEVICE))
    assert all(
        torch.equal(now, then) for now, then in zip(running_statistics(fused), committed, strict=True)
    )
    assert fused.stages[0].blocks[0].ffn.expand_norm.num_batches_tracked == 0


@pytest.mark.skipif(DEVICE != "cpu", reason="of one process, with gloo")
def test_gradients_fit_their_ddp_buckets():
    """DDP warns, and so fails here, if a gradient's layout is not its bucket's."""
    fused, _ = models(drop_path_rate=0.0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(fused, gradient_as_bucket_view=True)
        for _ in range(2):
            train_once(fused, wrapped)
    finally:
        dist.destroy_process_group()


def test_options_without_a_kernel_are_refused_on_request_and_eager_otherwise():
    with pytest.raises(
        ValueError, match="ffn_kernel='fused' needs Triton and, in variant='paper', proj_drop_rate=0"
    ):
        timm.create_model("cmt_micro", ffn_kernel="fused", proj_drop_rate=0.1)
    timm.create_model("cmt_micro", proj_drop_rate=0.1)
    timm.create_model(
        "cmt_micro", ffn_kernel="fused", variant="reimpl", proj_drop_rate=0.1
    )  # none in its FFN
    with pytest.raises(ValueError, match="ffn_kernel='triton' is not one of 'auto', 'fused', 'eager'"):
        timm.create_model("cmt_micro", ffn_kernel="triton")


class LooksLikeCuda(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return True if func == torch.Tensor.is_cuda.__get__ else func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("capability", "training", "grad", "dtype", "fused"),
    [
        ((9, 0), True, True, torch.float32, True),
        ((8, 0), False, False, torch.float16, True),
        ((8, 0), False, True, torch.float16, False),  # there is no backward of evaluation
        ((7, 0), True, True, torch.float16, False),  # Triton no longer compiles for V100
        ((9, 0), True, True, torch.float64, False),
    ],
)
def test_auto_is_fused_where_it_can_be(monkeypatch, capability, training, grad, dtype, fused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    ffn = FeedForward(6, 37, variant="paper", drop=0.0).train(training)
    with LooksLikeCuda(), torch.set_grad_enabled(grad):
        assert blocks._has_kernel(ffn, torch.zeros(1, dtype=dtype)) == fused
        ffn.depthwise_norm.eval()  # a frozen norm
        assert blocks._has_kernel(ffn, torch.zeros(1, dtype=dtype)) == (fused and not grad)
    assert not blocks._has_kernel(ffn, torch.zeros(1, dtype=dtype))


# ---- compiled

MAX_SPILL = 96  # bytes: 24 registers, of 128, once a tile
MAX_SPILL_FP32 = 320  # whose exact products take no matrix units
# The paper's form, then the re-implementation's, the perception unit's, and those of evaluation.
KERNELS = {"expand", "depthwise", "project", "project_grad", "depthwise_grad", "expand_grad", "weight_grad"}
# Per hidden number. An H100 issues some 10 in the time in which it moves a byte of device memory.
INSTRUCTIONS = {
    "expand": 46, "depthwise": 86, "project": 32, "weight_grad": 34, "depthwise_grad": 86, "expand_grad": 66,
}  # fmt: skip
# sm_80 has no products of a whole tile from shared memory: two warps make the left side of each row.
INSTRUCTIONS_SM80 = INSTRUCTIONS | {"project": 50, "weight_grad": 52, "expand_grad": 96}


@pytest.mark.parametrize("sm", [pytest.param("80", marks=pytest.mark.slow), "90"])
def test_compiled_for_a_gpu_without_spills_that_matter_and_without_scalar_access(sm):
    """Compile for CMT-Ti's first stage, whose 165 hidden channels fit no vector load."""
    found = compiled_for_gpus(sm, "fp16", (46, 165, 40))
    if sm == "90":  # as in the table of cost.py
        plain = {"depthwise plain", "depthwise_grad plain"}
        assert predicted_kernels(found, 46) == KERNELS | plain
    found = [kernel for kernel in found if kernel["kernel"] in KERNELS]
    assert {kernel["kernel"] for kernel in found} == KERNELS
    assert max(kernel["spilled_bytes"] for kernel in found) <= MAX_SPILL
    assert all(kernel["scalars"] == 0 for kernel in found)
    costs = [
        (kernel["kernel"], kernel["instructions"]) for kernel in found if kernel["kernel"] in INSTRUCTIONS
    ]
    ceilings = INSTRUCTIONS if sm == "90" else INSTRUCTIONS_SM80
    assert all(cost <= ceilings[name] for name, cost in costs), costs
    # The plain form reads 46 channels 4 bytes at a time, and project makes asynchronous copies.
    found = [kernel for kernel in found if "plain" not in kernel["forms"]]
    wide = {"expand", "depthwise", "project_grad", "depthwise_grad", "expand_grad"}
    assert all(kernel["vectors"] for kernel in found if kernel["kernel"] in wide)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", ["cmt_ti", "cmt_xs", "cmt_s", "cmt_b"])
def test_every_stage_compiles_without_spills_that_matter(name, dtype):
    size = SIZES[name]
    found = compiled_for_gpus(
        "80,90", dtype, *((*STAGES[name, i], size.image_px // 4 >> i) for i in range(4))
    )
    assert {kernel["kernel"] for kernel in found} >= KERNELS
    most = MAX_SPILL_FP32 if dtype == "fp32" else MAX_SPILL
    assert max(kernel["spilled_bytes"] for kernel in found) <= most


# ---- the check before training


@VARIANTS
def test_the_check_accepts_correct_kernels(variant):
    device = torch.device(DEVICE)
    assert worst_error(device, torch.float32, "fused", variant=variant) < 1e-4
    halves = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
    for dtype in halves if variant == "paper" else []:
        assert worst_error(device, dtype, "fused", variant=variant) < TOLERANCES[dtype] / 2


def test_the_check_looks_at_every_kind_of_part(monkeypatch):
    seen = []
    monkeypatch.setattr(ffn_check, "_error", lambda part, *_: seen.append(part) or 0.0)
    worst_error(torch.device(DEVICE), torch.float32)
    assert {type(part) for part in seen} == set(FusedPart.__args__)
    last_norms = {part.project_norm.training for part in seen if isinstance(part, FeedForward)}
    assert last_norms == {True, False}


WRONG = {
    "y": (fused_ffn.ops, "project", FeedForward),
    "gradient": (fused_ffn.ops, "expand_grad", FeedForward),
    "statistic": (fused_ffn.ops, "normalise", FeedForward),
    "last norm": (fused_ffn, "batch_norm", FeedForward),
    "perception unit": (fused_ffn, "residual_depthwise", ResidualDepthwiseConv),
    "norm": (norm_kernels, "norm", blocks.ChannelNorm),
    "gradient of norm": (norm_kernels, "norm_grad", blocks.ChannelNorm),
    "stem": (norm_kernels, "batch_norm", blocks.Stem),
    "patches": (linear_kernels, "linear", blocks.PatchConv),
    "gradient of weight": (linear_kernels, "weight_grad", blocks.PatchConv),
    "projection": (linear_kernels, "linear", blocks.Attention),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_finds_a_wrong_kernel(wrong, monkeypatch):
    """Make one result of a kernel wrong by 3 %."""
    module, name, kind = WRONG[wrong]
    right = getattr(module, name)

    def wrong_result(*arguments, **options):
        result = right(*arguments, **options)
        return tuple(1.03 * r for r in result) if isinstance(result, tuple | list) else 1.03 * result

    monkeypatch.setattr(module, name, wrong_result)
    parts = [part for part in ffn_check._parts("paper") if isinstance(part, kind)]
    monkeypatch.setattr(ffn_check, "_parts", lambda variant: parts[-1:])
    if wrong == "last norm":
        monkeypatch.setattr(ffn_check, "_parts", lambda variant: parts[:1])
    assert worst_error(torch.device(DEVICE), torch.float32, "fused") > TOLERANCES[torch.float32]


@pytest.mark.parametrize(
    ("capability", "last"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_the_check_is_in_bf16_where_the_device_has_it(capability, last, monkeypatch):
    checked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(
        "cmtrain.models.ffn_check.worst_error", lambda _, dtype, **__: checked.append(dtype) or 0.0
    )
    model = timm.create_model("cmt_micro")
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    use_fused_where_it_agrees(model)
    assert checked == [torch.float32, torch.float16, torch.bfloat16][: 2 + (last == torch.bfloat16)]


@pytest.mark.parametrize(("matmul", "conv"), [("tf32", "ieee"), ("ieee", "tf32")])
def test_the_check_runs_whatever_torch_allows_fp32_to_be(matmul, conv, monkeypatch):
    """The older interface to these settings raises where only the newer one was used."""
    torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = matmul, conv
    monkeypatch.setattr(ffn_check, "_parts", lambda variant, parts=ffn_check._parts: parts(variant)[-1:])
    # A product in TF32 is exact in the interpreter.
    tolerance = 1e-4 if DEVICE == "cpu" else TOLERANCES[torch.float32]
    assert worst_error(torch.device(DEVICE), torch.float32, "fused") < tolerance


def test_no_test_here_puts_a_tensor_on_the_cpu_by_name():
    """With a GPU, Triton compiles for it and cannot read such a tensor: use DEVICE."""
    calls = [node for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Call)]
    given = [value for call in calls for value in [*call.args, *(word.value for word in call.keywords)]]
    assert [
        value.lineno for value in given if isinstance(value, ast.Constant) and value.value == "cpu"
    ] == []


@pytest.mark.parametrize("trouble", [lambda *_, **__: 0.3, lambda *_, **__: 1 / 0])
def test_kernels_that_fail_the_check_are_not_used(trouble, monkeypatch):
    model = timm.create_model("cmt_micro")
    networks = [m for m in model.modules() if isinstance(m, FusedPart) and m.kernel == "auto"]
    # Of each of five blocks; reductions of four; convolution and norm of four stages; the stem.
    assert len(networks) == 5 * 5 + 4 + 2 * 4 + 1
    parameter = next(model.parameters())
    use_fused_where_it_agrees(model)
    assert {network.kernel for network in networks} == {"auto"}  # on a CPU nothing is checked
    monkeypatch.setattr("cmtrain.models.ffn_check.worst_error", trouble)
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(
        UserWarning, match=r"ffn_kernel: the fused kernels (differ|do not run: ZeroDivisionError)"
    ):
        use_fused_where_it_agrees(model)
    assert {network.kernel for network in networks} == {"eager"}
    assert parameter.device.type == "cpu"
