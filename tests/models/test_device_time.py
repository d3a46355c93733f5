"""Test the predicted time of kernels against arithmetic by hand, and its paths by what torch dispatches."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cmtrain.cli.main import PREDICTED
from cmtrain.models.blocks import ChannelNorm, FeedForward
from cmtrain.models.cost import DEVICES, Call, Counter, count, predict_rows

H100 = 3.0e12, 132 * 4 * 1.755e9, 798e12  # bytes, instructions of a warp, operations of a product per second
LAUNCH_MS = 0.0025


def call(name: str, inputs: list, outputs: list, moved: int, library="aten", alignment=16) -> Call:
    shapes = (tuple(map(torch.Size, each)) for each in (inputs, outputs))
    return Call(name, library, *shapes, moved, alignment)


def one(kernel: Call, share: float = 1.0) -> dict:
    (row,) = predict_rows([kernel], DEVICES["h100"], share)
    return row


def test_a_kernel_takes_as_long_as_the_slowest_of_four():
    big, small = (call("gelu", [(n, 1000)], [(n, 1000)], 4000 * n) for n in (100_000, 1))
    assert one(big)["ms"] == pytest.approx(400e6 / H100[0] * 1000)
    assert one(big, share=0.5)["ms"] == pytest.approx(2 * 400e6 / H100[0] * 1000)
    assert (one(big)["bound"], one(small)["bound"], one(small)["ms"]) == ("bytes", "launch", LAUNCH_MS)
    product = one(call("mm", [(4096, 4096), (4096, 4096)], [(4096, 4096)], 3 * 2 * 4096**2))
    assert (product["bound"], product["path"]) == ("matrix units", "")
    assert product["ms"] == pytest.approx(2 * 4096**3 / H100[2] * 1000)


def test_calls_of_the_same_sizes_are_one_row_and_lists_take_several_launches():
    kernel = call("gelu", [(8, 8)], [(8, 8)], 256)
    other = call("gelu", [(9, 8)], [(9, 8)], 288)
    rows = predict_rows([kernel, other, kernel], DEVICES["h100"])
    assert [(row["launches"], row["mb"], row["ms"]) for row in rows] == [
        (2, pytest.approx(512e-6), pytest.approx(2 * LAUNCH_MS)),
        (1, pytest.approx(288e-6), pytest.approx(LAUNCH_MS)),
    ]
    row = one(call("_foreach_add_", [(3,)] * 300, [], 4800))
    assert (row["launches"], row["ms"]) == (3, pytest.approx(3 * LAUNCH_MS))


def test_what_an_operation_writes_into_its_inputs_is_charged():
    """Adding b to a reads both and writes a, in place or not, in a list or alone."""
    with FakeTensorMode():
        a, b, c = ([torch.empty(1000) for _ in range(3)] for _ in range(3))
        with Counter() as counter:
            torch._foreach_add_(a, b)
            torch._foreach_add(a, c)
            a[0].add_(b[0])
    assert [each.bytes for each in counter.calls] == [3 * 3 * 4000, 3 * 3 * 4000, 3 * 4000]


def test_our_kernels_are_charged_their_instructions_and_new_ones_their_bytes():
    """depthwise: 82 instructions of a thread for each of 176 padded channels, in tiles of 32 columns."""
    hidden, vector = (819_200, 176), (176,)
    known = call("depthwise", [hidden, vector, vector, (10, 176)], [hidden], 4 * 819_200 * 176, "cmtrain")
    assert one(known)["kernel"] == "depthwise_kernel"
    assert one(known)["bound"] == "instructions"
    assert one(known)["ms"] == pytest.approx(819_200 * 192 * 82 / 32 / H100[1] * 1000)
    plain = call("depthwise", [hidden, (10, 176)], [hidden], 4 * 819_200 * 176, "cmtrain")
    assert one(plain)["instructions"] == pytest.approx(one(known)["instructions"] / 2)
    # The product of 368 channels makes GELU of its left side again for each 128 of them.
    narrow, wide = (
        call("project", [(6400, 1328), (1328,), (channels, 1328)], [(6400, channels)], 1, "cmtrain")
        for channels in (92, 368)
    )
    assert one(wide)["instructions"] == 3 * one(narrow)["instructions"]
    new = one(call("thing", [hidden], [hidden], 3_000_000_000, "cmtrain"))
    assert (new["kernel"], new["path"]) == ("thing_kernel", "instructions not known")
    assert (new["ms"], new["bound"]) == (pytest.approx(1.0), "bytes")


@pytest.mark.parametrize(("alignment", "share", "path"), [
    (8, 0.9, "rows at multiples of 8 bytes"), (4, 0.7, "rows at multiples of 4 bytes"),
    (2, 0.4, "known slow: rows at multiples of 2 bytes"),
])  # fmt: skip
def test_a_product_of_unaligned_rows_is_slower(alignment, share, path):
    sizes = [(10**6, 46), (46, 48)], [(10**6, 48)]
    aligned, unaligned = (one(call("mm", *sizes, 10**9, alignment=each)) for each in (16, alignment))
    assert unaligned["ms"] == pytest.approx(aligned["ms"] / share)
    assert (aligned["path"], unaligned["path"]) == ("", path)


class Part(nn.Module):
    def __init__(self, channels: int, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, channels, 1), *layers)

    def forward(self, x):
        return self.layers(x).mean((2, 3))


def rows_of(channels: int, *layers: nn.Module, batch: int = 64) -> list[dict]:
    model = Part(channels, *layers).to(memory_format=torch.channels_last)
    traffic = count(model, image_px=40, batch=batch)
    rows = predict_rows(traffic.calls, DEVICES["h100"])
    # A convolution without a gradient of its input needs no weight for it; `count` charges it.
    assert sum(row["mb"] for row in rows) == pytest.approx(traffic.total_bytes * batch / 1e6, rel=1e-5)
    return rows


def test_layer_norm_of_46_channels_is_the_slow_path_and_of_48_is_not():
    """The first starts a block of 512 threads for every row: 2,880 instructions of a warp."""
    slow, fast = (
        {row["kernel"]: row for row in rows_of(channels, ChannelNorm(channels, 1e-6, "eager"))}
        for channels in (46, 48)
    )
    for name in ("native_layer_norm", "native_layer_norm_backward"):
        assert slow[name]["path"] == "known slow: 512 threads for a row"
        assert fast[name]["path"] == "128 threads for a row"
    assert slow["native_layer_norm"]["bound"] == "instructions"
    assert slow["native_layer_norm"]["ms"] == pytest.approx(64 * 1600 * 2880 / H100[1] * 1000)
    assert "norm_kernel" in {row["kernel"] for row in rows_of(46, ChannelNorm(46, 1e-6, "fused"))}


def test_convolutions_are_three_kernels_backward_and_slow_with_few_channels():
    paths = {row["kernel"]: row["path"] for row in rows_of(16, nn.Conv2d(16, 32, 3, padding=1))}
    parts = [f"convolution_backward: {of}" for of in ("input", "weight", "bias")]
    assert {"convolution", *parts} <= paths.keys()
    assert paths["convolution_backward: input"] == ""  # the first convolution, of 3 channels, has none
    rows = rows_of(46, nn.Conv2d(46, 46, 8, 8, groups=46))
    slow = [row for row in rows if row["path"] == "known slow: channels are no multiple of 8"]
    assert len(slow) == 2 + 3  # the weight's and the bias's gradient are of any number of channels
    assert sum(row["instructions"] > 0 for row in slow) == 3  # of the depth-wise one: ten for a tap


def test_operation_by_operation_is_predicted_to_be_slower():
    times = {}
    for kernel in ("eager", "fused"):
        ffn = FeedForward(46, 165, variant="paper", drop=0.0, kernel=kernel)
        rows = rows_of(46, ChannelNorm(46, 1e-6, kernel), ffn, batch=512)
        times[kernel] = sum(row["ms"] for row in rows)
        assert any(row["path"].startswith("known slow: rows") for row in rows) == (kernel == "eager")
    assert times["eager"] > 2 * times["fused"]


def test_every_device_has_a_name_on_the_command_line():
    assert tuple(DEVICES) == PREDICTED
