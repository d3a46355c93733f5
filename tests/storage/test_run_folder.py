"""status.json is whole at every moment, and a resumed log is the log of a run that was never killed."""

import json

from cmtrain.storage.run_folder import RunFolder, read_status


def test_status_is_merged_and_survives_a_restart(tmp_path):
    RunFolder(tmp_path / "run").status(state="running", step=3)
    RunFolder(tmp_path / "run").status(step=4)
    status = read_status(tmp_path / "run")
    assert (status["state"], status["step"]) == ("running", 4)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["status.json"]


def test_no_status_is_none(tmp_path):
    assert read_status(tmp_path) is None


def test_rewind_forgets_what_will_be_done_again(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30):
        folder.log({"step": step, "loss": step / 10})
        folder.summary({"epoch": step // 10, "step": step, "eval_top1": 0.5})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 31, "lo')  # cut short by a kill
    folder.rewind(20)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        10,
        20,
    ]
    assert [line.split(",")[1] for line in (tmp_path / "summary.csv").read_text().splitlines()] == [
        "step",
        "10",
        "20",
    ]
    folder.rewind(0)
    assert (tmp_path / "log.jsonl").read_text() == ""
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 1


def test_summary_has_timms_columns(tmp_path):
    RunFolder(tmp_path).summary(
        {"epoch": 1, "step": 5, "train_loss": 2.0, "eval_top1": 0.5, "eval_top5": 0.9, "lr": 0.1}
    )
    header = (tmp_path / "summary.csv").read_text().splitlines()[0].split(",")
    assert {"epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"} <= set(header)
