"""A run never starts from scratch silently, and never from a checkpoint that is not its own."""

import json
from dataclasses import asdict

import pytest
import torch
from helpers.mini import Mini, assert_same, batch, make_learner, snapshot
from helpers.runs import flip

from cmtrain.config.load import load_config
from cmtrain.errors import ConfigError
from cmtrain.step.evaluate import Evaluation
from cmtrain.step.measure import StepReport
from cmtrain.storage.checkpoint import Loaded, checkpoint_path, checkpoint_steps, save_checkpoint
from cmtrain.storage.run_folder import RunLock
from cmtrain.training.resume import choose_start, restore
from cmtrain.training.saver import Saver
from pipelines.spec import DataError

CONFIG = load_config("configs/demo.yaml").config
REPORT = asdict(StepReport(1, 0, 0.0, 0.0, 0.0, 1.0, 0, 0, 0, 0, 0))
META = {
    "config": CONFIG.model_dump(mode="json"),
    "fingerprint": "f",
    "report": REPORT,
    "best_top1": 0,
    "best_step": -1,
}


def save(run, step, **changes):
    state = {"progress": {"step": step}} | changes.pop("state", {})
    return save_checkpoint(run / "checkpoints", step, state, META | changes)


def start(run, resume="auto", config=CONFIG, fingerprint="f", val="v"):
    lock = RunLock(run)
    try:
        return choose_start(lock, resume, config, fingerprint, val)
    finally:
        lock.close()


def refusal(*arguments, error=DataError, **options):
    with pytest.raises(error) as caught:
        start(*arguments, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_from_scratch_and_from_the_newest(tmp_path):
    assert start(tmp_path / "run").checkpoint is None
    assert not (tmp_path / "run").exists()
    save(tmp_path / "run", 3)
    save(tmp_path / "run", 7)
    assert start(tmp_path / "run").step == 7


def test_nothing_usable_is_refused_until_from_scratch_is_asked_for(tmp_path):
    flip(save(tmp_path, 3) / "state.safetensors")
    for _ in range(2):
        line = refusal(tmp_path)
        assert "no usable checkpoint in" in line
        assert "--resume never" in line
    assert start(tmp_path, "never").checkpoint is None
    save(tmp_path, 5)
    assert start(tmp_path).step == 5


def test_checkpoints_that_are_gone_are_missed(tmp_path):
    saved = "runs/a/checkpoints/step-000000007"
    (tmp_path / "status.json").write_text(
        json.dumps({"state": "preempted", "step": 7, "resume_from": saved})
    )
    (note,) = start(tmp_path).notes
    assert note == f"{saved}, which an earlier start saved, is gone: training begins from scratch"
    save(tmp_path, 7)
    assert start(tmp_path).notes == ()


def test_a_damaged_newest_is_told(tmp_path):
    save(tmp_path, 3)
    flip(save(tmp_path, 7) / "state.safetensors")
    chosen = start(tmp_path)
    assert chosen.step == 3
    assert "step-000000007" in chosen.notes[0]


def test_another_run_is_read_and_not_changed(tmp_path):
    other = tmp_path / "other"
    save(other, 3)
    flip(save(other, 7) / "state.safetensors")
    assert start(tmp_path / "run", str(other)).step == 3
    assert checkpoint_steps(other / "checkpoints") == [3, 7]
    assert not (other / ".lock").exists()
    assert start(tmp_path / "run", str(checkpoint_path(other / "checkpoints", 3))).step == 3
    for missing in (tmp_path / "nowhere", checkpoint_path(other / "checkpoints", 7)):
        assert refusal(tmp_path / "run", str(missing)).startswith(f"--resume {missing}: ")
    assert not (tmp_path / "run").exists()


def test_another_recipe_or_other_data(tmp_path):
    save(tmp_path, 3)
    other = load_config("configs/demo.yaml", [("optim.lr", "1e-3"), ("checkpoint.keep", "9")]).config
    line = refusal(tmp_path, config=other, error=ConfigError)
    assert "optim.lr: " in line
    assert "keep" not in line
    assert "the training images or class weights (fingerprint) changed" in refusal(
        tmp_path, fingerprint="g", error=ConfigError
    )
    assert start(tmp_path, "force", config=other).step == 3


def test_other_validation_images_are_reported_and_begin_a_new_search_for_the_best(tmp_path):
    save(tmp_path, 3, val_fingerprint="v", best_top1=0.9, best_step=2)
    assert start(tmp_path).notes == ()
    found = start(tmp_path, val="w")
    (note,) = found.notes
    assert note.startswith("the validation images or classes are others than at step-000000003: ")
    for val, best in (("v", (0.9, 2)), ("w", (0.0, -1))):
        saver = Saver(tmp_path, None, keep=1)
        saver.resume(found.checkpoint.meta, val)
        assert saver.best == best
        saver.close()


def test_the_best_checkpoint_is_the_best_by_the_measure_that_was_asked_for(tmp_path):
    def evaluation(top1, balanced, loss):
        images = [50, 50]
        return Evaluation(top1, 1.0, loss, 100, 0, images, [round(50 * balanced)] * 2, images)

    first, second = {"model": evaluation(0.9, 0.5, 1.0)}, {"model": evaluation(0.8, 0.7, 2.0)}
    for measure, best in {"top1": (0.9, 3), "balanced": (0.8, 6), "f1": (0.8, 6), "loss": (0.9, 3)}.items():
        saver = Saver(tmp_path, None, keep=1, measure=measure)
        assert saver.is_best(first, 3)
        assert saver.is_best(second, 6) == (best[1] == 6)
        assert saver.best == best
        meta = {"best_top1": best[0], "best_step": best[1], "best_score": {measure: saver.score}}
        saver.close()
        for other in ("top1", "balanced", "f1", "loss"):  # by another measure the search begins again
            resumed = Saver(tmp_path, None, keep=1, measure=other)
            resumed.resume(meta, "v")
            assert resumed.best == (best if other == measure else (0.0, -1))
            resumed.close()


def test_the_same_recipe_in_other_ways(tmp_path):
    """A checkpoint of a version that did not know a key yet, and a run on hardware that has other
    kernels.
    """
    older = CONFIG.model_dump(mode="json")
    del older["model"]["init_from"], older["data"]["mean"]
    save(tmp_path, 3, config=older)
    other = load_config(
        "configs/demo.yaml",
        [
            ("model.ffn_kernel", "eager"),
            ("train.compile", "true"),
            ("train.compile_mode", "reduce-overhead"),
        ],
    ).config
    assert start(tmp_path, config=other).step == 3
    other = load_config("configs/demo.yaml", [("data.mean", "[0, 0, 0]")]).config
    assert "data.mean: " in refusal(tmp_path, config=other, error=ConfigError)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": None}, {"config": {"run": 3}}, {"config": []}, {"report": {}},
        {"report": REPORT | {"x": 1}},
        {"report": None}, {"state": {"progress": {}}}, {"state": {"progress": {"step": -1}}},
        {"state": {"progress": {"step": "3"}}}, {"state": {"progress": []}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("resume", ["auto", "force"])
def test_a_checkpoint_of_nobodys_run(tmp_path, changes, resume):
    save(tmp_path, 3, **changes)
    assert "no checkpoint of a run" in refusal(tmp_path, resume)


def trained(num_blocks=1):
    torch.manual_seed(0)
    learner = make_learner("adamw", model=Mini(num_blocks))
    for step in range(2):
        learner.step(iter([batch(step)]), step, 0.01)
    return learner


def misfit(state, tmp_path):
    learner = make_learner("adamw")
    with pytest.raises(ConfigError) as caught:
        restore(learner, Loaded(tmp_path, state, {}))
    line = str(caught.value)
    assert "\n" not in line
    return line.removeprefix(f"{tmp_path} does not fit this model: ")


def test_what_fits_is_restored(tmp_path):
    state = trained().state_dict()
    learner = make_learner("adamw")
    restore(learner, Loaded(tmp_path, state, {}))
    assert_same(snapshot(learner), snapshot(trained()))


def test_another_architecture_is_named_by_its_first_tensor(tmp_path):
    line = misfit(trained(num_blocks=0).state_dict(), tmp_path)
    assert line.startswith("model blocks.0.0.weight is missing in the checkpoint")
    state = trained().state_dict()
    state["model"]["head.weight"] = torch.zeros(7, 5)
    assert "model head.weight is (7, 5) in the checkpoint and (4, " in misfit(state, tmp_path)
    state = trained().state_dict()
    state["ema"]["extra"] = torch.zeros(1)
    assert misfit(state, tmp_path) == "ema extra is (1,) in the checkpoint and missing in the model"
    del state["ema"]
    assert misfit(state, tmp_path) == "it has no ema weights"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda o: o["state"][0].update(exp_avg=torch.zeros(9, 9, 9)), "optimizer exp_avg 0 is (9, 9, 9)"),
        (
            lambda o: o["state"].update({10**6: {"exp_avg": torch.zeros(1)}}),
            "its optimizer state is not one",
        ),
        (lambda o: o["state"].update({0: 3}), "its optimizer state is not one"),
        (lambda o: o.update(state=[]), "its optimizer state is not one"),
        (lambda o: o.clear(), "its optimizer state is not one"),
        (lambda o: o.update(param_groups=[]), "ValueError"),
    ],
)
def test_an_optimizer_state_that_torch_would_take(tmp_path, damage, problem):
    """The fused kernels trust the shapes of what they are given."""
    state = trained().state_dict()
    damage(state["optimizer"])
    assert misfit(state, tmp_path).startswith(problem)


def test_a_state_without_its_parts(tmp_path):
    for part in ("guard", "window", "model"):
        state = trained().state_dict()
        del state[part]
        misfit(state, tmp_path)
