"""Test a step on a GPU: no synchronisation, CUDA graphs, overflow in fp16. Skips itself without one."""

import pytest
import torch
from guard import no_host_sync
from helpers.gpu import batches, make_learner

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from torch._dynamo.utils import counters

import cmtrain.models  # noqa: F401

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_step_never_synchronises_with_the_host(opt, precision):
    learner, stream = make_learner(opt, precision), batches(precision == "fp16")
    for step in range(3):
        learner.step(stream, step, 1e-3)
    torch.cuda.synchronize()
    with no_host_sync():
        for step in range(3, 6):
            learner.step(stream, step, 1e-3)
    report = learner.report(6, 0, 1e-3, reset=True)
    assert report.loss == report.loss
    assert report.bad_steps_in_a_row < 6


@pytest.mark.parametrize("accumulation", [1, 2])
def test_cuda_graphs_train_as_the_compiled_model_does_and_are_replayed(accumulation):
    def losses_after(compile_mode):
        counters.clear()
        learner = make_learner("sgd", "bf16", compile_mode, accumulation)
        stream, losses = batches(fp16=False), []
        for step in range(12):
            learner.step(stream, step, 1e-3)
            losses.append(learner.report(step, 0, 1e-3, reset=True).loss)
        with torch.inference_mode():  # evaluation in between, by another graph
            assert learner.model.eval()(next(stream).images).isfinite().all()
        learner.model.train()
        learner.step(stream, 12, 1e-3)
        assert learner.report(12, 0, 1e-3, reset=True).bad_steps == 0
        return torch.tensor(losses)

    compiled = losses_after("default")
    graphs = losses_after("reduce-overhead")
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] > 0
    torch.testing.assert_close(graphs, compiled, rtol=0.02, atol=0)


def test_an_overflow_in_fp16_changes_nothing_but_the_scale():
    learner, stream = make_learner(), batches()
    for step in range(4):
        learner.step(stream, step, 1e-3)
    learner.report(4, 0, 1e-3, reset=True)
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    scale = learner.accelerator.scaler.get_scale()

    def poisoned():
        for images, labels, indices in batches():
            yield type(next(stream))(images * float("inf"), labels, indices)

    learner.step(poisoned(), 4, 1e-3)
    for key, value in learner.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert learner.accelerator.scaler.get_scale() == scale / 2
    assert int(learner.guard.bad_steps_in_a_row) == 1


def test_fp16_learns():
    learner, stream = make_learner(), batches()
    for step in range(10):
        learner.step(stream, step, 1e-3)
    first = learner.report(10, 0, 1e-3, reset=True).loss
    for step in range(10, 80):
        learner.step(stream, step, 1e-3)
    learner.report(80, 0, 1e-3, reset=True)
    for step in range(80, 90):
        learner.step(stream, step, 1e-3)
    assert learner.report(90, 0, 1e-3, reset=True).loss < first
