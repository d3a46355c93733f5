"""Every configuration that ships can be run: it loads, its model builds, its steps can be planned."""

from pathlib import Path

import pytest
import timm
import torch

import cmtrain.models  # noqa: F401 - registers the models with timm
from cmtrain.config_file import load_config
from cmtrain.schedule import make_schedule

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
IMAGENET = 1_281_167

# Effective learning rate, global batch, epochs with cool-down, evaluation resize, accuracy.
# seed: section 4.3. paper: official README and defaults; lr = base x batch / 512, resize = int(256 / 224 * px).
STATED = {
    "full_in1k": (6e-3, 4096, 300, 184, 0.75124),
    "cmt_ti": (3.2e-3, 2048, 810, 182, 0.790),
    "cmt_xs": (2.8e-3, 2048, 410, 219, 0.818),
    "cmt_s": (1e-3, 1024, 310, 256, 0.835),
    "cmt_b": (5e-4, 512, 310, 292, 0.845),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_configuration_loads_builds_its_model_and_plans_its_steps(path):
    config = load_config(path).config
    schedule = make_schedule(
        num_samples=IMAGENET,
        world_size=8,
        global_batch_size=config.train.global_batch_size,
        max_batch_per_gpu=config.train.max_batch_per_gpu,
        lr=config.optim.lr,
        **config.schedule.model_dump(),
    )
    assert schedule.micro_batch_size * schedule.accumulation * 8 == config.train.global_batch_size
    assert schedule.lr_at(schedule.total_steps) == config.schedule.min_lr

    options = config.model.model_dump(exclude={"name", "num_classes"}) | {"img_size": config.data.image_px}
    with torch.device("meta"):
        model = timm.create_model(config.model.name, num_classes=1000, **options)
        logits = model.eval()(torch.zeros(2, 3, config.data.image_px, config.data.image_px))
    assert logits.shape == (2, 1000)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_configuration_opens_with_what_it_is_and_how_to_run_it(path):
    header = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    name = path.relative_to(ROOT).as_posix()
    assert f"--config {name}" in header
    expect = load_config(path).config.expect
    if expect.source and expect.top1 is not None:
        assert f"{100 * expect.top1:g} %" in header or f"{100 * expect.top1:.1f} %" in header


@pytest.mark.parametrize("name", STATED)
def test_recipe_is_the_one_that_its_source_states(name):
    config = load_config(next(path for path in CONFIGS if path.stem == name)).config
    found = (
        config.optim.lr,
        config.train.global_batch_size,
        config.schedule.epochs + config.schedule.cooldown_epochs,
        config.data.eval_resize_px,
        config.expect.top1,
    )
    assert found == STATED[name]
