"""Training and inference rates of CMT-Ti on one GPU: operation by operation, fused, compiled, beside timm's models.

    python benchmarks/model_gpu.py --seconds 150 --json model.jsonl

Synthetic images that lie on the device, no loader. One JSON line a case, written as soon as it is known; a case that
fails says why. Device time between two events, after warm-up. `copy_share` is what part of the device's own copy rate,
measured first, the counted bytes (cmtrain/models/cost.py) amount to: of eager cases, which move what is counted.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

import cmtrain.models  # noqa: F401
from cmtrain.models.blocks import FeedForward, FfnKernel, ResidualDepthwiseConv, attend
from cmtrain.models.cost import count
from cmtrain.models.fold import folded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Without a GPU everything runs in fp32: a CPU's half precision takes seconds a step.
DTYPES = (
    {"fp16": torch.float16, "bf16": torch.bfloat16}
    if DEVICE == "cuda"
    else dict.fromkeys(("fp16", "bf16"), torch.float32)
)


@dataclass(frozen=True)
class Case:
    name: str
    mode: str  # train, or infer
    batch: int
    precision: str = "fp16"
    ffn_kernel: str | None = None
    compiled: str | None = None  # the mode of torch.compile
    folded: bool = False

    def model(self, image_px: int) -> nn.Module:
        options = {} if self.ffn_kernel is None else {"ffn_kernel": self.ffn_kernel, "img_size": image_px}
        model = timm.create_model(self.name, **options).to(DEVICE, memory_format=torch.channels_last)
        model.train(self.mode == "train")
        return folded(model) if self.folded else model


def cases(batch: int, small_batch: int) -> list[Case]:
    """The most wanted first."""
    train, infer = (batch, "train"), (small_batch, "infer")

    def case(name: str, where: tuple[int, str], **options) -> Case:
        return Case(name, where[1], where[0], **options)

    fused, eager = {"ffn_kernel": "fused"}, {"ffn_kernel": "eager"}
    return [
        case("cmt_ti", train, **fused),
        case("cmt_ti", train, **eager),
        case("resnet50", train),
        case("cmt_ti", infer, **fused, folded=True),
        case("resnet50", infer),
        case("cmt_ti", train, **fused, compiled="default"),
        case("cmt_ti", infer, **fused, folded=True, compiled="reduce-overhead"),
        case("resnet50", infer, compiled="reduce-overhead"),
        case("cmt_ti", train, **eager, compiled="default"),
        case("cmt_ti", train, **fused, precision="bf16"),
        case("efficientnet_b0", train),
        case("efficientnet_b0", infer),
        case("cmt_ti", infer, **eager),
        case("cmt_ti", infer, **fused),
        case("cmt_ti", (batch, "infer"), **fused, folded=True),
        case("resnet50", (batch, "infer")),
        case("resnet50", train, compiled="default"),
        case("cmt_ti", train, **eager, precision="bf16"),
    ]


def seconds_of(run: Callable[[], object], steps: int) -> float:
    """Mean seconds of `run`, of `steps` after three that do not count."""
    for _ in range(3):
        run()
    if DEVICE == "cpu":
        begin = time.perf_counter()
        for _ in range(steps):
            run()
        return (time.perf_counter() - begin) / steps
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(steps):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / steps


def measure(case: Case, image_px: int, steps: int, copy_bytes_per_second: float) -> dict[str, float]:
    dtype = DTYPES[case.precision]
    model = case.model(image_px)
    forward = torch.compile(model, mode=case.compiled) if case.compiled else model
    images = torch.randn(case.batch, 3, image_px, image_px, device=DEVICE, dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (case.batch,), device=DEVICE)
    optimizer = None if case.mode == "infer" else torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    autocast = torch.autocast(DEVICE, dtype, enabled=DEVICE == "cuda")
    scaler = torch.amp.GradScaler(DEVICE, enabled=case.precision == "fp16" and DEVICE == "cuda")

    def train() -> None:
        assert optimizer is not None
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(forward(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    def infer() -> None:
        with torch.inference_mode(), autocast:
            forward(images)

    run = train if case.mode == "train" else infer
    begin = time.perf_counter()
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    figures = {"first_step_seconds": time.perf_counter() - begin}
    seconds = seconds_of(run, steps)
    figures |= {"images_per_second": case.batch / seconds, "step_ms": 1000 * seconds}
    if DEVICE == "cuda":
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if not case.compiled:
        moved = count(model, image_px=image_px, batch=case.batch, dtype=dtype).total_bytes
        figures |= {
            "mb_per_image": moved / 1e6,
            "copy_share": moved * case.batch / seconds / copy_bytes_per_second,
        }
    return figures


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy much larger than any cache."""
    source = torch.empty((1 << 30) if DEVICE == "cuda" else (1 << 24), device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), 20)


def attention_times(batch: int, steps: int) -> dict[str, float]:
    """Milliseconds of a stage's attention, forward and backward, with heads of 46 channels and padded to 48."""
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

            found[f"{heads} heads of {dim}, {queries} queries"] = 1000 * seconds_of(run, steps)
    return found


def part_times(batch: int, steps: int) -> dict[str, float]:
    """Milliseconds of what has Triton kernels, at each of CMT-Ti's stages, forward and backward, and without them."""
    kernels: tuple[FfnKernel, ...] = ("eager", "fused") if DEVICE == "cuda" else ("eager",)
    found = {}
    for channels, hidden, side in ((46, 165, 40), (92, 331, 20), (184, 662, 10), (368, 1324, 5)):
        x = torch.randn(batch, channels, side, side, device=DEVICE, dtype=DTYPES["fp16"])
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        for kernel in kernels:
            for part in (
                ResidualDepthwiseConv(channels, kernel),
                FeedForward(channels, hidden, variant="paper", drop=0.0, kernel=kernel),
            ):
                part.to(DEVICE)

                def run(part=part, x=x) -> None:
                    with torch.autocast(DEVICE, x.dtype, enabled=DEVICE == "cuda"):
                        out = part(x)
                    out.sum().backward()

                name = f"{type(part).__name__}, {channels} channels, {side} px, {kernel}"
                found[name] = 1000 * seconds_of(run, steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--small-batch", type=int, default=128, help="of inference")
    parser.add_argument("--image-px", type=int, default=160)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=150, help="no case starts later than this")
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    begin = time.monotonic()
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    rate = copy_rate()
    with Path(arguments.json).open("w") as file:

        def tell(**line: object) -> None:
            print(json.dumps(line), file=file, flush=True)
            print(json.dumps(line), flush=True)

        tell(copy_bytes_per_second=rate, attention_ms=attention_times(arguments.batch, arguments.steps))
        tell(part_ms=part_times(arguments.batch, arguments.steps))
        for case in cases(arguments.batch, arguments.small_batch):
            if DEVICE == "cpu" and (case.compiled or case.ffn_kernel == "fused"):
                continue  # neither says anything there
            if time.monotonic() - begin > arguments.seconds:
                tell(**asdict(case), skipped="no time left")
                continue
            try:
                tell(**asdict(case), **measure(case, arguments.image_px, arguments.steps, rate))
            except (RuntimeError, torch.OutOfMemoryError) as error:
                tell(**asdict(case), failed=str(error)[:200])
            if DEVICE == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
