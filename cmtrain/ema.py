"""Exponential moving average of the weights, which a bad step cannot touch."""

import copy

import torch
from torch import Tensor, nn


class Ema:
    """ema += (1 - decay) * (model - ema), over parameters and floating-point buffers.

    timm's ModelEmaV3 and torch's AveragedModel take in whatever the model holds, so one NaN in a BatchNorm buffer stays
    in the average for ever (ultralytics pull requests 24731 and 24986). Here a step that the guard refused adds exactly
    zero, and that costs no host synchronisation.

    Args:
        model: the unwrapped model; it is copied.
        decay: 0 < decay < 1, per optimizer step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.average, self.source = [], []
        self.count_average, self.count_source = [], []
        for average, source in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                self.average.append(average)
                self.source.append(source)
            else:
                self.count_average.append(average)
                self.count_source.append(source)

    @torch.no_grad()
    def update(self, ok: Tensor) -> None:
        """Move towards the model where `ok` (bool scalar on the device), else stay exactly where it is."""
        # The model is finite here, refused step or not, so 0 * difference is 0 and x + 0 is x, bit for bit.
        difference = torch._foreach_sub(self.source, self.average)
        torch._foreach_mul_(difference, (1 - self.decay) * ok)
        torch._foreach_add_(self.average, difference)
        if self.count_average:
            torch._foreach_copy_(self.count_average, self.count_source)
