"""Test the launcher's count of GPUs. Skips itself without one."""

import pytest
import torch

from cmtrain.processes.gpus import visible_gpus

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu


def test_gpus_are_counted_as_torch_counts_them():
    assert visible_gpus() == torch.cuda.device_count()


def test_hidden_gpus_are_not_counted(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert visible_gpus() == 1
