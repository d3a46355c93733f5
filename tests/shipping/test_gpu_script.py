"""benchmarks/gpu.sh keeps to its time, and a kill at any moment leaves every figure that was known."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers.runs import HANG_SECONDS, ROOT
from torch.autograd import DeviceType

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PLANNED = [
    "decoder_probe", "model", "step", "step_eager", "step_compiled", "guard", "tests", "decoding", "train",
    "pack", "train_packed",
]  # fmt: skip
IF_TIME_IS_LEFT = [
    "few_images", "few_images_graphs", "step_bf16", "two_images", "loader_beside_timm", "model_compiled",
]  # fmt: skip
NEED_DALI = {"decoder_probe", "decoding", "train", "pack", "train_packed", "loader_beside_timm"}
ROWS = 5

# Stands for Python: reports a CPU, or writes ROWS rows for a line. BEHAVES says which lines do otherwise.
STUB = f"""#!{sys.executable} -IS
import json, os, pathlib, signal, sys, time
if "-c" in sys.argv:
    print("device " + os.environ.get("DEVICE", "cpu"))
    print("nvidia.dali " + os.environ.get("DALI", "2.2.0"))
else:
    json_path = pathlib.Path(sys.argv[sys.argv.index("--json") + 1]) if "--json" in sys.argv else None
    name = json_path.stem if json_path else "tests" if "pytest" in sys.argv else "pack"
    behaves = json.loads(os.environ.get("BEHAVES", "{{}}")).get(name)
    print(*sys.argv[1:])
    if isinstance(behaves, list):  # rows to write
        json_path.write_text("".join(json.dumps(row) + "\\n" for row in behaves))
        sys.exit()
    for number in range({ROWS}):
        time.sleep(float(os.environ.get("PAUSE", 0)))
        if json_path:
            with json_path.open("a") as file:
                print(json.dumps({{"row": number}}), file=file, flush=True)
        if behaves == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
        if behaves == "wait":
            print(os.getpid(), file=sys.stderr, flush=True)
            time.sleep(60)
    sys.exit(behaves == "fail")
"""


@pytest.fixture
def script(tmp_path):
    """script(**environment) -> Popen of the script with the stub for Python; results are in tmp_path/out."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    common = {"PYTHON": str(stub), "OUT": str(tmp_path / "out"), "XDG_CACHE_HOME": str(tmp_path)}

    def start(**environment) -> subprocess.Popen:
        given = {name: value for name, value in os.environ.items() if name not in ("ONLY", "PLAN", "STEPS")}
        return subprocess.Popen(
            [SCRIPT], env=given | common | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    return start


def folder(tmp_path):
    (found,) = (tmp_path / "out").iterdir()
    return found


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(tmp_path):
    return {row["name"]: row for row in rows(folder(tmp_path) / "summary.jsonl")}


def test_the_plan_is_in_order_of_value_and_fits_nine_minutes(script, tmp_path):
    out, _ = script(PLAN="1").communicate(timeout=600)
    plan = {line.split()[1]: int(line.split()[0]) for line in out.splitlines()}
    assert list(plan) == PLANNED + IF_TIME_IS_LEFT
    # Beside them: versions at the start, and five seconds until a process that ignores SIGTERM is killed.
    assert sum(plan[name] for name in PLANNED) <= 540 - 20
    assert not (tmp_path / "out").exists()


def test_the_wheels_for_a_host_without_an_index_are_those_of_the_lock_file():
    text, locked = (ROOT / "benchmarks" / "README.md").read_text(), (ROOT / "requirements.lock").read_text()
    wanted = re.findall(r"[a-z0-9-]+==[0-9.]+", text)
    assert len(wanted) == 17
    assert [pin for pin in wanted if f"\n{pin} " not in locked] == []


def test_all_lines_are_done(script, tmp_path):
    process = script()
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    assert {row["state"] for row in summary(tmp_path).values()} == {"done"}
    assert list(summary(tmp_path)) == PLANNED + IF_TIME_IS_LEFT


def test_a_line_that_hangs_is_killed_and_the_others_run(script, tmp_path):
    """It ignores SIGTERM, as a process may that waits for a driver."""
    process = script(MINUTES="1", BEHAVES=json.dumps({"decoder_probe": "hang", "guard": "fail"}))
    out, _ = process.communicate(timeout=600)
    states = {name: row["state"] for name, row in summary(tmp_path).items()}
    others = dict.fromkeys(PLANNED + IF_TIME_IS_LEFT, "done")
    assert states == others | {"decoder_probe": "killed", "guard": "failed"}
    assert summary(tmp_path)["decoder_probe"]["seconds"] >= 4
    assert rows(folder(tmp_path) / "decoder_probe.jsonl") == [{"row": 0}]
    assert "killed: decoder_probe (after 4 s)" in out.splitlines()
    assert "failed: guard (exit code 1)" in out.splitlines()
    assert process.returncode == 1


def test_lines_that_need_dali_are_named_where_there_is_none(script, tmp_path):
    process = script(DALI="cannot be imported: No module named 'nvidia'")
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    found = summary(tmp_path)
    assert {name for name, row in found.items() if row["why"] == "needs DALI"} == NEED_DALI
    assert {name for name, row in found.items() if row["state"] == "skipped"} == NEED_DALI
    assert "skipped: decoding (needs DALI)" in out.splitlines()


def test_lines_without_time_left_are_named(script, tmp_path):
    process = script(SECONDS="520", ONLY="guard two_images")  # where bash's clock begins
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    assert {name: row["why"] for name, row in summary(tmp_path).items()} == {
        "guard": "no time left", "two_images": "no time left",
    }  # fmt: skip
    assert "skipped: two_images (no time left)" in out.splitlines()


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({"mixed": "", "mixed_whole": "hangs"}, "mixed"),
        ({"mixed": "crashes (SIGSEGV)", "mixed_whole": ""}, "mixed_whole"),
        ({"mixed": "hangs", "mixed_whole": "hangs"}, "cpu"),
    ],
)
def test_later_lines_decode_in_the_fastest_way_without_a_fault(script, tmp_path, faults, expected):
    probed = [{"decode": decode, "load": 0.65, "fault": fault} for decode, fault in faults.items()]
    process = script(
        DEVICE="H200", BEHAVES=json.dumps({"decoder_probe": probed}), ONLY="decoder_probe decoding train"
    )
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    assert f"--decode {expected} " in (folder(tmp_path) / "decoding.txt").read_text()
    assert f"--data.decode {expected}\n" in (folder(tmp_path) / "train.txt").read_text()


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_at_any_moment_leaves_every_finished_row(script, tmp_path, seed):
    process = script(PAUSE="0.02")
    while not list((tmp_path / "out").glob("*/summary.jsonl")):
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 3))
    process.kill()
    process.communicate(timeout=600)
    found = summary(tmp_path)
    assert list(found) == PLANNED + IF_TIME_IS_LEFT  # those that were not reached as well
    states = [row["state"] for row in found.values()]
    done = states.count("done")
    assert states[:done] == ["done"] * done
    assert set(states[done + 1 :]) <= {"skipped"}
    for name in found:
        for path in folder(tmp_path).glob(f"{name}.json*"):
            numbers = [row["row"] for row in rows(path)]
            assert numbers == list(range(ROWS if found[name]["state"] == "done" else len(numbers)))


def test_ending_the_script_ends_its_line(script, tmp_path):
    process = script(BEHAVES=json.dumps({"model": "wait"}))
    deadline = time.monotonic() + HANG_SECONDS
    while not (paths := list((tmp_path / "out").glob("*/model.log"))) or not paths[0].read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    pid = int(paths[0].read_text())
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert summary(tmp_path)["decoder_probe"]["state"] == "done"
    assert summary(tmp_path)["model"] | {"seconds": 0} == {
        "name": "model", "state": "killed", "seconds": 0, "why": "ended with the script",
    }  # fmt: skip
    assert summary(tmp_path)["step"]["why"] == "not reached"


def test_the_model_alone_needs_neither_dali_nor_pydantic():
    hide = """if True:
        import runpy, sys
        class Hidden:
            def find_spec(name, path=None, target=None):
                if name.split(".")[0] in ("nvidia", "pydantic"):
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Hidden)
        sys.argv = ["model_gpu.py", "--help"]
        runpy.run_path("benchmarks/model_gpu.py", run_name="__main__")
    """
    done = subprocess.run(
        [sys.executable, "-c", hide], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "usage: model_gpu.py" in done.stdout


@pytest.fixture(scope="module")
def model_gpu():
    spec = importlib.util.spec_from_file_location("model_gpu", ROOT / "benchmarks" / "model_gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["model_gpu"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["model_gpu"]
    return module


def test_families_of_kernels_stand_measured_beside_predicted(model_gpu, monkeypatch):
    """Names as profilers print them; those of our kernels and their predictions are the same."""
    measured = {
        "depthwise_grad_kernel": 2.0, "void at::native::reduce_kernel<512, 1, ReduceOp<...>>": 1.0,
        "sm90_xmma_wgrad_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x64x64": 3.0,
        "cutlass_80_tensorop_f16_s16816gemm_f16_64x64_32x6_tn_align2": 4.0,
        "fmha_cutlassB_f16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::...)": 5.0,
        "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float, float, false>": 6.0,
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>": 7.0,
    }  # fmt: skip
    monkeypatch.setattr(model_gpu, "ON_GPU", True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    model = model_gpu.make_model("cmt_micro", 32, "train", "fused")
    predicted = model_gpu.predicted_ms(model, 4, 32)
    assert {"depthwise_grad_kernel", "norm_kernel", "convolution", "mm"} <= predicted.keys()
    rows = {row.pop("family"): row for row in model_gpu.families(measured, predicted)}
    assert [row["total_ms"] for row in rows.values()] == [2.0, 6.0, 0, 5.0, 3.0, 4.0, 1.0, 7.0]
    assert sum(row["predicted_ms"] for row in rows.values()) == pytest.approx(sum(predicted.values()))
    assert [name for name, row in rows.items() if not row["predicted_ms"]] == ["LayerNorm"]  # it is Triton's
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA B200")
    assert model_gpu.predicted_ms(model, 4, 32) == {}


def test_a_profile_counts_kernels_and_neither_operators_nor_annotations(model_gpu):
    def event(key, device_type, count, us, annotates=False):
        return SimpleNamespace(
            key=key, device_type=device_type, count=count, self_device_time_total=us, self_cpu_time_total=7,
            is_user_annotation=annotates,
        )  # fmt: skip

    kernels = [event(f"kernel {us}", DeviceType.CUDA, 2, us) for us in range(1, 41)]
    others = [
        event("Optimizer.step", DeviceType.CUDA, 1, 900, annotates=True),
        event("aten::mm", DeviceType.CPU, 3, 500),
    ]
    found = list(model_gpu.dearest_kernels([*others, *kernels], DeviceType.CUDA))
    assert found[0] == {"kernel": "all", "calls": 80, "total_ms": pytest.approx(0.82), "share": 1.0}
    assert found[1]["kernel"] == "kernel 40"
    assert found[1]["share"] == pytest.approx(40 / 820)
    assert len(found) == 1 + model_gpu.NUM_KERNELS


@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_every_line_runs_without_a_gpu(tmp_path, figure):
    environment = {"STEPS": "1", "OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "MINUTES": "60"}
    began = time.monotonic()
    process = subprocess.run([SCRIPT], env=os.environ | environment, capture_output=True, text=True)
    figure(f"every line of benchmarks/gpu.sh with STEPS=1: {time.monotonic() - began:.0f} s")
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr
    found = summary(tmp_path)
    assert {name: row["state"] for name, row in found.items()} == dict.fromkeys(found, "done")
    for name in found.keys() - {"tests", "pack", "model_compiled"}:
        (path,) = folder(tmp_path).glob(f"{name}.json*")
        if path.suffix == ".json":
            report = json.loads(path.read_text())
            assert report.get("verdict") != "unfinished"
        else:
            assert not [row for row in rows(path) if row.get("failed") or row.get("fault")]
