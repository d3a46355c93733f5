"""`cmtrain verify` compares a run with its receipt and with what its recipe gives."""

import json
import shutil

import pytest
from helpers.runs import Forked, after_start

from cmtrain.storage.checkpoint import load_checkpoint, save_checkpoint


def verify(job, *arguments, code=0):
    command = ["cmtrain", "verify", str(job.run), "--segments", "9", "--json", *arguments]
    process = Forked(command, job.folder, {}, 1)
    out, err = process.communicate()
    assert process.returncode == code, err
    return json.loads(out) if out else {}, after_start(err)


@pytest.fixture
def job(make_job):
    job = make_job(run={"name": "job"}, checkpoint={"every_steps": 4, "keep": 9})
    job("--max-steps", "7")
    job("--max-steps", "13")  # log points at even steps, and one at the end of each part
    return job


def test_a_true_run_passes_bit_for_bit(job):
    found, lines = verify(job, "--tolerance", "0")
    assert found["wrong"] == []
    assert found["stretches"] == [[0, 4], [4, 6], [6, 7], [7, 8], [8, 12], [12, 13]]
    assert found["receipt"].startswith("receipt.json has 11 digests")
    assert lines[-1].endswith("13 of 13 steps taken again: what its recipe gives")


def receipt_agrees(job):
    """Write a receipt of what is there now, as a person who edits a record could."""
    from cmtrain.storage.run_folder import hashes

    path = job.run / "receipt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": hashes(job.run)}))


@pytest.mark.parametrize("covers_up", [False, True])
def test_an_edited_log_is_found(job, covers_up):
    path = job.run / "log.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[4])
    assert record["step"] == 8  # in the middle of the run
    lines[4] = json.dumps(record | {"loss": record["loss"] - 0.001})
    path.write_text("\n".join(lines) + "\n")
    if covers_up:
        receipt_agrees(job)
    found, _ = verify(job, code=5)
    assert ("log.jsonl: not as at the end of the run" in found["wrong"]) is not covers_up
    assert f"steps 8 to 8: loss of step 8 is {record['loss'] - 0.001} in log.jsonl" in found["wrong"][-1]


@pytest.mark.parametrize("covers_up", [False, True])
def test_a_swapped_checkpoint_is_found(job, make_job, covers_up):
    other = make_job("other", run={"name": "job", "seed": 2}, checkpoint={"every_steps": 4, "keep": 9})
    other("--max-steps", "8")
    place = "checkpoints/step-000000008"
    shutil.rmtree(job.run / place)
    shutil.copytree(other.run / place, job.run / place)
    if covers_up:
        receipt_agrees(job)
    found, _ = verify(job, code=5)
    assert (f"{place}/manifest.json: not as at the end of the run" in found["wrong"]) is not covers_up
    assert any(line.startswith("steps 8 to 8: step-000000008: ") for line in found["wrong"])


def test_an_edited_configuration_is_found(job):
    path = job.run / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.002", "lr: 0.003"))
    receipt_agrees(job)
    found, _ = verify(job, code=5)
    assert found["wrong"][0].startswith("config.yaml is not the recipe of step 13: optim.lr")


FAILS = """
import os

import timm
from timm.models import register_model


@register_model
def failing(**options):
    model = timm.create_model("cmt_micro", **{k: v for k, v in options.items() if "pretrained" not in k})
    steps = []

    def count(*_):
        steps.append(1)
        if model.training and len(steps) > int(os.environ.get("STEPS", "999")):
            raise RuntimeError("a failure in a step")

    model.register_forward_pre_hook(count)
    return model
"""


def test_a_run_that_did_not_end_has_no_receipt(make_job):
    job = make_job(run={"name": "job", "imports": ["failing"]}, model={"name": "failing"})
    (job.folder / "failing.py").write_text(FAILS)
    receipt = job.run / "receipt.json"
    job("--max-steps", "6")
    assert json.loads(receipt.read_text())["code"].startswith("cmtrain ")
    job("--max-steps", "9", code=1, STEPS="4")
    assert not receipt.exists()
    found, _ = verify(job)
    assert found["receipt"] == "no receipt.json, which a run writes at its end"
    _, lines = verify(make_job("none"), code=3)
    assert "no run" in lines[0]


def kept(make_job, **sections):
    return make_job(run={"name": "job"}, checkpoint={"every_steps": 4, "keep": 9}, **sections)


def test_each_part_of_a_run_is_compared_as_it_was_trained(make_job):
    """With two ranks, then one; with another split, log interval and guard, all of which may change."""
    job = kept(make_job)
    job("--max-steps", "7", nproc=2)
    changes = ["--train.log_every_steps", "3", "--train.max_batch_per_gpu", "4"]
    changes += ["--guard.lr_backoff", "0.3"]
    job("--max-steps", "10", *changes)
    found, lines = verify(job)
    assert found["wrong"] == []
    assert found["stretches"] == [[0, 4], [4, 6], [6, 7], [7, 8], [8, 10]]
    assert "differences of 2% are allowed: the run had several ranks" in lines
    assert lines[-1] == f"{job.run}: 10 of 10 steps taken again: what its recipe gives"


def test_what_spans_a_start_is_left_out(make_job):
    """Only one checkpoint is kept; a forced recipe came in the middle of what is left."""
    job = make_job(run={"name": "job"}, checkpoint={"every_steps": 4, "keep": 1})
    job("--max-steps", "5")
    job("--max-steps", "13", "--resume", "force", "--optim.lr", "1e-3")
    found, lines = verify(job)
    assert found["wrong"] == []
    assert any("are left out: the run was started again in it" in line for line in lines)
    assert sum(end - begin for begin, end in found["stretches"]) < 13


def test_another_weight_decay_by_force_is_one(make_job):
    job, other = kept(make_job), make_job("other", run={"name": "job"}, checkpoint={"every_steps": 4})
    for each, forced in ((job, ("--resume", "force", "--optim.weight_decay", "5.0")), (other, ())):
        each("--max-steps", "4")
        each("--max-steps", "8", *forced)
    assert job.log()[1]["loss"] == other.log()[1]["loss"]
    assert job.log()[3]["weight_norm"] < other.log()[3]["weight_norm"] - 0.1
    verify(job)


def test_a_forged_average_is_found_where_sums_differ(make_job):
    job = kept(make_job)
    job("--max-steps", "8", nproc=2)
    loaded = load_checkpoint(job.run / "checkpoints" / "step-000000008")
    for tensor in loaded.state["ema"].values():
        tensor.fill_(1)
    shutil.rmtree(loaded.path)
    save_checkpoint(loaded.path.parent, 8, loaded.state, loaded.meta)
    receipt_agrees(job)
    found, _ = verify(job, code=5)
    assert "step-000000008: ema: is " in found["wrong"][-1]


def test_an_edited_accuracy_is_found(job):
    path = job.run / "summary.csv"
    table = [line.split(",") for line in path.read_text().splitlines()]
    table[1][4] = "0.999"
    path.write_text("".join(",".join(row) + "\r\n" for row in table))
    receipt_agrees(job)
    found, _ = verify(job, code=5)
    assert "eval_top1 of step 6 is 0.999 in summary.csv, not 0." in found["wrong"][-1]


def test_an_event_hides_nothing(job):
    path = job.run / "log.jsonl"
    path.write_text(
        path.read_text().replace('"step": 8, "epoch": 1, "loss": ', '"step": 8, "epoch": 1, "loss": 1')
    )
    with open(job.run / "events.jsonl", "a") as events:
        events.write('{"time": 1, "event": "rollback", "step": 8}\n')
    receipt_agrees(job)
    found, _ = verify(job, code=5)
    assert "loss of step 8 is 1" in found["wrong"][-1]


def test_damage_is_a_finding_and_the_rest_is_checked(job):
    state = job.run / "checkpoints" / "step-000000007" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    (job.run / "checkpoints" / "step-000000012" / "manifest.json").write_text("{}")
    found, lines = verify(job, code=5)
    assert sum("step-000000007" in line for line in found["wrong"]) == 2  # it ends a stretch, and begins one
    assert any("not a manifest" in line for line in found["wrong"])
    assert lines[-1].endswith("not what it claims to be")


def test_each_part_has_its_own_log_interval_and_guard(make_job):
    """In one process, so that not one bit may differ."""
    job = kept(make_job)
    job("--max-steps", "7")
    job("--max-steps", "13", "--train.log_every_steps", "3", "--guard.spike_sigma", "1.0")
    found, _ = verify(job, "--tolerance", "0")
    assert found["wrong"] == []


BURSTS = """
import timm
import torch
from timm.models import register_model

from cmtrain.step.learner import _torch_seed

SEEDS = {_torch_seed(1, step, micro) for step in (8, 9, 10) for micro in range(4)}


@register_model
def bursting(**options):
    model = timm.create_model("cmt_micro", **{k: v for k, v in options.items() if "pretrained" not in k})
    burst = lambda module, inputs, out: out / 0 if torch.initial_seed() in SEEDS else out
    model.stem.register_forward_hook(burst)
    return model
"""


def test_a_rollback_is_left_out(make_job):
    """To go on without it gives other weights."""
    job = kept(
        make_job,
        model={"name": "bursting"},
        guard={"rollback_after_bad_steps": 2},
        train={"log_every_steps": 1},
    )
    (job.folder / "bursting.py").write_text(BURSTS)
    job("--max-steps", "17", "--run.imports", "[bursting]")
    steps = [event["step"] for event in job.events() if event["event"] == "rollback"]
    assert steps
    found, lines = verify(job)
    assert found["wrong"] == []
    assert any("are left out: it went back to an older state in it" in line for line in lines)
    assert not any(begin < step <= end for begin, end in found["stretches"] for step in steps)
    assert [16, 17] in found["stretches"]
