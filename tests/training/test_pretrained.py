"""Pretrained weights start a run with a new head and their own mean and std; a resume needs none of them."""

import json

import pytest
import timm
import torch
import yaml
from helpers.runs import ROOT, Forked, after_start, assert_same_state
from timm.models import PretrainedCfg

from cmtrain.config.load import load_config
from cmtrain.errors import ConfigError
from cmtrain.storage.checkpoint import checkpoint_path, load_checkpoint, load_newest
from cmtrain.training import pretrained
from cmtrain.training.pretrained import find_pretrained

HELPER = str(ROOT / "tests" / "helpers" / "pretrained_train.py")
LOOK = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "eval_interpolation": "bilinear"}
LINE = (
    "model.pretrained: resnet18.a1_in1k, data.mean (0.5, 0.5, 0.5), data.std (0.25, 0.25, 0.25), "
    "data.eval_resize_px 40, data.interpolation bilinear, data.eval_interpolation bilinear; "
    "new classifier head: 3 classes (the weights have 5)"
)


@pytest.fixture
def tuned(make_job, tmp_path):
    """A run of resnet18, and its weights; its configuration says nothing about how images are prepared."""
    torch.manual_seed(3)
    source = timm.create_model("resnet18", num_classes=5)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = {"name": "resnet18", "pretrained": True, "drop_path_rate": 0, "drop_rate": 0}

    def make(name, **sections):
        job = make_job(name, run={"name": "job", "seed": 1}, model=model, checkpoint={"every_steps": 1})
        config = yaml.safe_load(job.config.read_text())
        del config["data"]["eval_resize_px"]
        for section, values in sections.items():
            config[section] |= values
        job.config.write_text(yaml.safe_dump(config))
        return job

    return make, source, {"module": HELPER, "WEIGHTS": str(tmp_path / "w.pth")}


def test_weights_head_and_preparation_are_taken_over_and_a_resume_needs_none(tuned, tmp_path):
    make, source, how = tuned
    whole, killed = (make(name, optim={"lr": 1e-6}) for name in ("whole", "killed"))
    result = whole("--max-steps", "4", **how)
    assert LINE in whole.stderr.read_text()
    assert {
        key: yaml.safe_load((whole.run / "config.yaml").read_text())["data"][key] for key in LOOK
    } == LOOK

    killed("--max-steps", "2", **how)
    start = load_newest(killed.run / "checkpoints").state["model"]
    for name, weights in source.named_parameters():
        assert name.startswith("fc.") or torch.allclose(start[name], weights.detach(), atol=1e-5)
    assert start["fc.weight"].shape == (3, 512)
    (tmp_path / "w.pth").unlink()
    killed("--max-steps", "4")  # without the helper: timm's own preparation is another, and no hub is here
    assert "model.pretrained" not in killed.stderr.read_text()
    assert_same_state(whole, killed)
    killed("--max-steps", "4")  # nothing is left to do
    assert_same_state(whole, killed)
    (wrong,) = after_start(_refused(killed, "--max-steps", "6", "--data.mean", "[0.4, 0.4, 0.4]"))
    assert "another recipe: data.mean: [0.5, 0.5, 0.5] -> [0.4, 0.4, 0.4]; " in wrong

    process = Forked(["cmtrain", "eval", "runs/job"], whole.folder, {"HF_HUB_OFFLINE": "1"}, 1)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)["results"][0]["top1"] == pytest.approx(result["top1"])


def _refused(job, *arguments, code=2, **how):
    job(*arguments, code=code, **how)
    return job.stderr.read_text()


def test_what_the_configuration_states_stays(tuned):
    make, _, how = tuned
    job = make("stated", data={"mean": [0.1, 0.2, 0.3], "eval_resize_px": 36})
    job("--max-steps", "1", "--data.interpolation", "bicubic", **how)
    (line,) = [line for line in job.stderr.read_text().splitlines() if "model.pretrained" in line]
    assert "data.std (0.25, 0.25, 0.25), data.eval_interpolation bilinear; new" in line
    data = yaml.safe_load((job.run / "config.yaml").read_text())["data"]
    assert (data["mean"], data["eval_resize_px"]) == ([0.1, 0.2, 0.3], 36)
    assert (data["interpolation"], data["eval_interpolation"]) == ("bicubic", "bilinear")


WAYS = {"resnet18.a1_in1k": ("--nproc", "2"), "hf-hub:me/mine": ("--model.pretrained", "hf-hub:me/mine")}


@pytest.mark.parametrize("name", WAYS)
def test_a_hub_out_of_reach_is_one_line_and_no_run_folder(tuned, name):
    make, *_ = tuned
    job = make("offline")
    # Not forked: the hub's library reads the environment when it is imported.
    how = {"launcher": ("-m",), "HF_HUB_OFFLINE": "1", "HF_HOME": str(job.folder / "hub"), "code": 3}
    (line,) = after_start(_refused(job, *WAYS[name], **how))
    assert line.startswith(f"model.pretrained: {name} cannot be loaded; download ")
    assert f"{name.removeprefix('hf-hub:')}/resolve/main/model.safetensors elsewhere, and set " in line
    assert not (job.folder / "runs").exists()


def test_wrong_combinations_are_refused_with_their_place(make_job):
    job = make_job()
    line = job.config.read_text().splitlines().index("  name: cmt_micro") + 1
    with pytest.raises(ConfigError, match=r"does not fit model.name .cmt_micro.: CMT has no pretrained"):
        load_config(job.config, [("model.pretrained", "true")])
    assert load_config(job.config, [("model.pretrained", "hf-hub:me/mine")]).config.model.pretrained
    text = job.config.read_text().replace("  name: cmt_micro", "  name: cmt_micro\n  pretrained: true")
    job.config.write_text(text)
    with pytest.raises(ConfigError, match=rf"job.yaml:{line + 1}: model.pretrained: "):
        load_config(job.config)
    both = [("model.name", "resnet18"), ("model.init_from", "x.pth")]
    with pytest.raises(ConfigError, match=r"model.pretrained .true. contradicts model.init_from .x.pth."):
        load_config(job.config, both)
    with pytest.raises(ConfigError, match=r"eval_resize_px .36. must not be less than data.image_px .64."):
        load_config(job.config, [("model.name", "resnet18"), ("data.image_px", "64")])


def model(name, given):
    return load_config("configs/demo.yaml", [("model.name", name), ("model.pretrained", given)]).config.model


def test_unknown_weights_are_refused_with_those_that_there_are():
    assert find_pretrained(model("resnet18", "fb_ssl_yfcc100m_ft_in1k"))[1].startswith("resnet18.fb_ssl")
    assert find_pretrained(model("resnet18.tv_in1k", "true"))[1] == "resnet18.tv_in1k"
    with pytest.raises(ConfigError, match=r"no weights resnet18.nope; timm has a1_in1k, .*tv_in1k"):
        find_pretrained(model("resnet18", "nope"))
    without = next(name for name in timm.list_models() if not timm.list_pretrained(f"{name}.*"))
    with pytest.raises(ConfigError, match=rf"no weights {without}; timm has none"):
        find_pretrained(model(without, "true"))


def test_a_name_that_no_hub_can_have_is_refused():
    with pytest.raises(ConfigError, match=r"^model.pretrained: hf-hub:a/b/c: Repo id must be in the form "):
        find_pretrained(model("resnet18", "hf-hub:a/b/c"))


def test_a_hub_says_which_model_its_weights_are_of(monkeypatch):
    found = {"hf_hub_id": "me/mine", "source": "hf-hub", "mean": (0.1, 0.1, 0.1), "num_classes": 7}

    def holds(name, **arguments):
        monkeypatch.setattr(pretrained, "load_model_config_from_hf", lambda _: (found, name, arguments))

    holds("resnet18", img_size=64)
    cfg, name = find_pretrained(model("resnet18", "hf-hub:me/mine"))
    assert isinstance(cfg, PretrainedCfg)
    assert (cfg.mean, name) == ((0.1, 0.1, 0.1), "hf-hub:me/mine")
    holds("resnet50")
    with pytest.raises(ConfigError, match=r"model.name: resnet18, but hf-hub:me/mine has resnet50"):
        find_pretrained(model("resnet18", "hf-hub:me/mine"))
    holds("cmt_micro", variant="reimpl", qkv_bias=True)
    with pytest.raises(ConfigError, match=r"model.variant: paper, but hf-hub:me/mine has reimpl"):
        find_pretrained(model("cmt_micro", "hf-hub:me/mine"))


def test_a_damaged_file_is_refused_in_one_line(tuned, tmp_path):
    make, _, how = tuned
    (tmp_path / "w.pth").write_bytes(b"no weights")
    job = make("damaged")
    (line,) = after_start(_refused(job, code=3, **how))
    assert line.startswith(f"model.pretrained: resnet18.a1_in1k cannot be loaded; {tmp_path}/w.pth (")


def test_a_frozen_run_resumes_before_and_after_it_is_unfrozen(make_job):
    """Six steps are an epoch; on two ranks it goes through it as well."""
    model = {"freeze": "backbone", "unfreeze_epoch": 1}
    sections = {"model": model, "optim": {"layer_decay": 0.8}, "checkpoint": {"every_steps": 1, "keep": 9}}
    whole, killed, ranks = (make_job(name, run={"name": "job", "seed": 1}, **sections) for name in "abc")
    whole("--max-steps", "8")
    for steps in ("4", "6", "7", "8"):
        killed("--max-steps", steps)
    assert_same_state(whole, killed)
    ranks("--max-steps", "8", nproc=2)
    states = [load_newest(ranks.run / "checkpoints").state]
    places = [checkpoint_path(job.run / "checkpoints", n) for job in (whole, ranks) for n in (1, 6)]
    states += [load_checkpoint(place).state for place in places]
    last, *held = (state["model"] for state in states)
    backbone = [name for name in last if not name.startswith("head.")]
    assert all(torch.equal(state[name], held[0][name]) for state in held for name in backbone)
    assert not torch.equal(last["stem.conv1.weight"], held[0]["stem.conv1.weight"])
    assert not torch.equal(last["stem.norm1.running_mean"], held[0]["stem.norm1.running_mean"])
    assert not torch.equal(held[0]["head.weight"], held[1]["head.weight"])
    killed("--max-steps", "9", "--model.freeze", "[stem.*]", code=2)
    assert "model.freeze: backbone -> ['stem.*']" in killed.stderr.read_text()
    killed("--run.name", "x", "--model.freeze", "[steem.*]", code=2)
    assert "model.freeze: steem.* matches no parameter" in killed.stderr.read_text()
