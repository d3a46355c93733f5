"""Replace accelerate's Accelerator, which refuses fp16 without a GPU, by half precision on a CPU."""

from contextlib import ExitStack, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class GpuArithmetic(TorchFunctionMode):
    """Rounds convolutions and matrix products of half precision once, after a sum in fp32, as GPUs do.

    A CPU's own fp16 convolutions take four fifths of a step.
    """

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in (F.conv2d, F.linear):
            return function(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            rounded = [a.to(self.dtype).float() if isinstance(a, Tensor) else a for a in args]
            return function(*rounded, **(kwargs or {})).to(self.dtype)


class HalfAccelerator:
    """One process on the CPU: fp16 with a GradScaler, or bf16 without."""

    device = torch.device("cpu")
    process_index, local_process_index, num_processes = 0, 0, 1
    is_main_process = True

    log_with = ()

    def __init__(self, init_scale=2.0**16, precision="fp16"):
        self.mixed_precision = precision
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale) if precision == "fp16" else None

    def autocast(self):
        stack = ExitStack()
        stack.enter_context(torch.autocast("cpu", self.dtype))
        stack.enter_context(GpuArithmetic(self.dtype))
        return stack

    def prepare_model(self, model, device_placement=None):
        return Wrapped(model, self.autocast)

    def no_sync(self, model):
        return nullcontext()

    def local_main_process_first(self):
        return nullcontext()

    def backward(self, loss):
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()


class Wrapped(nn.Module):
    """A model as accelerate wraps it: it computes in half precision and returns fp32."""

    def __init__(self, inner, autocast):
        super().__init__()
        self.inner, self.autocast = inner, autocast

    def forward(self, x):
        with self.autocast():
            return self.inner(x).float()
