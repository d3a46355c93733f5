"""The user's own modules are found beside the configuration; their source is a part of the recipe."""

import json
import os
import re
import sys

import pytest
import yaml
from helpers.runs import Forked, after_start, losses

from cmtrain.config.load import load_config
from cmtrain.errors import ConfigError
from cmtrain.training.build import import_modules

SOURCE = """
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

class Tiny(nn.Module):
    def __init__(self, num_classes=2, in_chans=3, drop_rate=0.0, drop_path_rate=0.0):
        super().__init__()
        self.num_classes = self.num_features = num_classes
        self.net = nn.Sequential(nn.Conv2d(in_chans, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Linear(8, num_classes)
    def forward(self, images):
        return self.last(self.net(images).mean((2, 3)))

default_cfgs = generate_default_cfgs({"my_tiny": {"classifier": "last", "first_conv": "net.0"}})

@register_model
def my_tiny(pretrained=False, **options):
    return build_model_with_cfg(Tiny, "my_tiny", pretrained, **options)
"""


@pytest.fixture
def path(monkeypatch):
    """Python's path, which loading a configuration changes, and the modules that it makes importable."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def own_job(make_job, source=SOURCE, name="a"):
    model = {"name": "my_tiny", "drop_path_rate": 0, "drop_rate": 0}
    job = make_job(name, run={"name": "job", "seed": 1, "imports": ["my_models"]}, model=model)
    (job.folder / "my_models.py").write_text(source)
    return job


def test_a_model_of_ones_own_goes_all_the_way(make_job, tmp_path):
    job = own_job(make_job)
    result = job("--max-steps", "2", nproc=2)
    (entry,) = yaml.safe_load((job.run / "config.yaml").read_text())["run"]["imports"]
    assert re.fullmatch("my_models@[0-9a-f]{12}", entry)
    job("--max-steps", "3")

    (job.folder / "my_models.py").write_text(f"{SOURCE}# a change")
    job("--max-steps", "4", code=2)
    (line,) = after_start(job.stderr.read_text())
    assert re.search(rf"another recipe: run.imports: .'{entry}'. -> .'my_models@[0-9a-f]+'.; ", line)

    (job.folder / "my_models.py").unlink()  # the run has its own
    process = Forked(["cmtrain", "eval", str(job.run), "--weights", "model"], tmp_path, {}, 1)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert 0 <= json.loads(out)["results"][0]["top1"] <= 1
    assert result["step"] == 2
    out, err = Forked(["cmtrain", "export", str(job.run), "--out", "o"], tmp_path, {}, 1).communicate()
    assert (tmp_path / "o" / "model.safetensors").exists(), err

    (job.run / "my_models.py").write_text("import os")
    process = Forked(["cmtrain", "eval", str(job.run)], tmp_path, {}, 1)
    _, err = process.communicate()
    assert process.returncode == 2
    assert f"run.imports: {job.run}/my_models.py is not the source that {entry} was made with" in err


FAILURES = {
    "no_such": ("import no_such", 1, "ModuleNotFoundError: No module named 'no_such'"),
    "syntax": ("import os\n\nx = (", 3, "SyntaxError: "),
    "exit": ("import sys\nsys.exit(5)", 2, "SystemExit: 5"),
    "its own": ("def f():\n    return 1 / 0\nf()", 3, "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_module_that_fails_is_refused_with_its_line(make_job, kind):
    source, number, why = FAILURES[kind]
    job = own_job(make_job, source)
    job(code=2)
    (line,) = after_start(job.stderr.read_text())
    assert line.startswith(f"{job.folder}/my_models.py:{number}: run.imports: my_models: {why}")
    assert not (job.folder / "runs").exists()


AUGMENT = """
import torch

def darker(images, seed):
    generator = torch.Generator(images.device).manual_seed(seed)
    return images * torch.rand((), generator=generator)

def smaller(images, seed):
    return images[:, :, ::2, ::2]

def forgotten(images, seed):
    images * 2
"""


def test_a_batch_is_augmented_by_ones_own_function_the_same_on_two_ranks_and_after_a_resume(make_job):
    def job_of(name, **augment):
        job = make_job(
            name, run={"seed": 1, "imports": ["my_augment"]}, augment=augment, ema={"decay": None}
        )
        (job.folder / "my_augment.py").write_text(AUGMENT)
        return job

    plain, whole, parts = (
        job_of("plain"),
        *(job_of(n, extra="my_augment:darker") for n in ("whole", "parts")),
    )
    plain("--max-steps", "4")
    whole("--max-steps", "4")
    parts("--max-steps", "2")
    parts("--max-steps", "4")
    assert losses(whole) == losses(parts) != losses(plain)

    wrong = job_of("wrong", extra="my_augment:brighter")
    wrong(code=2)
    assert "augment.extra: " in wrong.stderr.read_text()
    assert "my_augment.py has no function brighter" in wrong.stderr.read_text()
    wrong("--augment.extra", "other:darker", code=2)
    assert "augment.extra (other:darker) needs its module in run.imports" in wrong.stderr.read_text()
    wrong("--augment.extra", "my_augment:smaller", code=2)
    what = "augment.extra: gave torch.float32 (8, 3, 16, 16) for torch.float32 (8, 3, 32, 32)"
    assert what in wrong.stderr.read_text()
    wrong("--augment.extra", "my_augment:forgotten", code=2)
    assert "augment.extra: gave None for torch.float32 (8, 3, 32, 32)" in wrong.stderr.read_text()


def test_what_has_no_line_and_what_has_a_librarys_name_is_refused(path, tmp_path):
    (tmp_path / "nul.py").write_text("x = 1\0")
    (tmp_path / "json.py").write_text("x = 1")
    config = tmp_path / "a.yaml"
    config.write_text("extends: configs/demo.yaml\nrun:\n  imports: [nul]")
    with pytest.raises(ConfigError, match=r"^nul.py: run.imports: nul: SyntaxError: "):
        import_modules(load_config(config).config.run.imports)
    entries = load_config(config, [("run.imports", "[json]")]).config.run.imports
    with pytest.raises(ConfigError) as caught:
        import_modules(entries)
    assert str(caught.value) == f"run.imports: json: a library has this name; rename {tmp_path}/json.py"


def test_a_module_that_is_nowhere_is_refused_with_the_line_of_the_configuration(make_job):
    job = own_job(make_job)
    (job.folder / "my_models.py").unlink()
    number = next(n for n, line in enumerate(job.config.read_text().splitlines(), 1) if "imports:" in line)
    with pytest.raises(ConfigError) as caught:
        load_config(job.config)
    where = f"{job.config}:{number}: run.imports: no my_models.py in {job.folder} or on Python's path"
    assert str(caught.value) == where
    (job.folder / "my_models").mkdir()
    (job.folder / "my_models" / "__init__.py").write_text("")
    with pytest.raises(ConfigError, match=r"run.imports: no my_models.py in"):
        load_config(job.config)


def test_a_module_may_be_elsewhere_on_pythons_path(make_job, path, monkeypatch, tmp_path):
    job = make_job(run={"name": "job", "imports": ["my_other"]})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "my_other.py").write_text("NUMBER = 1")
    monkeypatch.syspath_prepend(elsewhere)
    (first,) = load_config(job.config).config.run.imports
    (elsewhere / "my_other.py").write_text("NUMBER = 2")
    (second,) = load_config(job.config).config.run.imports
    assert first.startswith("my_other@")
    assert first != second
    import_modules([second])
    assert sys.modules["my_other"].NUMBER == 2
    places = f"{elsewhere}:{os.environ.get('PYTHONPATH', '')}"
    job("--max-steps", "1", PYTHONPATH=places, launcher=("-m",))
    assert (job.run / "my_other.py").read_text() == "NUMBER = 2"
