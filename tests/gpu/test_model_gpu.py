"""Test the model on a GPU: its kernels at their real size, its attention, its compiled form."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import timm
from timm.layers import DropPath
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmtrain.models.blocks import ChannelNorm, FeedForward, FfnKernel, ResidualDepthwiseConv, attend
from cmtrain.models.fold import folded

pytestmark = pytest.mark.gpu

STAGES = [(46, 165, 40), (92, 331, 20), (184, 662, 10), (368, 1324, 5)]
DTYPES = [torch.float16, torch.bfloat16]
PARTS = pytest.mark.parametrize("part", ["perception unit", "norm", "paper", "reimpl"])


class NormOfSum(nn.Module):
    def __init__(self, channels: int, kernel: FfnKernel):
        super().__init__()
        self.norm = ChannelNorm(channels, 1e-6, kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.add(*self.norm.of_sum(x, self.norm(x), DropPath()))


def built(part: str, channels: int, hidden: int, kernel: FfnKernel) -> nn.Module:
    """Build a perception unit, a norm, or a feed-forward network in the paper's or the other form."""
    torch.manual_seed(0)
    if part == "perception unit":
        network: nn.Module = ResidualDepthwiseConv(channels, kernel)
    elif part == "norm":
        network = NormOfSum(channels, kernel)
    else:
        network = FeedForward(channels, hidden, variant=part, drop=0.0, kernel=kernel)
        network.project_norm.eval()  # batch statistics would pass no gradient on to the shifts before it
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.to("cuda", memory_format=torch.channels_last)


def picture(channels: int, side: int, dtype: torch.dtype, batch: int = 32) -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(batch, channels, side, side, device="cuda", dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def step(network: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the output, all gradients and all statistics of a step."""
    network.zero_grad()
    x.grad = None
    with torch.autocast("cuda", x.dtype, enabled=x.dtype.itemsize == 2):
        y = network(x)
    torch.manual_seed(2)
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    left = {"y": y.detach(), "x": x.grad} | {key: p.grad for key, p in network.named_parameters()}
    left |= {key: buffer for key, buffer in network.named_buffers() if not key.startswith("project_norm")}
    return {key: tensor.clone() for key, tensor in left.items()}


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@PARTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "hidden", "side"), STAGES)
def test_the_fused_form_is_no_worse_than_the_eager_one_and_repeats_its_bits(
    channels, hidden, side, dtype, part
):
    x = picture(channels, side, dtype)
    exact = step(built(part, channels, hidden, "eager").double(), x.detach().double().requires_grad_())
    eager = step(built(part, channels, hidden, "eager"), x)
    fused, again = (step(built(part, channels, hidden, "fused"), x) for _ in range(2))
    for key in exact:
        ours, theirs = error(fused[key], exact[key]), error(eager[key], exact[key])
        assert ours <= 2 * theirs + 1e-5, (key, ours, theirs)
        if key not in ("x", "expand.weight"):  # those are cuBLAS's
            assert torch.equal(fused[key], again[key]), key


@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_heads_go_through_the_fused_backend_and_the_bias_learns(dtype):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(8, 2, n, 48, device="cuda", dtype=dtype, requires_grad=True) for n in (400, 25, 25)
    )
    bias = torch.randn(2, 400, 25, device="cuda", requires_grad=True)
    with sdpa_kernel(
        SDPBackend.EFFICIENT_ATTENTION
    ):  # refuses what it cannot do, where a list would fall back
        torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(dtype)[None])
    attend(q, k, v, bias, 0.0, 46**-0.5).float().square().sum().backward()
    ours = bias.grad.clone()
    bias.grad = None
    scores = (q.double() @ k.double().mT) * 46**-0.5 + bias.double()
    (scores.softmax(-1) @ v.double()).square().sum().backward()
    assert error(ours, bias.grad) < 0.02


def test_compiled_and_fused_trains_as_fused():
    def logits_after(compiled: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = timm.create_model("cmt_ti", img_size=160, num_classes=10, ffn_kernel="fused").cuda()
        forward = torch.compile(model) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        x = torch.randn(16, 3, 160, 160, device="cuda")
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                logits = forward(x)
            nn.functional.cross_entropy(logits.float(), torch.arange(16, device="cuda") % 10).backward()
            optimizer.step()
        return logits.float()

    assert error(logits_after(True), logits_after(False)) < 0.1


def test_folded_inference_computes_the_same():
    torch.manual_seed(0)
    model = timm.create_model("cmt_ti", num_classes=10).cuda()
    x = torch.randn(16, 3, 160, 160, device="cuda")
    model(x)  # moves the statistics
    model.eval()
    with torch.inference_mode():
        exact = model.double()(x.double())
        with torch.autocast("cuda", torch.float16):
            logits = folded(model.float())(x)
    assert error(logits, exact) < 0.01
