"""Time CMT-Ti on one GPU in training and inference: eager, fused, compiled, beside timm's models.

    python benchmarks/model_gpu.py --seconds 150 --json model.jsonl

Synthetic images lie on the device; there is no loader. Writes one JSON line per case as soon as it is known;
a case that fails has the error instead. `copy_share` of eager cases is the rate of counted bytes
(cmtrain/models/cost.py), as a share of the device's own copy rate, which is measured first.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import cmtrain.models  # noqa: F401
from cmtrain.commands.bench.timing import WARMUP_STEPS, Work, best_seconds, laps, measure_ceilings
from cmtrain.models.blocks import FeedForward, FfnKernel, ResidualDepthwiseConv, attend
from cmtrain.models.cost import count
from cmtrain.models.fold import folded
from cmtrain.processes.collectives import set_cuda_math

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# Without a GPU everything runs in fp32, because a step takes seconds in a CPU's half precision.
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
if not ON_GPU:
    DTYPES = dict.fromkeys(DTYPES, torch.float32)


@dataclass(frozen=True)
class Case:
    """A model and how it is run. `small`: with the small batch. `compiled`: the mode of torch.compile."""

    name: str
    mode: str  # train, or infer
    ffn_kernel: str | None = None
    precision: str = "fp16"
    compiled: str | None = None
    folded: bool = False
    small: bool = False


# The most wanted cases first
CASES = [
    Case("cmt_ti", "train", "fused"),
    Case("cmt_ti", "train", "eager"),
    Case("resnet50", "train"),
    Case("cmt_ti", "infer", "fused", folded=True, small=True),
    Case("resnet50", "infer", small=True),
    Case("cmt_ti", "train", "fused", compiled="default"),
    Case("cmt_ti", "infer", "fused", folded=True, compiled="reduce-overhead", small=True),
    Case("resnet50", "infer", compiled="reduce-overhead", small=True),
    Case("cmt_ti", "train", "eager", compiled="default"),
    Case("cmt_ti", "train", "fused", "bf16"),
    Case("efficientnet_b0", "train"),
    Case("efficientnet_b0", "infer", small=True),
    Case("cmt_ti", "infer", "eager", small=True),
    Case("cmt_ti", "infer", "fused", small=True),
    Case("cmt_ti", "infer", "fused", folded=True),
    Case("resnet50", "infer"),
    Case("resnet50", "train", compiled="default"),
    Case("cmt_ti", "train", "eager", "bf16"),
]


def mean_seconds(work: Work, steps: int) -> float:
    """Return the mean seconds of `steps` calls after warm-up."""
    for _ in range(WARMUP_STEPS):
        work()
    return sum(laps(work, steps, DEVICE)) / steps


def make_model(name: str, image_px: int, mode: str, ffn_kernel: str | None = None) -> torch.nn.Module:
    options: dict = {"img_size": image_px} if name.startswith("cmt_") else {}
    if ffn_kernel is not None:
        options["ffn_kernel"] = ffn_kernel
    return timm.create_model(name, **options).to(memory_format=torch.channels_last).train(mode == "train")


def step_of(model: torch.nn.Module, images: torch.Tensor, mode: str, compiled: str | None = None) -> Work:
    """Return a function that does one training step, or one pass, on `images`, in their data type."""
    device, dtype = images.device.type, images.dtype
    forward = torch.compile(model, mode=compiled) if compiled else model
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (len(images),), device=device)
    autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)

    def infer() -> None:
        with torch.inference_mode(), autocast:
            forward(images)

    if mode == "infer":
        return infer
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    def train() -> None:
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(forward(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return train


def measure(case: Case, batch: int, image_px: int, steps: int, copy_rate: float) -> dict[str, float]:
    dtype = DTYPES[case.precision]
    model = make_model(case.name, image_px, case.mode, case.ffn_kernel).to(DEVICE)
    model = folded(model) if case.folded else model
    images = torch.randn(batch, 3, image_px, image_px, device=DEVICE, dtype=dtype)
    work = step_of(model, images, case.mode, case.compiled)
    figures = {"first_step_seconds": best_seconds(work, 1, device=DEVICE)}
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    seconds = mean_seconds(work, steps)
    figures |= {"images_per_second": batch / seconds, "step_ms": 1000 * seconds}
    if ON_GPU:
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if not case.compiled:
        moved = count(model, image_px=image_px, batch=batch, dtype=dtype).total_bytes
        figures |= {"mb_per_image": moved / 1e6, "copy_share": moved * batch / seconds / copy_rate}
    return figures


def attention_times(batch: int, steps: int) -> dict[str, float]:
    """Return milliseconds of attention, both directions, with heads of 46 channels and padded to 48."""
    found = {}
    for heads, queries, keys in ((1, 1600, 25), (4, 100, 25)):
        for dim in (46, 48):
            q, k, v = (
                torch.randn(batch, heads, n, dim, device=DEVICE, dtype=DTYPES["fp16"], requires_grad=True)
                for n in (queries, keys, keys)
            )
            bias = torch.randn(heads, queries, keys, device=DEVICE, requires_grad=True)

            def run(q=q, k=k, v=v, bias=bias, scale=46**-0.5) -> None:
                attend(q, k, v, bias, 0.0, scale).sum().backward()

            found[f"{heads} heads of {dim}, {queries} queries"] = 1000 * mean_seconds(run, steps)
    return found


def part_times(batch: int, steps: int) -> dict[str, float]:
    """Return milliseconds of each stage's parts that have Triton kernels, with the kernels and without."""
    kernels: tuple[FfnKernel, ...] = ("eager", "fused") if ON_GPU else ("eager",)
    found = {}
    for channels, hidden, side in ((46, 165, 40), (92, 331, 20), (184, 662, 10), (368, 1324, 5)):
        x = torch.randn(batch, channels, side, side, device=DEVICE, dtype=DTYPES["fp16"])
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        for kernel in kernels:
            ffn = FeedForward(channels, hidden, variant="paper", drop=0.0, kernel=kernel)
            for part in (ResidualDepthwiseConv(channels, kernel).to(DEVICE), ffn.to(DEVICE)):

                def run(part=part, x=x) -> None:
                    with torch.autocast(DEVICE.type, x.dtype, enabled=ON_GPU):
                        out = part(x)
                    out.sum().backward()

                name = f"{type(part).__name__}, {channels} channels, {side} px, {kernel}"
                found[name] = 1000 * mean_seconds(run, steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--small-batch", type=int, default=128, help="batch of most inference cases")
    parser.add_argument("--image-px", type=int, default=160)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=150, help="no case starts later than this")
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    begin = time.monotonic()
    set_cuda_math("fp32")  # as training does, also for fp16 and bf16
    torch.manual_seed(0)
    rate = measure_ceilings(DEVICE, DTYPES["fp16"]).copy_bytes_per_second
    with Path(options.json).open("w") as file:

        def write(**line: object) -> None:
            print(json.dumps(line), file=file, flush=True)
            print(json.dumps(line), flush=True)

        write(copy_bytes_per_second=rate, attention_ms=attention_times(options.batch, options.steps))
        write(part_ms=part_times(options.batch, options.steps))
        for case in CASES:
            if not ON_GPU and (case.compiled or case.ffn_kernel == "fused"):
                continue  # meaningless on a CPU
            batch = options.small_batch if case.small else options.batch
            line = asdict(case) | {"batch": batch}
            try:
                if time.monotonic() - begin > options.seconds:
                    raise RuntimeError("skipped: no time left")
                line |= measure(case, batch, options.image_px, options.steps, rate)
            except RuntimeError as error:  # out of memory is one, too
                line["failed"] = str(error)[:200]
            write(**line)
            if ON_GPU:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
