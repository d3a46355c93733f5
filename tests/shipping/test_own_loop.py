"""Train by the loop of examples/own_loop.py, and count a loader's batches."""

import runpy

import pytest
from helpers.runs import ROOT

from pipelines.files.demo_images import demo_folder
from pipelines.files.manifest import Manifest
from pipelines.loader import eval_loader, train_loader
from pipelines.plan import Plan
from pipelines.spec import AugmentSpec, EvalSpec


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return demo_folder("digits", tmp_path_factory.mktemp("cache"))


def test_the_loop_learns(digits):
    train = runpy.run_path(str(ROOT / "examples" / "own_loop.py"))["train"]
    accuracies = list(train(str(digits), image_px=32, epochs=3))
    assert len(accuracies) == 3
    assert accuracies[-1] > 0.5  # one of ten classes is right by chance


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
def test_a_loader_knows_its_number_of_batches(digits, rank, world):
    images = Manifest.from_folder(digits / "val")
    plan = Plan(0, len(images), 48, 8)
    batches = train_loader(images, plan, AugmentSpec(32), rank=rank, world=world)
    whole = eval_loader(images, EvalSpec(32, 32), rank=rank, world=world, batch_size=50)
    for loader in (batches, whole):
        assert len(loader) == sum(1 for _ in loader.epoch(0)) > 1
        loader.close()
