"""Test that another model than CMT takes the same path: guard, EMA, evaluation, export."""

import json

import pytest
import torch
from helpers.runs import ROOT, Forked
from helpers.tools import need

from cmtrain.commands.bench.models import with_model
from cmtrain.config.load import load_config
from cmtrain.errors import ConfigError
from cmtrain.storage.checkpoint import load_newest
from cmtrain.storage.weights import fit
from cmtrain.training import build

POISONED = str(ROOT / "tests" / "helpers" / "poisoned_train.py")


def after(job, verb, *arguments):
    process = Forked(["cmtrain", verb, "runs/job", *arguments], job.folder, {}, 1)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out)


def test_resnet18_goes_all_the_way(make_job):
    need("nvidia.dali")
    job = make_job(
        run={"name": "job", "seed": 1}, model={"name": "resnet18"}, mixing={"mixup": 0, "cutmix": 0}
    )
    result = job("--max-steps", "8", module=POISONED, POISON_STEPS="3", POISON_RANK="0")
    assert job.log()[-1]["bad_steps"] == 1
    state = load_newest(job.run / "checkpoints").state
    assert all(t.isfinite().all() for kind in ("model", "ema") for t in state[kind].values())
    model, ema = after(job, "eval")["results"]
    assert (model["top1"], ema["top1"]) == pytest.approx((result["top1"], result["ema_top1"]))
    exported = after(job, "export", "--out", "out")
    assert exported["max_difference"]["timm"] <= 1e-5
    config = json.loads((job.folder / "out" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("resnet18", 3)
    assert "cmtrain  # registers" not in (job.folder / "out" / "README.md").read_text()
    size = "--data.image_px", "64", "--data.eval_resize_px", "72"
    job("--run.name", "more", "--model.init_from", "out", *size, "--max-steps", "1")
    assert "model.init_from: model weights of " in job.stderr.read_text()


def test_a_model_of_one_size_is_built_for_the_images():
    size = [("data.image_px", "64"), ("data.eval_resize_px", "64")]
    config = load_config("configs/demo.yaml", [("model.name", "vit_tiny_patch16_224"), *size]).config
    model = build.make_model(config, 10)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_options_of_cmt_are_refused_for_it_all_in_one_line_each():
    options = {
        "variant": "reimpl",
        "absolute_position": "true",
        "qkv_bias": "false",
        "attn_drop_rate": "0.1",
    }
    overrides = [("model.name", "resnet18"), *((f"model.{key}", value) for key, value in options.items())]
    with pytest.raises(ConfigError) as caught:
        load_config("configs/demo.yaml", overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(options)
    assert all("is an option of CMT only, and does not fit model.name (resnet18)" in line for line in lines)
    both = load_config("configs/full_in1k.yaml").config
    build.make_model(with_model(both, "resnet18"), 10)  # the bench takes another model as it comes


def test_its_head_is_replaced_by_the_name_timm_gives_it():
    config = load_config("configs/demo.yaml", [("model.name", "resnet18")]).config
    old, new = build.make_model(config, 10), build.make_model(config, 4)
    assert fit(new, old.state_dict(), keeps_head=False) == [
        "new classifier head: 4 classes (the weights have 10)"
    ]
    assert torch.equal(new.conv1.weight, old.conv1.weight)


@pytest.mark.parametrize(("name", "refusal"), [
    ("twins_svt_small", "model: twins_svt_small: img_size (11, 11) should be divided by patch_size"),
    ("efficientformer_l1", "data.image_px: efficientformer_l1 does not take images of 176 px: "),
])  # fmt: skip
def test_a_side_that_a_model_does_not_take_is_refused_in_one_line(make_job, name, refusal):
    job = make_job(model={"name": name}, data={"image_px": 176, "eval_resize_px": 176})
    job(code=2)
    assert job.stderr.read_text().splitlines()[-1].startswith(refusal)
