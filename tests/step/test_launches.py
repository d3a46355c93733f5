"""Test how many kernels a training step launches: counted, so a regression shows on any machine."""

import torch
from helpers.launches import launches, step_launches


def test_an_operation_on_lists_is_what_it_launches():
    small, large = [torch.empty(8)] * 100, [torch.empty(2**16, 40)] * 100
    assert launches("relu", [small[0]], 13) == 1
    assert [launches("_foreach_add_", [small, small], cuda) for cuda in (12, 13)] == [2, 1]
    assert [launches("_foreach_add_", [large, large], cuda) for cuda in (12, 13)] == [13, 2]
    assert launches("_foreach_add_", [large, [torch.empty(40, 2**16).t()] * 100], 13) == 100
    assert launches("cat", [small * 2], 13) == 2


def test_a_step_of_cmt_ti_stays_within_its_budget(figure):
    """Optimizer, EMA, guard, loss scaler, clipping and the record of the step: 60 kernels together."""
    step = step_launches(ffn_kernel="fused").by_phase()
    figure(f"kernels of a step of CMT-Ti @160: {dict(step)}, {step.total()} together")
    assert step["optimizer"] <= 60
    assert step.total() <= 1200


def test_a_further_micro_batch_adds_its_gradients_in_few_kernels(figure):
    """autograd would launch an addition a parameter."""
    one, two = (
        step_launches("cmt_micro", opt="sgd", image_px=32, accumulation=count).by_phase().total()
        for count in (1, 2)
    )
    figure(f"kernels of a step of cmt_micro with one and two micro-batches: {one}, {two}")
    assert two - one < one
