"""Try a GPU's image decoder in a process of its own before a run depends on it.

Some of NVIDIA's decoders crash, hang or give wrong pixels on some GPUs, for some JPEGs or batches that mix
kinds. Run as a program, this file decodes a batch of all kinds and compares it with the CPU's.
"""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np

from pipelines.files.demo_images import HEIGHT, WIDTH, mixed_jpegs
from pipelines.spec import Decode, Placement

# The ways to decode for a GPU, the fastest first; each is the fallback of those before it.
WAYS: tuple[Decode, ...] = ("mixed", "mixed_whole", "cpu")
_FALLBACKS = {"mixed_whole": "whole images on the GPU and cutting them there", "cpu": "on the CPU"}

BATCH_SIZE = 32  # at least 13 of them go to the JPEG engine, which then decodes mixed kinds at once
MAX_SECONDS = 120  # to import DALI from a slow disk and to create CUDA's context
# Decoders differ by less than one level of 255, a window one pixel off by 8, another image's by over 40.
MAX_MEAN_LEVELS = 2.5

_UNTRIED = "untried"  # begins an answer
_COMMAND = sys.executable, "-P", "-m", __name__


def choose_decode(place: Placement) -> tuple[Decode, list[str]]:
    """Return the fastest way to decode that works on `place.device`, and one line for each that does not."""
    if not str(place.device).startswith("cuda"):
        return "cpu", []
    first = 0 if place.decode == "auto" else WAYS.index(place.decode)
    lines: list[str] = []
    for way, fallback in pairwise(WAYS[first:]):
        if not (fault := fault_of(place, way)):
            return way, lines
        if fault.startswith(_UNTRIED):
            return way, [*lines, f"data.decode: {way} is {fault}"]
        lines.append(f"data.decode: {way} {fault}; decoding {_FALLBACKS[fallback]} instead")
    return "cpu", lines


def fault_of(place: Placement, decode: Decode, *, max_seconds: float = MAX_SECONDS) -> str:
    """Return what is wrong with a way to decode on `place.device`, "" if nothing."""
    request = {"decode": decode, "device": str(place.device), "load": place.hw_decoder_load}
    request |= {"threads": min(place.threads, 4), "max_seconds": max_seconds}
    # The child finds what this process has imported, wherever that came from.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    try:
        # What decoders print, one line per image at times, is of no use beside the answer.
        done = subprocess.run(  # noqa: S603
            [*_COMMAND, json.dumps(request)], env=environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", timeout=max_seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"hangs (no answer in {max_seconds:g} s)"
    if done.returncode < 0:
        return f"crashes ({signal.Signals(-done.returncode).name})"
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"fault"')]
    if done.returncode or not answers:
        last = next(iter(reversed(done.stderr.strip().splitlines())), "no message")
        return f"fails (exit code {done.returncode}: {last.strip()})"
    return str(json.loads(answers[-1])["fault"])


def _compare(decode: Decode, device: str, load: float | None, threads: int) -> str:
    """Decode a batch on `device` and on the CPU. Return how they differ, "" if they do not."""
    import torch

    try:
        torch.zeros(1, device=device)
    except Exception as error:  # such as a GPU that serves one process at a time
        return f"{_UNTRIED}, because another process cannot use {device}: {str(error).splitlines()[0]}"
    place = Placement(device=device, decode=decode, threads=threads, hw_decoder_load=load)
    for windows in (True, False):
        expected, found = decoded(Placement(threads=threads), windows), decoded(place, windows)
        if [image.shape for image in expected] != [image.shape for image in found]:
            return "gives images of other sizes than the CPU"
        apart = [float(np.abs(a.astype(np.int16) - b).mean()) for a, b in zip(expected, found, strict=True)]
        if max(apart) > MAX_MEAN_LEVELS:
            wrong = f"{sum(mean > MAX_MEAN_LEVELS for mean in apart)} of {len(apart)} images"
            return f"gives other pixels than the CPU in {wrong} (by up to {max(apart):.0f} of 255)"
    return ""


def decoded(place: Placement, windows: bool) -> list[Any]:
    """Return a batch of `mixed_jpegs`, (h, w, 3) uint8 each: crop windows of them, or whole images."""
    from pipelines.dali import graphs

    rng = np.random.default_rng(0)
    heights, widths = rng.integers(32, HEIGHT, BATCH_SIZE), rng.integers(32, WIDTH, BATCH_SIZE)
    tops, lefts = rng.integers(0, HEIGHT - heights + 1), rng.integers(0, WIDTH - widths + 1)
    inputs: list[Any] = [[np.frombuffer(encoded, np.uint8) for encoded in mixed_jpegs(BATCH_SIZE)]]
    if windows:
        inputs.append(np.stack([tops, lefts, heights, widths], axis=1).astype(np.int32))
    run = graphs.execution(place, BATCH_SIZE, reads_files=False)
    pipeline = graphs.decode_graph(lambda: inputs, run, windows=windows)
    for _ in range(3):  # the first batch finds the decoder's buffers empty, the later ones do not
        (images,) = pipeline.run()
    images = images.as_cpu() if run.device == "gpu" else images
    return [np.array(images[index]) for index in range(BATCH_SIZE)]


def main() -> None:
    request = json.loads(sys.argv[1])
    signal.alarm(int(request.pop("max_seconds")) + 1)  # a hanging child does not outlive its parent for long
    sys.stdout.write(json.dumps({"fault": _compare(**request)}) + "\n")


if __name__ == "__main__":
    main()
