"""A run is what its recipe gives, or `cmtrain verify` says what is not."""

import json
import shutil

import pytest
from helpers.runs import Forked, after_start


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
    assert found["receipt"].startswith("receipt.json has 10 digests")
    assert lines[-1].endswith("what its recipe gives, as far as it was taken again")


def receipt_agrees(job):
    """Make the receipt of what is there now, as who edits a record could."""
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


def test_a_run_that_goes_on_has_no_receipt_until_its_end(job, make_job):
    receipt = job.run / "receipt.json"
    assert json.loads(receipt.read_text())["code"].startswith("cmtrain ")
    receipt.unlink()
    found, _ = verify(job)
    assert found["receipt"] == "no receipt.json, which a run writes at its end"
    _, lines = verify(make_job("none"), code=3)
    assert "no run" in lines[0]
