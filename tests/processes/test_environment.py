"""The environment decides nothing about a run, and half a launcher is named in one line."""

import datetime
import os
import signal
import socket
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from helpers.runs import free_port

from cmtrain.cli.main import main
from cmtrain.processes import collectives
from cmtrain.processes.environment import check_imports, check_launcher, ignore_variables
from cmtrain.processes.failure import stop_signals
from cmtrain.processes.rank import ACCELERATE_LAUNCH, PARENT, is_started_by_launcher
from cmtrain.training import build
from pipelines.spec import DataError

PLAIN = {"PATH": os.environ["PATH"], "HOME": "/nowhere"}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TWO = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def environment(monkeypatch):
    """environment(NAME=value): the only variables that there are, besides PATH and HOME."""

    def put(**variables):
        chosen = PLAIN | variables
        for name in os.environ.keys() - chosen.keys():
            monkeypatch.delenv(name)
        for name, value in chosen.items():
            monkeypatch.setenv(name, value)

    return put


def changed():
    """The variables as they are now, without those that were there before."""
    return {name: value for name, value in os.environ.items() if name not in PLAIN and "PYTEST" not in name}


@pytest.mark.parametrize(
    "variable",
    [
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=8",
        "ACCELERATE_DYNAMO_MODE=max-autotune",
        "ACCELERATE_USE_FSDP=true",
        "ACCELERATE_USE_DEEPSPEED=true",
        "ACCELERATE_USE_MEGATRON_LM=true",
        "ACCELERATE_USE_PARALLELISM_CONFIG=true",
        "ACCELERATE_TORCH_DEVICE=meta",
        "ACCELERATE_DEBUG_MODE=perhaps",
        "ACCELERATE_USE_CPU=perhaps",
        "FSDP_OFFLOAD_PARAMS=true",
        "PARALLELISM_CONFIG_TP_SIZE=2",
        "NVIDIA_TF32_OVERRIDE=1",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1",
        "ONEDNN_DEFAULT_FPMATH_MODE=BF16",
        "TRITON_F32_DEFAULT=tf32",
        "TORCH_COMPILE_DISABLE=1",
        "TORCHDYNAMO_DISABLE=1",
        "TORCHINDUCTOR_MAX_AUTOTUNE=1",
        "TORCH_NCCL_NAN_CHECK=1",
        "TIMM_USE_NAFLEX=1",
        "OMP_NUM_THREADS=",
        "OMP_NUM_THREADS=4,2",
    ],
)
def test_a_variable_that_would_change_a_run_is_removed_and_named_once(environment, capsys, variable):
    name, _, value = variable.partition("=")
    environment(**{name: value})
    ignore_variables()
    ignore_variables()
    assert changed() == {}
    ending = f"the configuration decides: {name}={value!r}\n"
    assert capsys.readouterr().err.endswith(ending)


def test_what_accelerate_launch_sets_by_itself_is_removed_without_a_word(environment, capsys):
    launch = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    quiet = {"ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}
    quiet |= {"ACCELERATE_USE_CPU": "False", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
    kept = {"OMP_NUM_THREADS": "2", "ACCELERATE_CPU_AFFINITY": "1", "NCCL_DEBUG": "INFO"}
    environment(**launch, **quiet, **kept)
    ignore_variables()
    assert changed() == launch | kept
    assert capsys.readouterr().err == ""
    assert is_started_by_launcher()
    os.environ.pop("ACCELERATE_DYNAMO_BACKEND")  # as where somebody exports the other one
    assert not is_started_by_launcher()


def test_an_accelerator_takes_no_value_from_the_environment(environment, monkeypatch, capsys):
    made = {}
    monkeypatch.setattr(build, "Accelerator", lambda **options: made.update(options))
    environment(**dict.fromkeys(ACCELERATE_LAUNCH, "fp8"), ACCELERATE_GRADIENT_ACCUMULATION_STEPS="8")
    build.make_accelerator("fp32")
    assert (made["mixed_precision"], made["dynamo_backend"]) == ("no", "no")
    assert made["gradient_accumulation_plugin"].num_steps == 1


def test_accumulation_left_in_the_shell_does_not_divide_gradients(environment, monkeypatch):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    environment(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="8")
    for state in (PartialState, AcceleratorState, GradientState):
        monkeypatch.setattr(state, "_shared_state", {})
    assert build.make_accelerator("fp32").gradient_accumulation_steps == 1


HALF = [
    ({"LOCAL_RANK": "3"}, "half a launcher: LOCAL_RANK='3', but no RANK, WORLD_SIZE, MASTER_ADDR"),
    ({"WORLD_SIZE": "2"}, "half a launcher: WORLD_SIZE='2', but no RANK, LOCAL_RANK, MASTER_ADDR"),
    ({"RANK": "0"}, "half a launcher: RANK='0', but no LOCAL_RANK, WORLD_SIZE"),
    (TWO, "but no MASTER_ADDR, MASTER_PORT"),
    (TWO | MEETING | {"WORLD_SIZE": ""}, "but no WORLD_SIZE"),
    (TWO | MEETING | {"RANK": "two"}, "RANK='two': must be a whole number"),
    (TWO | MEETING | {"LOCAL_WORLD_SIZE": "-1"}, "LOCAL_WORLD_SIZE='-1': must be a whole number"),
    (TWO | MEETING | {"WORLD_SIZE": "9" * 5000}, "must be a whole number"),
    (TWO | MEETING | {"RANK": "2"}, "ranks that contradict one another: RANK='2'"),
    (TWO | MEETING | {"WORLD_SIZE": "0"}, "ranks that contradict one another"),
    (TWO | MEETING | {"LOCAL_WORLD_SIZE": "1"}, "ranks that contradict one another"),
    (TWO | MEETING | {"LOCAL_WORLD_SIZE": "4"}, "ranks that contradict one another"),
    ({"WORLD_SIZE": "1", "RANK": "1"}, "half a launcher"),
    (TWO | MEETING | {"MASTER_PORT": "http"}, "MASTER_PORT='http': must be a port"),
    (TWO | MEETING | {"MASTER_PORT": "70000"}, "MASTER_PORT='70000': must be a port"),
    ({PARENT: "1"}, f"{PARENT}='1': that is not the process that started this one"),
    ({PARENT: "me"}, f"{PARENT}='me': that is not the process"),
    ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT='x': must be a whole number"),
    ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, "SLURM_STEP_NUM_TASKS=4: several processes"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2: several processes"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "text"), HALF)
def test_half_a_launcher_is_named(environment, variables, text):
    environment(**variables)
    with pytest.raises(DataError) as error:
        check_launcher()
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("variables", "left"),
    [
        ({}, {}),
        (dict.fromkeys((*TWO, *MEETING, PARENT), ""), {}),  # as job templates leave them
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}),  # sbatch
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, {"WORLD_SIZE": "1", "RANK": "0"}),
        (MEETING, MEETING),
        (TWO | MEETING | {"PMI_SIZE": "1"}, TWO | MEETING),  # which accelerate would take for WORLD_SIZE
    ],
)
def test_whole_launchers_and_none_are_accepted(environment, variables, left):
    environment(**variables)
    check_launcher()
    assert changed() == left


@pytest.mark.parametrize(
    "verb", ["train", "demo", "doctor", "bench", "eval", "export", "repair-bn", "sweep", "data"]
)
def test_every_verb_that_computes_names_half_a_launcher(environment, capsys, verb):
    environment(WORLD_SIZE="2")
    assert main([verb, "x"]) == 3
    assert capsys.readouterr().err.startswith("half a launcher: WORLD_SIZE='2'")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_says_for_whom_and_not_for_ever(environment, monkeypatch, capsys, rank):
    environment(**TWO | MEETING | {"RANK": str(rank), "MASTER_PORT": str(free_port())})
    monkeypatch.setattr(collectives, "LINE_SECONDS", 0.0)
    with pytest.raises(DataError) as error:
        collectives.join("gloo", datetime.timedelta(seconds=1))
    other = "for rank 1" if rank == 0 else "for rank 0 at"
    assert other in str(error.value)
    assert "did not come in time (train.collective_timeout_seconds)" in str(error.value)
    assert other in capsys.readouterr().err
    assert not dist.is_initialized()


def test_a_port_in_use_is_one_line(environment):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        environment(**TWO | MEETING | {"RANK": "0", "MASTER_PORT": str(taken.getsockname()[1])})
        with pytest.raises(DataError, match=r"^ranks cannot meet at 127.0.0.1:.*in use"):
            collectives.join("gloo", datetime.timedelta(seconds=5))


def test_what_an_import_of_torch_or_dali_would_fail_of_is_one_line(environment, monkeypatch):
    environment(TORCHINDUCTOR_CACHE_DIR="/proc/no/kernels")
    with pytest.raises(DataError, match=r"^TORCHINDUCTOR_CACHE_DIR='/proc/no/kernels': No such file"):
        check_imports()
    environment()
    check_imports()
    monkeypatch.setattr(tempfile, "tempdir", "/proc/no")
    with pytest.raises(DataError, match=r"^TMPDIR: No such file"):
        check_imports()
    monkeypatch.setattr(sys, "flags", SimpleNamespace(optimize=2))
    with pytest.raises(DataError, match=r"^PYTHONOPTIMIZE=2"):
        check_imports()


@pytest.mark.parametrize(
    "arguments", [["bench"], ["data", "stats", "--config", "configs/demo.yaml"], ["eval", "runs/x"]]
)
def test_every_verb_that_loads_torch_checks_that_it_can(
    environment, monkeypatch, capsys, tmp_path, arguments
):
    environment(TORCHINDUCTOR_CACHE_DIR="/proc/no/kernels")
    (tmp_path / "runs" / "x" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 3
    assert capsys.readouterr().err.splitlines()[-1].startswith("TORCHINDUCTOR_CACHE_DIR=")


def test_signals_that_a_library_takes_stay_its_own(monkeypatch):
    handlers = {signal.SIGUSR1: None}
    monkeypatch.setattr(signal, "getsignal", lambda number: handlers.get(number, signal.SIG_DFL))
    assert signal.SIGUSR1 not in stop_signals()
    handlers.clear()
    assert signal.SIGUSR1 in stop_signals()
