"""Every configuration that ships can be run: it loads, its model builds, its steps can be planned."""

import re
from pathlib import Path

import pytest
import torch

from cmtrain.config.load import load_config
from cmtrain.step.optimizer import make_optimizer
from cmtrain.training.build import make_model, plan_steps
from cmtrain.training.schedule import Schedule

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
IMAGENET = 1_281_167

# Effective learning rate, global batch, epochs with cool-down, evaluation resize, accuracy. full: section
# 4.3. paper: official README and defaults; lr = base x batch / 512, resize = int(256 / 224 * px).
# a1 to a3: arXiv 2110.00476, table 2, crop ratio 0.95. s: README of DeiT III. resnet50_v2: torchvision's
# blog. t: arXiv 2201.03545, table 5.
STATED = {
    "full_in1k": (6e-3, 4096, 300, 184, 0.75124),
    "full_in1k_224": (6e-3, 4096, 300, 256, 0.784),
    "cmt_ti": (3.2e-3, 2048, 810, 182, 0.790),
    "cmt_xs": (2.8e-3, 2048, 410, 219, 0.818),
    "cmt_s": (1e-3, 1024, 310, 256, 0.835),
    "cmt_b": (5e-4, 512, 310, 292, 0.845),
    "a1": (5e-3, 2048, 600, 235, 0.804),
    "a2": (5e-3, 2048, 300, 235, 0.798),
    "a3": (8e-3, 2048, 100, 168, None),
    "s": (4e-3, 2048, 800, 224, 0.814),
    "resnet50_v2": (0.5, 1024, 600, 182, None),
    "t": (4e-3, 4096, 300, 256, 0.821),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_configuration_loads_builds_its_model_and_plans_its_steps(path):
    config = load_config(path).config
    schedule = Schedule(
        num_samples=IMAGENET,
        world_size=8,
        global_batch_size=config.train.global_batch_size,
        max_batch_per_gpu=config.train.max_batch_per_gpu,
        lr=config.optim.lr,
        **config.schedule.model_dump(),
    )
    assert schedule.micro_batch_size * schedule.accumulation * 8 == config.train.global_batch_size
    assert schedule.lr_at(schedule.total_steps) == config.schedule.min_lr

    with torch.device("meta"):
        model = make_model(config, 1000, "meta")
        make_optimizer(model, **config.optim.model_dump(exclude={"clip_grad", "clip_mode"}))
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


# --- the re-implementation's two tables, row by row ---

PUBLISHED_TABLES = (ROOT / "tests" / "models" / "golden" / "published_tables.md").read_text()


def published_rows():
    """(file, augmentations, epochs, optimizer and options, lr, weight decay, top-1 or None) of each
    published row.
    """
    counts = {"sgd": 0, "adamw": 0}
    for line in PUBLISHED_TABLES.splitlines():
        if not line.startswith("| CMT-TINY"):
            continue
        _, augments, _, _, epochs, options, lr, _, weight_decay, top1 = (
            cell.strip() for cell in line.split("|")[1:-1]
        )
        kind = options.lower().partition("+")[0]
        counts[kind] += 1
        accuracy = None if top1 == "did not converge" else float(top1)
        name = f"{kind}_{counts[kind]:02d}"
        yield (
            name,
            set(re.split(r" ?[+] ?", augments)),
            int(epochs),
            options.lower(),
            float(lr),
            float(weight_decay),
            accuracy,
        )


REIMPL_ROWS = list(published_rows())


@pytest.mark.parametrize(
    ("name", "augments", "epochs", "options", "lr", "weight_decay", "top1"),
    REIMPL_ROWS,
    ids=[row[0] for row in REIMPL_ROWS],
)
def test_an_ablation_is_the_published_one(name, augments, epochs, options, lr, weight_decay, top1):
    config = load_config(ROOT / "configs" / "ablations" / f"{name}.yaml").config
    model, mixing, augment = config.model, config.mixing, config.augment
    assert (model.name, model.variant, config.data.image_px, config.data.fraction) == (
        "cmt_ti",
        "reimpl",
        160,
        0.2,
    )
    assert config.data.eval_resize_px == 184
    assert (config.optim.opt, config.optim.lr, config.optim.weight_decay) == (
        name.split("_")[0],
        lr,
        weight_decay,
    )
    assert (config.schedule.epochs, config.expect.top1, config.expect.diverges) == (
        epochs,
        top1,
        top1 is None,
    )
    assert config.schedule.warmup_epochs == (20 if "warmup20" in augments else 5)
    assert (augment.color_jitter, augment.rand_augment) == (
        (0.4, "reimpl") if "randaug" in augments else (None, None)
    )
    assert augment.repeats == (3 if "repsampler" in augments else 1)
    assert (mixing.mixup, mixing.cutmix) == (0.8 * ("mixup" in augments), 1.0 * ("cutmix" in augments))
    assert mixing.smoothing == 0.1 * ("labelsmoothing" in augments)
    assert (mixing.reprob, config.ema.decay) == (0, None)
    assert model.drop_path_rate == 0.1 * ("droppath" in augments)
    kind = "relative" if "rpe" in options else "pairwise" if "pe_nd" in options else "none"
    assert (model.attention_bias, model.attention_bias_scope) == (kind, None)
    assert (model.qkv_bias, model.absolute_position) == ("qkv_bias" in options, "+ape" in options)
    assert model.absolute_position_px == (184 if "ape(wrong" in options else None)


def test_every_ablation_exists_and_no_more():
    names = [row[0] for row in REIMPL_ROWS]
    assert [sum(name.startswith(kind) for name in names) for kind in ("sgd", "adamw")] == [17, 15]
    assert {path.stem for path in (ROOT / "configs" / "ablations").glob("*.yaml")} == {"base", *names}
    published = ROOT.parent / "shared" / "seed.md"
    if not published.exists():
        pytest.skip("the re-implementation's document is not here")
    figures = re.findall(r"[|] *(0[.][0-9]+|\u4e0d\u6536\u655b) *[|]\n", published.read_text())
    assert [None if figure.startswith("\u4e0d") else float(figure) for figure in figures] == [
        row[-1] for row in REIMPL_ROWS
    ]


@pytest.mark.parametrize("row", REIMPL_ROWS, ids=lambda row: row[0])
def test_arithmetic_of_an_ablation_on_eight_gpus(row):
    """512 images a GPU, 4096 a step; a fifth of ImageNet is 256,233 images, 62 whole steps an epoch."""
    name, _, epochs, _, lr, _, _ = row
    config = load_config(ROOT / "configs" / "ablations" / f"{name}.yaml").config
    schedule = plan_steps(config, num_samples=round(IMAGENET * config.data.fraction), num_processes=8)
    assert (schedule.micro_batch_size, schedule.accumulation, schedule.global_batch_size) == (512, 1, 4096)
    assert (schedule.steps_per_epoch, schedule.total_steps) == (62, 62 * epochs)
    warmup = 62 * (20 if name == "adamw_14" else 5)
    middle = (warmup + 62 * epochs) // 2
    at = {
        step: schedule.lr_at(step) for step in (0, warmup // 2, warmup, middle, 62 * epochs - 1, 62 * epochs)
    }
    assert at[0] == 1e-6
    assert at[warmup // 2] == pytest.approx(lr / 2, rel=2e-3, abs=1e-6)
    assert at[warmup] == lr
    assert at[middle] == pytest.approx(lr / 2, rel=2e-3)
    assert 0 < at[62 * epochs - 1] < 1e-6 * lr
    assert at[62 * epochs] == 0
