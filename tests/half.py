"""fp16 training on a CPU: what Learner uses of accelerate's Accelerator, which refuses fp16 without a GPU."""

from contextlib import nullcontext

import torch
from torch import nn


class HalfAccelerator:
    """One process, fp16 autocast and a GradScaler, on the CPU."""

    device = torch.device("cpu")
    process_index, num_processes = 0, 1
    mixed_precision = "fp16"

    def __init__(self, init_scale=2.0**16):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)

    def autocast(self):
        return torch.autocast("cpu", torch.float16)

    def prepare_model(self, model):
        class Wrapped(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                with torch.autocast("cpu", torch.float16):
                    return self.inner(x).float()

        return Wrapped(model)

    def no_sync(self, model):
        return nullcontext()

    def backward(self, loss):
        self.scaler.scale(loss).backward()
