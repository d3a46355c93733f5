"""Test what train.precision means on CUDA, by torch's settings, which exist without a GPU as well."""

import ast
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import ROOT

from cmtrain.commands.bench.timing import DTYPES
from cmtrain.errors import ConfigError
from cmtrain.processes.collectives import set_cuda_math
from cmtrain.training import build

EXACT, TF32 = ("ieee", "ieee", "ieee"), ("tf32", "tf32", "tf32")


def settings() -> tuple[str, ...]:
    cudnn = torch.backends.cudnn
    return (torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    yield
    set_cuda_math("fp32")


@pytest.fixture
def cuda(monkeypatch):
    """Make torch claim two GPUs, of which `cuda` is the older one's capability to be set."""
    older = [8, 0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: tuple(older) if index else (9, 0))
    monkeypatch.setattr(build, "Accelerator", lambda **options: SimpleNamespace(**options))
    return older


ALLOWS_TF32 = """
import sys, torch
torch.backends.fp32_precision = "tf32"
cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
print(matmul.fp32_precision, cudnn.conv.fp32_precision)
from cmtrain.processes.collectives import set_cuda_math
for precision in ("fp32", "bf16", "tf32"):
    set_cuda_math(precision)
    print(matmul.fp32_precision, cudnn.conv.fp32_precision)
"""


def test_fp32_is_exact_also_where_the_environment_allows_tf32():
    """torch alone would use TF32 here in products, and in cuDNN's convolutions without being asked."""
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error", "-c", ALLOWS_TF32]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["tf32 tf32", "ieee ieee", "ieee ieee", "tf32 tf32"]


@pytest.mark.parametrize(("precision", "expected"), [("tf32", TF32), ("fp32", EXACT), ("fp16", EXACT)])
def test_tf32_is_fp32_with_other_products(cuda, precision, expected):
    set_cuda_math("fp32" if precision == "tf32" else "tf32")
    accelerator = build.make_accelerator(precision)
    assert settings() == expected
    assert build.precision_of(accelerator) == precision
    assert (accelerator.mixed_precision, accelerator.cpu) == ("fp16" if precision == "fp16" else "no", False)
    assert DTYPES[precision] == (torch.float16 if precision == "fp16" else torch.float32)
    assert torch.backends.cudnn.benchmark
    # torch's compiler reads the older interface, which raises where the two do not agree.
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (expected == TF32)
    assert torch.get_float32_matmul_precision() == ("high" if expected == TF32 else "highest")


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_what_needs_a_gpu_is_refused_without_one(precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    needs = f"train.precision: {precision} needs a CUDA device, and there is none; use auto, bf16 or fp32"
    with pytest.raises(ConfigError, match=f"^{needs}$"):
        build.make_accelerator(precision)


def test_tf32_is_refused_where_one_gpu_has_none(cuda):
    cuda[:] = 7, 5
    with pytest.raises(
        ConfigError, match=r"^train\.precision: tf32 needs .* 8\.0 \(A100\) .* has 7\.5; use"
    ):
        build.make_accelerator("tf32")
    assert build.precision_of(build.make_accelerator("fp16")) == "fp16"


def test_everything_that_computes_takes_its_settings_from_one_place():
    """So `cmtrain bench`, eval and repair-bn measure what training runs."""
    makers = []
    for path in sorted((ROOT / "cmtrain").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "Accelerator"
            ):
                makers.append(path.name)
            assert (
                not (isinstance(node, ast.Attribute) and node.attr == "benchmark")
                or path.name == "collectives.py"
            )
    assert makers == ["build.py"]


def test_the_benchmark_of_the_model_computes_as_training_does(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("model_gpu", ROOT / "benchmarks" / "model_gpu.py")
    assert spec is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "model_gpu", script)  # a dataclass looks its module up
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["model_gpu.py", "--json", str(tmp_path / "json")])
    set_cuda_math("tf32")
    torch.backends.cudnn.benchmark = False
    seen = []

    def measure_ceilings(*_):
        seen.append((settings(), torch.backends.cudnn.benchmark))
        raise InterruptedError

    monkeypatch.setattr(script, "measure_ceilings", measure_ceilings)
    with pytest.raises(InterruptedError):
        script.main()
    build.make_accelerator("auto")
    assert seen == [(settings(), torch.backends.cudnn.benchmark)] == [(EXACT, True)]
