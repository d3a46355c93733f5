"""The layer that overflowed first is named, with the samples it overflowed on; looking changes nothing."""

import timm
import torch
from helpers.mini import assert_same, batch, make_learner, snapshot, step

import cmtrain.models  # noqa: F401
from cmtrain.training.recovery import BadStep, find_overflow, merge_ranks


def test_a_finite_step_has_no_cause():
    learner = make_learner(accumulation=2)
    step(learner, 3)
    assert find_overflow(learner) == BadStep("", (), tuple(range(3 * 32, 4 * 32)))


def test_the_first_layer_is_named_with_the_images_that_broke_it():
    learner = make_learner(accumulation=2)
    clean, dirty = batch(0), batch(1)
    dirty.images[[2, 5]] *= 3e6
    learner.step(iter([clean, dirty]), 0, 0.05)
    before = snapshot(learner)
    found = find_overflow(learner)
    assert found.cause.startswith("stem: not finite in 2 of 16 images, largest finite value ")
    assert found.suspects == (16 + 2, 16 + 5)
    assert found.samples == tuple(range(32))
    assert_same(snapshot(learner), before)


def test_a_layer_deep_inside_a_cmt_is_named():
    learner = make_learner(model=timm.create_model("cmt_micro", num_classes=4, img_size=32))
    with torch.no_grad():
        learner.model.stages[1].embed.weight[0, 0, 0, 0] = 1e30
    learner.step(iter([batch(1, side=32)]), 0, 0.05)
    assert find_overflow(learner).cause.startswith("stages.1.embed: not finite in 16 of 16 images")


def test_a_table_that_belongs_to_no_image_is_named_without_images():
    model = timm.create_model("cmt_micro", num_classes=4, img_size=32, attention_bias="relative")
    learner = make_learner(model=model)
    name = next(name for name, _ in model.named_parameters() if name.endswith("table"))
    with torch.no_grad():
        model.get_parameter(name)[..., 0] = torch.inf
    learner.step(iter([batch(1, side=32)]), 0, 0.05)
    found = find_overflow(learner)
    assert found.cause.startswith(f"{name.removesuffix('.table')}: not finite, largest finite value ")
    assert found.suspects == ()


def test_all_ranks_together_are_one_finding():
    fine, bad = BadStep("", (), (1, 2)), BadStep("stem: not finite", (4,), (3, 4))
    assert merge_ranks([fine, bad]) == BadStep("rank 1: stem: not finite", (4,), (1, 2, 3, 4))
    assert merge_ranks([bad]) == bad
    assert merge_ranks([fine, fine]).cause == "every value of the last forward pass was finite"
