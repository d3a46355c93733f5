"""A step that runs out of memory is done again in smaller passes, by all ranks, and the run goes on."""

import math

import pytest
import torch
from helpers.mini import NUM_CLASSES, Mini, batch, make_learner
from helpers.runs import Forked, assert_same_state, losses, wait_for

from cmtrain.step.mixing import MixSpec

# Runs out of memory where a pass has more than LIMIT images: on the rank LACKS ("all": on each), from step
# FROM on, in the forward pass or, after the head's half of the gradients, in the backward pass.
HUNGRY = """
import os
import time

import timm
import torch
from timm.models import register_model

from cmtrain.step.learner import _torch_seed

LIMIT, FROM = int(os.environ.get("LIMIT", "99")), int(os.environ.get("FROM", "7"))
BEGUN = []


def is_from():
    return any(torch.initial_seed() == _torch_seed(1, FROM - 1, micro) for micro in range(8))


def need(x, where):
    if "HOLD" in os.environ and BEGUN and not is_from():
        time.sleep(600)  # in the step after, until the test kills this process
    here = os.environ.get("LACKS", "none") in ("all", os.environ.get("RANK", "0"))
    if is_from():
        BEGUN.append(FROM)
    if here and where == os.environ.get("WHERE", "forward") and BEGUN and len(x) > LIMIT:
        raise torch.OutOfMemoryError("out of memory, injected")


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.view_as(x)

    @staticmethod
    def backward(context, gradient):
        need(gradient, "backward")
        return gradient


class Hungry(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = timm.create_model("cmt_micro", **options)
        # Gradients that ranks add up before those of the rest.
        self.more = torch.nn.Linear(options["num_classes"], 300_000)

    def forward(self, x):
        if self.training:
            need(x, "forward")
        out = Backward.apply(self.inner(x))
        return out + self.more(out).mean(1, keepdim=True)


@register_model
def hungry(**options):
    return Hungry(**{name: value for name, value in options.items() if "pretrained" not in name})
"""


@pytest.fixture
def make(make_job):
    """Without mixing, whose partners are those of the larger pass; with dropout and BatchNorm."""

    def make(name):
        none = dict.fromkeys(("mixup", "cutmix", "reprob"), 0.0)
        job = make_job(
            name, run={"name": "job", "imports": ["hungry"]}, model={"name": "hungry"}, mixing=none,
            train={"max_batch_per_gpu": "auto", "log_every_steps": 1},
        )  # fmt: skip
        (job.folder / "hungry.py").write_text(HUNGRY)
        return job

    return make


def expected(make, size, nproc):
    """A run that has passes of `size` images from step 7 on."""
    job = make("expected")
    job("--max-steps", "6", nproc=nproc)
    job("--max-steps", "10", "--train.max_batch_per_gpu", str(size), nproc=nproc)
    return job


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("nproc", "lacks"), [(1, "all"), (2, "0"), (2, "1"), (2, "all")])
def test_the_step_is_done_again_in_smaller_passes(make, nproc, lacks, where):
    job, size = make("job"), 16 // nproc // 2
    job("--max-steps", "10", nproc=nproc, LIMIT=str(size), LACKS=lacks, WHERE=where)
    other = expected(make, size, nproc)
    assert losses(job) == losses(other)
    assert_same_state(job, other)
    found = [event for event in job.events() if event["event"] == "out_of_memory"]
    assert [(event["step"], event["images_per_pass"]) for event in found] == [(7, size)]
    line = f"step 7: out of memory; done again, and from now on in passes of {size} images; "
    assert line in job.stderr.read_text()


def test_passes_are_divided_until_they_fit_and_stay_so_in_the_next_process(make):
    job = make("job")
    job("--max-steps", "8", LIMIT="4", LACKS="all")
    job("--max-steps", "10", LIMIT="4", LACKS="all", FROM="9")
    other = expected(make, 4, 1)
    assert losses(job) == losses(other)
    assert_same_state(job, other)
    found = [event for event in job.events() if event["event"] == "out_of_memory"]
    assert [(event["step"], event["images_per_pass"]) for event in found] == [(7, 4)]


def test_single_images_are_the_end(make):
    job = make("job")
    job("--max-steps", "8", nproc=2, LIMIT="1", LACKS="1", code=1)
    assert job.status()["state"] == "failed"
    assert "out of memory" in job.status()["reason"]


def test_a_run_that_lacked_memory_can_be_verified(make):
    job = make("job")
    job("--max-steps", "10", LIMIT="8", LACKS="all")
    command = ["cmtrain", "verify", str(job.run), "--tolerance", "0"]
    process = Forked(command, job.folder, {}, 1)
    _, err = process.communicate()
    assert process.returncode == 0, err
    # A machine with less memory must not find another result.
    process = Forked(command, job.folder, {"LIMIT": "4", "LACKS": "all", "FROM": "1"}, 1)
    _, err = process.communicate()
    assert process.returncode == 3
    assert err.splitlines()[-1] == "out of memory: a step taken again needs as much as the run had"


def test_smaller_passes_have_the_images_and_targets_of_the_whole_batch():
    """Mixed with the partner in the whole micro-batch, with the same weight."""

    class Looks(Mini):
        def forward(self, x):
            seen.append(x.detach().clone())
            return super().forward(x)

    whole, parts = [], []
    for seen, images_per_pass in ((whole, 99), (parts, 8)):
        mixing = MixSpec(NUM_CLASSES, mixup=0.8, cutmix=1.0, smoothing=0.1, reprob=0.5)
        torch.manual_seed(0)
        learner = make_learner(model=Looks().eval(), mixing=mixing, accumulation=2)
        learner.images_per_pass = images_per_pass
        seen.clear()
        learner.step(iter([batch(0), batch(1)]), 3, 0.05)
        seen.append(torch.tensor(learner.buffer.read()[-1]))
    assert [len(images) for images in parts[:-1]] == [8, 8, 8, 8]
    for number in range(2):
        together = torch.stack(parts[2 * number : 2 * number + 2], dim=1).flatten(0, 1)
        assert torch.equal(together, whole[number])
    assert torch.allclose(parts[-1], whole[-1], rtol=1e-3)  # loss and gradient norm, in fp16


def test_memory_that_a_lost_process_lacked_is_forgotten(make):
    """Killed before a checkpoint, and done again where there is enough; the event stays in events.jsonl."""
    job, other = make("job"), make("other")
    lacking = job.start("--max-steps", "10", LIMIT="8", LACKS="all", FROM="2", HOLD="1")
    events = job.run / "events.jsonl"
    wait_for(lambda: events.exists() and '"out_of_memory"' in events.read_text(), lacking)
    lacking.kill()
    lacking.communicate()
    job("--max-steps", "10")
    other("--max-steps", "10")
    assert_same_state(job, other)
    process = Forked(["cmtrain", "verify", str(job.run), "--tolerance", "0"], job.folder, {}, 1)
    _, err = process.communicate()
    assert process.returncode == 0, err


@pytest.mark.parametrize(("size", "least"), [(17, 3), (16, 2), (3, 3)])
def test_no_pass_has_a_single_image(size, least):
    sizes = []

    class Looks(Mini):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    learner = make_learner(model=Looks())
    learner.images_per_pass = 1
    learner.step(iter([batch(0, size=size)]), 0, 0.05)
    assert (sum(sizes), max(sizes)) == (size, least)
    assert min(sizes) >= 2


@pytest.mark.parametrize("text", ["cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.", "shapes do not fit"])
def test_other_errors_are_no_lack_of_memory(text):
    class Fails(Mini):
        def forward(self, x):
            raise RuntimeError(text)

    learner = make_learner(model=Fails())
    with pytest.raises(RuntimeError, match=text.split(".")[0]):
        learner.step(iter([batch(0)]), 0, 0.05)
    assert learner.images_per_pass == math.inf


@pytest.mark.parametrize(("size", "tried"), [(16, [16, 8, 4, 2]), (17, [17, 6, 3]), (3, [3]), (2, [2])])
def test_a_model_that_never_fits_ends_the_run(size, tried):
    found = []

    class Fails(Mini):
        def forward(self, x):
            found.append(len(x))
            raise torch.OutOfMemoryError("out of memory, injected")

    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        make_learner(model=Fails()).step(iter([batch(0, size=size)]), 0, 0.05)
    assert found == tried


def test_an_error_of_the_loader_is_not_one_of_a_pass():
    def batches():
        yield batch(0)
        raise RuntimeError("the loader: out of memory")

    learner = make_learner(accumulation=2)
    with pytest.raises(RuntimeError, match="the loader"):
        learner.step(batches(), 0, 0.05)
    assert learner.images_per_pass == math.inf
