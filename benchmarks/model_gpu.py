"""Time CMT-Ti on one GPU in training and inference: eager, fused, compiled, beside timm's models.

    python benchmarks/model_gpu.py --seconds 150 --json model.jsonl [--compiled]

Synthetic images lie on the device; there is no loader. Writes one JSON line per figure as soon as it is
known; a case that fails has the error instead. `copy_share` of eager cases is the rate of counted bytes
(cmtrain/models/cost.py), as a share of the device's own copy rate, which is measured first. The first case
is also profiled: one line for each of the kernels that a step spends most of its time in, and one for each
family of kernels; where the GPU is known, with the time that cmtrain/models/cost.py predicts.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import cmtrain.models  # noqa: F401
from cmtrain.commands.bench.timing import WARMUP_STEPS, Work, best_seconds, laps, measure_ceilings
from cmtrain.models.blocks import FeedForward, FfnKernel, ResidualDepthwiseConv, attend
from cmtrain.models.cost import DEVICES, count, predict_rows
from cmtrain.models.fold import folded
from cmtrain.processes.collectives import set_cuda_math

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# Without a GPU everything runs in fp32, because a step takes seconds in a CPU's half precision.
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
if not ON_GPU:
    DTYPES = dict.fromkeys(DTYPES, torch.float32)
NUM_KERNELS = 30  # of a profile
# family -> what its kernels' names have in a profile, and in a prediction; the first that fits
FAMILIES = {
    "Triton kernels": (r"^[a-z_]+_kernel$", "_kernel$"),
    "LayerNorm": ("layer_?norm|RowwiseMoments|GammaBeta", "layer_norm"),
    "BatchNorm": ("batch_norm|bn_[fb]w", "batch_norm"),
    "attention": ("fmha|attention", "attention"),
    "convolutions": ("conv|fprop|dgrad|wgrad|cudnn", "convolution"),
    "products": ("gemm|nvjet|splitk|cutlass", "mm$"),
    "sums": ("reduce_kernel", "^sum"),
    "others": ("", ""),
}


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


def profile_rows(case: Case, batch: int, image_px: int) -> Iterator[dict[str, Any]]:
    """Profile one step after warm-up. Yields a row of totals, then one per kernel, the dearest first."""
    model = make_model(case.name, image_px, case.mode, case.ffn_kernel).to(DEVICE)
    images = torch.randn(batch, 3, image_px, image_px, device=DEVICE, dtype=DTYPES[case.precision])
    work = step_of(model, images, case.mode)
    mean_seconds(work, 1)  # warms up
    with profile(activities=[ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU]) as profiled:
        best_seconds(work, 1, device=DEVICE)
    device = DeviceType.CUDA if ON_GPU else DeviceType.CPU
    predicted = predicted_ms(model, batch, image_px)
    for row in dearest_kernels(profiled.key_averages(), device):
        name = row["kernel"]
        yield row | ({"predicted_ms": predicted[name]} if name in predicted else {})
    if predicted:
        ran = {name: us / 1000 for name, _, us in kernels_of(profiled.key_averages(), device)}
        yield from families(ran, predicted)


def predicted_ms(model: torch.nn.Module, batch: int, image_px: int) -> dict[str, float]:
    """Return the predicted milliseconds of each kernel of forward and backward pass; none for other GPUs."""
    gpu = next((gpu for gpu in DEVICES if ON_GPU and gpu in torch.cuda.get_device_name().lower()), None)
    times: dict[str, float] = {}
    if gpu is not None:
        calls = count(model, image_px=image_px, batch=batch).calls
        for row in predict_rows(calls, DEVICES[gpu]):
            times[row["kernel"]] = times.get(row["kernel"], 0.0) + row["ms"]
    return times


def families(measured: dict[str, float], predicted: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Yield the milliseconds of each family of kernels, measured and predicted."""
    for family in FAMILIES:
        both = (
            sum(ms for name, ms in times.items() if family_of(name, column) == family)
            for column, times in enumerate((measured, predicted))
        )
        yield {"family": family, **dict(zip(("total_ms", "predicted_ms"), both, strict=True))}


def family_of(kernel: str, column: int) -> str:
    fits = (name for name, what in FAMILIES.items() if re.search(what[column], kernel, re.IGNORECASE))
    return next(fits)


def kernels_of(events: Iterable[Any], device: DeviceType) -> list[tuple[str, int, float]]:
    """Return name, calls and microseconds of a profile's kernels, or of its operators on a CPU."""
    own_us = {DeviceType.CPU: "self_cpu_time_total"}.get(device, "self_device_time_total")
    ran = [event for event in events if event.device_type == device and not event.is_user_annotation]
    return [(event.key, event.count, getattr(event, own_us)) for event in ran]


def dearest_kernels(events: Sequence[Any], device: DeviceType) -> Iterator[dict[str, Any]]:
    """Yield the totals of a profile's kernels, or of its operators on a CPU, then the dearest of them."""
    ran = sorted(kernels_of(events, device), key=lambda kernel: -kernel[2])
    total_us = sum(us for _, _, us in ran)
    calls = sum(calls for _, calls, _ in ran)
    yield {"kernel": "all", "calls": calls, "total_ms": total_us / 1000, "share": 1.0}
    for name, calls, us in ran[:NUM_KERNELS]:
        yield {"kernel": name[:160], "calls": calls, "total_ms": us / 1000, "share": us / total_us}


def attention_times(batch: int, steps: int) -> Iterator[dict[str, Any]]:
    """Yield milliseconds of attention, both directions, with heads of 46 channels and padded to 48."""
    for heads, queries, keys in ((1, 1600, 25), (4, 100, 25)):
        for dim in (46, 48):
            q, k, v = (
                torch.randn(batch, heads, n, dim, device=DEVICE, dtype=DTYPES["fp16"], requires_grad=True)
                for n in (queries, keys, keys)
            )
            bias = torch.randn(heads, queries, keys, device=DEVICE, requires_grad=True)

            def run(q=q, k=k, v=v, bias=bias, scale=46**-0.5) -> None:
                attend(q, k, v, bias, 0.0, scale).sum().backward()

            part = f"attention, {heads} heads of {dim}, {queries} queries"
            yield {"part": part, "ms": 1000 * mean_seconds(run, steps)}


def part_times(batch: int, steps: int) -> Iterator[dict[str, Any]]:
    """Yield milliseconds of each stage's parts that have Triton kernels, with the kernels and without."""
    kernels: tuple[FfnKernel, ...] = ("eager", "fused") if ON_GPU else ("eager",)
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
                yield {"part": name, "ms": 1000 * mean_seconds(run, steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--small-batch", type=int, default=128, help="batch of most inference cases")
    parser.add_argument("--image-px", type=int, default=160)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=150, help="no case starts later than this")
    parser.add_argument("--compiled", action="store_true", help="the compiled cases only, minutes each")
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    begin = time.monotonic()
    set_cuda_math("fp32")  # as training does, also for fp16 and bf16
    torch.manual_seed(0)
    rate = 1e9 * measure_ceilings(DEVICE, DTYPES["fp16"])["copy_gb_per_second"]
    cases = [case for case in CASES if bool(case.compiled) == options.compiled]
    if not ON_GPU:  # a CPU has no fused kernels, and compiles too slowly to be of use
        cases = [case for case in cases if not case.compiled and case.ffn_kernel != "fused"]
    with Path(options.json).open("w") as file:

        def write(**line: Any) -> None:
            print(json.dumps(line), file=file, flush=True)
            print(json.dumps(line), flush=True)

        def measured(line: dict[str, Any], rows: Callable[[], Iterator[dict[str, Any]]]) -> None:
            """Write `line` with each of the rows, or with the error that ended them."""
            try:
                if time.monotonic() - begin > options.seconds:
                    raise TimeoutError("skipped: no time left")
                for row in rows():
                    write(**line, **row)
            except Exception as error:  # a compiler's are of many kinds
                write(**line, failed=f"{type(error).__name__}: {error}"[:200])
            if ON_GPU:
                torch.cuda.empty_cache()

        write(copy_bytes_per_second=rate)
        for number, case in enumerate(cases):
            batch = options.small_batch if case.small else options.batch
            line = asdict(case) | {"batch": batch}
            sizes = batch, options.image_px
            measured(line, lambda case=case, sizes=sizes: iter([measure(case, *sizes, options.steps, rate)]))
            if number == 0 and not options.compiled:
                name = f"{case.name} {case.mode} {case.ffn_kernel}"
                measured({"profile": name}, lambda case=case, sizes=sizes: profile_rows(case, *sizes))
        if not options.compiled:
            measured({}, lambda: attention_times(options.batch, options.steps))
            measured({}, lambda: part_times(options.batch, options.steps))


if __name__ == "__main__":
    main()
