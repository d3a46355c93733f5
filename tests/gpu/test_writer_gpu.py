"""Test a save on a GPU: it is queued behind the work that is queued there, and nobody waits for it."""

import pytest
import torch
from guard import no_host_sync

from cmtrain.storage.checkpoint import load_newest
from cmtrain.storage.checkpoint_writer import CheckpointWriter, HostCopy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_what_is_saved_is_the_state_at_the_save(tmp_path):
    """The host waits neither for the copy nor for the work before it; later work changes nothing saved."""
    weight, busy = torch.ones(1000, 1000, device="cuda"), torch.randn(4096, 4096, device="cuda")
    writer = CheckpointWriter(tmp_path)
    writer.save(1, {"weight": weight, "progress": {"step": 1}}, {}, keep=1, last=True)  # buffers are there
    with no_host_sync():
        for _ in range(50):
            busy = busy @ busy / 64
        weight += busy[0, 0] * 0 + 1
        writer.save(2, {"weight": weight, "progress": {"step": 2}}, {}, keep=1, last=False)
        queued = not torch.cuda.current_stream().query()
        weight.fill_(-1)
    assert queued
    assert writer.wait(60)
    assert load_newest(tmp_path).state["weight"].unique().tolist() == [2.0]


def test_host_memory_is_pinned_and_used_again():
    copy = HostCopy()
    state = {"weight": torch.randn(8, 3, 4, 4, device="cuda").to(memory_format=torch.channels_last)}
    first = copy.take(state)[0]["weight"]
    assert first.is_pinned()
    assert first.stride() == state["weight"].stride()
    assert copy.take(state)[0]["weight"].data_ptr() == first.data_ptr()
