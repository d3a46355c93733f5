"""Test phases by CUDA events, memory and identity of a real GPU. Skips itself without one."""

import shutil
import subprocess
import time

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from guard import no_host_sync
from helpers.gpu import batches, make_learner

from cmtrain.monitoring.metrics import MEMORY_KINDS, RUN_FACTS, TrainMetrics

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


def test_phases_add_up_to_the_step_and_are_read_without_waiting():
    learner, stream = make_learner(), batches()
    for step in range(3):
        learner.step(stream, step, 1e-3)
    torch.cuda.synchronize()
    learner.phases.pop_finished()
    begin, taken = time.perf_counter(), []
    with no_host_sync():
        for step in range(3, 13):
            learner.step(stream, step, 1e-3)
            taken += learner.phases.pop_finished()
    torch.cuda.synchronize()
    wall = time.perf_counter() - begin
    taken += learner.phases.pop_finished()
    assert len(taken) == 10
    assert all(min(seconds.values()) > 0 for seconds in taken)
    total = sum(sum(seconds.values()) for seconds in taken)
    assert 0.5 * wall < total <= 1.01 * wall
    print(f"phases of a step: { {name: round(1000 * taken[-1][name], 2) for name in taken[-1]} } ms")


def test_marks_cost_the_host_little():
    learner = make_learner()
    begin = time.perf_counter()
    for _ in range(1000):
        learner.phases.begin("forward")
    seconds = (time.perf_counter() - begin) / 1000
    print(f"a mark takes {1e6 * seconds:.1f} us")
    assert seconds < 1e-4


def test_memory_and_identity():
    held, metrics = torch.zeros(1 << 20, device=DEVICE), TrainMetrics("run", 0)
    metrics.start(dict.fromkeys(RUN_FACTS, ""), last_step=1, flops_per_image=1, device=DEVICE)
    metrics.report(metrics.reported)
    of, own = metrics.registry.get_sample_value, {"run": "run", "rank": "0"}
    memory = {kind: of("cmtrain_gpu_memory_bytes", own | {"kind": kind}) for kind in MEMORY_KINDS}
    assert held.nbytes <= memory["allocated"] <= min(memory["reserved"], memory["peak"])
    ((_, labels, value, *_),) = (
        sample for family in metrics.registry.collect() for sample in family.samples
        if sample.name == "cmtrain_gpu_info"
    )  # fmt: skip
    uuid = labels["UUID"]
    assert (labels["model"], value) == (torch.cuda.get_device_name(DEVICE), 1)
    if shutil.which("nvidia-smi"):
        assert (
            uuid in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
        )
