"""The files of docker/ are valid for their tools, and agree with the program and each other."""

import importlib
import os
import re
import subprocess
from importlib import metadata

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers.runs import ROOT
from helpers.tools import find, need
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cmtrain import __version__
from cmtrain.config.schema import Config

DOCKER = ROOT / "docker"
SBATCH = DOCKER / "slurm" / "train.sbatch"
SCRIPTS = [SBATCH, ROOT / "benchmarks" / "gpu.sh", ROOT / ".ci" / "run"]


def finds_nothing(tool, *arguments):
    """Run a linter of the `dev` extra, which must print nothing."""
    need(tool)
    done = subprocess.run([find(tool), *map(str, arguments)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def kubernetes(name):
    return yaml.safe_load((DOCKER / "kubernetes" / f"{name}.yaml").read_text())


def test_dockerfile():
    finds_nothing("hadolint", DOCKER / "Dockerfile")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell(script):
    if not script.exists():
        pytest.skip("not part of the source archive")
    finds_nothing("shellcheck", script)


def test_compose():
    finds_nothing("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml")


@pytest.mark.parametrize(
    "path", sorted(DOCKER.rglob("*.yaml")), ids=lambda path: path.relative_to(DOCKER).as_posix()
)
def test_yaml(path):
    assert all(isinstance(document, dict) for document in yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize(("name", "kind"), [("runtime", "TrainingRuntime"), ("trainjob", "TrainJob")])
def test_kubeflow(name, kind):
    """Kubeflow's models drop keys that they do not know, so nothing may be missing in what they return."""
    need("kubeflow_trainer_api")
    models = importlib.import_module("kubeflow_trainer_api.models")
    written = kubernetes(name)
    assert not missing(written, getattr(models, f"TrainerV1alpha1{kind}").from_dict(written).to_dict())


def missing(written, kept, path=""):
    """Return the places where `kept` differs from what was written; defaults may have been added."""
    if isinstance(written, dict) and isinstance(kept, dict):
        return [line for key in written for line in missing(written[key], kept.get(key), f"{path}.{key}")]
    if isinstance(written, list) and isinstance(kept, list) and len(written) == len(kept):
        return [
            line
            for i, pair in enumerate(zip(written, kept, strict=True))
            for line in missing(*pair, f"{path}[{i}]")
        ]
    return [] if written == kept else [path]


def test_kubernetes_files_fit_each_other():
    pod = kubernetes("runtime")["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"][
        "template"
    ]
    (container,) = pod["spec"]["containers"]
    first_port = Config.model_fields["metrics"].default.port
    ports = {f"metrics-{rank}": first_port + rank for rank in range(8)}
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == ports
    monitor = kubernetes("podmonitor")["spec"]
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == list(ports)
    assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert kubernetes("trainjob")["spec"]["runtimeRef"]["name"] == kubernetes("runtime")["metadata"]["name"]
    assert container["image"] == f"cmtrain:{__version__}"


@pytest.mark.parametrize(
    ("name", "num_machines", "num_processes"), [("1gpu", 1, 1), ("8gpus", 1, 8), ("2nodes", 2, 16)]
)
def test_accelerate(name, num_machines, num_processes):
    """accelerate refuses unknown keys, and must leave the precision to our configuration."""
    loaded = load_config_from_file(str(DOCKER / "accelerate" / f"{name}.yaml"))
    assert (loaded.num_machines, loaded.num_processes, loaded.mixed_precision) == (
        num_machines,
        num_processes,
        "no",
    )


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=9 SLURM_LOCALID=1 exec "$@"
"""
RANK = """#!/bin/bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*"
exit "$CODE"
"""


@pytest.mark.parametrize(("code", "printed"), [(0, ""), (3, ""), (143, "requeue 12345\n")])
def test_slurm_requeues_what_was_preempted_and_nothing_else(tmp_path, code, printed):
    scontrol = '#!/bin/bash\n[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "$*"\n'
    for name, script in (("srun", SRUN), ("scontrol", scontrol), ("cmtrain", RANK)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "12345", "SLURM_NTASKS": "16"}
    slurm |= {
        "SLURM_NTASKS_PER_NODE": "8",
        "CODE": str(code),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", SBATCH, "--config", "a b.yaml"],
        env=os.environ | slurm,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout == f"9 1 16 8 node7 22345 --config a b.yaml\n{printed}"


def needed_by(extras):
    """Return the names of all installed packages that cmtrain with these extras needs."""
    found, waiting = set(), [Requirement(f"cmtrain[{','.join(extras)}]")]
    while waiting:
        requirement = waiting.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in found:
            continue
        try:
            distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        found.add(key)
        waiting += [
            needed
            for needed in map(Requirement, distribution.requires or ())
            if needed.marker is None
            or any(needed.marker.evaluate({"extra": extra}) for extra in key[1] | {""})
        ]
    return {name for name, _ in found}


def test_the_image_leaves_out_what_only_development_needs():
    """The lock files do not show which package needs which; the Dockerfile lists those to leave out."""
    try:
        metadata.distribution("cmtrain")
    except metadata.PackageNotFoundError:
        pytest.skip("what cmtrain needs is known where it is installed")
    dockerfile = (DOCKER / "Dockerfile").read_text().replace("\\\n", "")
    left_out = set(re.search('^ARG DEV="(.*)"$', dockerfile, re.MULTILINE)[1].split("|"))
    needed = needed_by({"demo", "cuda130"})
    assert not left_out & needed
    assert (needed_by({"demo", "cuda130", "dev"}) - needed) - left_out <= {
        "attrs"
    }  # which DALI 1.34 needs, too
    for lock in ROOT.glob("requirements*.lock"):
        assert left_out <= set(re.findall("^([a-z0-9-]+)==", lock.read_text(), re.MULTILINE)), lock.name
