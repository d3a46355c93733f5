"""Compute the feed-forward network with a third of the passes over its hidden tensor.

With a = gelu(z), and n = s * a + t for BatchNorm, the network in the paper's form is

    z1 = x W1' + b1    n1 = s1 a1 + t1    z2 = n1 + depthwise(n1)    n2 = s2 a2 + t2    y = n2 W2' + b2

The statistics of a give s = gamma / deviation and t = beta - mean * s. The re-implementation adds n1 later:
z2 = depthwise(n1), y = (n1 + n2) W2' + b2.

z1 to n2 are h = 3.6 times as wide as x, and moving them is most of a GPU's time. So n is never written:
- the depthwise convolution normalises its input as it reads it,
- so does the product behind it, but for the shift: y = (s2 a2) W2' + (b2 + W2 t2), exactly; in the
  re-implementation's form, y = (s1 a1 + s2 a2) W2' + (b2 + W2 (t1 + t2)),
- GELU is computed again from z where needed, but for the 3x3 window, which would compute it nine times,
- the kernel that has a in registers also takes its statistics.

Backward, with M rows, D = sum of dn * a and E = sum of dn over them, BatchNorm gives

    d gamma = (D - mean E) / deviation      d beta = E      da = s dn + k a + c
    k = -s (D - mean E) / (M deviation^2)   c = -s E / M - k mean

The second BatchNorm's D and E are column sums of W2 * G2 and of W2 * sum(dy). The gradient of W2, G2 s2 +
sum(dy) t2', needs G2 = dy' a2 anyway. In the re-implementation's form it has a second part, from G1 = dy'
a1, and dn1 has dy W2 added.

That is 15 passes over a hidden tensor instead of 44, 19 in the re-implementation's form. The kernels take
fp16, bf16 and fp32; sums and scales are fp32. The last BatchNorm and the addition behind it are
norm_kernels.batch_norm's. The local perception unit, x + depthwise(x), uses the kernels without BatchNorm.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cmtrain.models.ffn_operators as ops
from cmtrain.models.linear_kernels import layer_shape, rows_of, unpacked, weight_grad
from cmtrain.models.norm_kernels import batch_norm, batch_norm_grad, evaluation, track


class _FeedForward(torch.autograd.Function):
    """Rows (M, C) -> (M, C), and the statistics of the three norms (5, p), without gradients.

    gamma3 None: without the last norm and the addition. adds_late: n1 is added to n2 (re-implementation).
    """

    @staticmethod
    def forward(
        ctx, x, w1, b1, gamma1, beta1, depthwise, bias, gamma2, beta2, w2, b2, gamma3, beta3, residual, kept,
        size, eps, adds_late,
    ):  # fmt: skip
        z1, a1, moments = ops.expand(x, w1, b1, True)
        statistics1 = ops.normalise(moments, gamma1, beta1, len(x), eps[0])
        *_, s1, t1 = statistics1
        taps = _taps(depthwise, bias, len(s1))
        z2, moments = ops.depthwise(a1, s1, t1, taps, size[0], size[1], not adds_late, True)
        statistics2 = ops.normalise(moments, gamma2, beta2, len(x), eps[1])
        *_, s2, t2 = statistics2
        skip = (a1, s1, t1) if adds_late else None
        y, moments, w2_padded = _project(z2, s2, t2, w2, b2, skip, gamma3 is not None)
        out, statistics3 = y, None
        if gamma3 is not None:
            statistics3 = ops.normalise(moments, gamma3, beta3, len(x), eps[2])
            out, _ = batch_norm("normal", y, None, residual, kept, *statistics3[3:])
        ctx.save_for_backward(
            x, w1, taps, w2, w2_padded, z1, z2, statistics1, statistics2,
            None if out is y else y, statistics3, kept,
        )  # fmt: skip
        ctx.size, ctx.adds_late = size, adds_late
        ctx.of_residual = None if residual is None else residual.dtype
        ctx.mark_non_differentiable(statistics1, statistics2, *([] if out is y else [statistics3]))
        ctx.set_materialize_grads(False)
        return out, statistics1, statistics2, statistics3

    @staticmethod
    def backward(ctx, dn, *_):
        x, w1, taps, w2, w2_padded, z1, z2, *statistics, y, statistics3, kept = ctx.saved_tensors
        statistics1, statistics2 = statistics
        hidden, pitch, adds_late = len(w1), z1.shape[1], ctx.adds_late
        shape = layer_shape(len(w2), pitch, in_heads=(hidden, pitch))
        (*_, s1, t1), (*_, s2, t2) = statistics1, statistics2
        dy, dgamma3, dbeta3 = dn.contiguous(), None, None
        d_residual = None if ctx.of_residual is None else dy.to(ctx.of_residual)
        if y is None:
            db2 = dy.sum(0, dtype=torch.float32)
        else:
            dy, db2, dgamma3, dbeta3 = batch_norm_grad(dy, y, None, kept, statistics3)
        g2 = unpacked(weight_grad(dy, z2, None, 1.0, shape, True), len(w2))[0]
        dw2, (d2, e2) = ops.project_weight_grad(g2, w2, db2, s2, t2)
        if adds_late:
            g1 = unpacked(weight_grad(dy, z1, None, 1.0, shape, True), len(w2))[0]
            dw2 += torch.addcmul(g1 * s1[:hidden], db2[:, None], t1[:hidden])
        dgamma2, slope, offset = ops.normalise_grad(d2, e2, statistics2, len(x))

        dz2, skip = ops.project_grad(dy, w2_padded, z2, s2, slope, offset, adds_late)
        dn1, sums = ops.depthwise_grad(dz2, skip if adds_late else None, z1, s1, t1, taps, hidden, *ctx.size)
        taps_and_bias, of_norm = sums.sum(0).split([10 * hidden, 2 * pitch])
        e1, d1 = of_norm.view(2, pitch)
        dgamma1, slope, offset = ops.normalise_grad(d1, e1, statistics1, len(x))
        dz1, dx = ops.expand_grad(dn1, z1, s1, slope, offset, w1)
        shape = layer_shape(pitch, x.shape[1], out_heads=(hidden, pitch))
        dw1, db1 = unpacked(weight_grad(dz1, x, None, 1.0, shape, False), hidden)
        return (
            dx, dw1, db1, dgamma1[:hidden], e1[:hidden], *_of_taps(taps_and_bias), dgamma2[:hidden], e2,
            dw2, db2, dgamma3, dbeta3, d_residual, None, None, None, None,
        )  # fmt: skip


class _ResidualDepthwise(torch.autograd.Function):
    """Rows (M, C) -> (M, C)."""

    @staticmethod
    def forward(ctx, x, weight, bias, height, width):
        taps = _taps(weight, bias, len(weight))
        ctx.save_for_backward(x, taps)
        ctx.size = height, width
        return ops.depthwise(x, None, None, taps, height, width, True, False)[0]

    @staticmethod
    def backward(ctx, dy):
        (x, taps), channels = ctx.saved_tensors, dy.shape[1]
        dx, sums = ops.depthwise_grad(dy.contiguous(), None, x, None, None, taps, channels, *ctx.size)
        return dx, *_of_taps(sums.sum(0)[: 10 * channels]), None, None


def _project(
    z2: Tensor, s2: Tensor, t2: Tensor, w2: Tensor, b2: Tensor, skip: tuple[Tensor, Tensor, Tensor] | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, in training its moments, and w2 (C, p). skip: a1, s1 and t1 where n1 is added to n2."""
    a1, s1, t1 = skip or (None, None, None)
    bias = torch.addmv(b2.float(), w2.float(), (t2 if t1 is None else t1 + t2)[: w2.shape[1]])
    w2_padded = F.pad(w2.to(z2.dtype), (0, len(s2) - w2.shape[1]))
    return *ops.project(z2, s2, w2_padded, bias, a1, s1, training), w2_padded


def feed_forward(x: Tensor, layers: Any, residual: Tensor | None, kept: Tensor | None) -> Tensor:
    """Return residual + kept * network(x) of a FeedForward (`layers`): maps (B, C, H, W), channels-last.

    kept (B, 1, 1, 1), or None for ones. In training the norms' running statistics move as torch moves them.
    Evaluation has no backward here; where folding left an Identity it does not normalise.
    """
    expand, project, adds_late = layers.expand, layers.project, layers.variant == "reimpl"
    norms = norm1, norm2, norm3 = layers.expand_norm, layers.depthwise_norm, layers.project_norm
    rows, size = rows_of(x.permute(0, 2, 3, 1)), tuple(x.shape[2:])
    added = None if residual is None else residual.permute(0, 2, 3, 1).reshape(rows.shape)
    factors = None if kept is None else kept.flatten()
    depthwise = layers.depthwise.weight, layers.depthwise.bias
    with torch.autocast(x.device.type, enabled=False):
        if norm1.training:
            last = (norm3.weight, norm3.bias, added, factors) if norm3.training else (None,) * 4
            out, *statistics = _FeedForward.apply(
                rows, expand.weight, expand.bias, norm1.weight, norm1.bias, *depthwise,
                norm2.weight, norm2.bias, project.weight, project.bias, *last,
                size, tuple(norm.eps for norm in norms), adds_late,
            )  # fmt: skip
            track(norms[: 2 + norm3.training], statistics[: 2 + norm3.training])
            if not norm3.training:
                branch = norm3(_map(out, x))
                kept = torch.ones_like(branch[:1, :1, :1, :1]) if kept is None else kept
                return branch if residual is None else torch.addcmul(residual, kept, branch)
        else:
            _, a, _ = ops.expand(rows, expand.weight, expand.bias, False)
            s1, t1 = _evaluation(norm1, expand.bias)
            taps = _taps(*depthwise, len(s1))
            z, _ = ops.depthwise(a, s1, t1, taps, size[0], size[1], not adds_late, False)
            s2, t2 = _evaluation(norm2, expand.bias)
            skip = (a, s1, t1) if adds_late else None
            y, *_ = _project(z, s2, t2, project.weight, project.bias, skip, False)
            out, _ = batch_norm("normal", y, None, added, factors, *evaluation(norm3, project.bias))
    return _map(out, x)


def residual_depthwise(x: Tensor, depthwise: nn.Conv2d) -> Tensor:
    """Return x plus its depth-wise 3x3 convolution: (B, C, H, W) -> (B, C, H, W), channels-last."""
    rows = rows_of(x.permute(0, 2, 3, 1))
    return _map(_ResidualDepthwise.apply(rows, depthwise.weight, depthwise.bias, *x.shape[2:]), x)


def _taps(weight: Tensor, bias: Tensor, pitch: int) -> Tensor:
    """Return the nine taps and the bias, (10, pitch), so that a thread reads neighbours."""
    taps = torch.cat([weight.flatten(1).t(), bias[None]])
    return taps if pitch == taps.shape[1] else F.pad(taps, (0, pitch - taps.shape[1]))


def _of_taps(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight (h, 1, 3, 3) and bias (h,) in the sums of depthwise_grad (10 h,)."""
    hidden = len(sums) // 10
    weight = sums[: 9 * hidden].view(hidden, 3, 3, 1).permute(0, 3, 1, 2)  # channels-last, as the layer's is
    return weight, sums[9 * hidden :]


def _map(rows: Tensor, like: Tensor) -> Tensor:  # (M, C) -> (B, C, H, W)
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _evaluation(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and shift (p,) of a norm in evaluation."""
    scale, shift = evaluation(norm, like)
    padding = (0, ops.padded(len(scale)) - len(scale))
    return F.pad(scale, padding), F.pad(shift, padding)
