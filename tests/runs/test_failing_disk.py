"""One operation on the files of a run fails: the run goes on or ends with exit code 3, and loses nothing."""

import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
from helpers.runs import ROOT, Job, assert_same_state, losses

from cmtrain.storage.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint

PROGRAM = str(ROOT / "tests" / "helpers" / "failing_disk.py")
ERRORS = {
    "open": ("ENOSPC", "EIO", "EACCES"),
    "write": ("ENOSPC", "EIO", "SHORT"),
    "fsync": ("ENOSPC", "EIO"),
    "rename": ("ENOSPC", "EIO", "EACCES"),
    "unlink": ("EIO", "EACCES"),
    "mkdir": ("ENOSPC", "EIO", "EACCES"),
}
STEPS = 3
SAMPLE = 10


class Disk:
    """Runs `job` in one folder, fresh or after a first part of the run, while operations fail."""

    def __init__(self, make_job, images: Path, tmp_path: Path, start: str) -> None:
        folder = tmp_path / "job"
        data = tmp_path / "data"
        shutil.copytree(images, data)
        (data / "train" / "bad_files.tsv").write_text("class0/none.jpg\ttruncated\tnot there\n")
        # Found by no run before this one: each scans the images, and caches the scan.
        self.job: Job = make_job(
            "job",
            data={"root": str(data), "fraction": 0.5, "cache_dir": str(folder / "cache")},
            schedule={"epochs": 1, "warmup_epochs": 0},
            train={"log_every_steps": 1},
            checkpoint={"every_steps": 1, "keep": 2},
            metrics={"enabled": True, "port": 21410},
        )
        self.before = tmp_path / "before"
        if start == "resumed":
            self.run("--max-steps", "2")
        shutil.copytree(folder, self.before)
        self.counts = self.run()
        self.undisturbed = make_job("undisturbed")
        shutil.copytree(folder / "runs", self.undisturbed.folder / "runs")

    def run(self, *arguments: str, fail: str = "none 0 EIO", codes: tuple[int, ...] = (0,)) -> dict:
        """Run the job; return how many of each operation there were."""
        count = self.job.folder / "count.json"
        environment = {"FAIL": fail, "COUNT": str(count), "WATCHED": f"{self.job.folder}:bad_files.tsv"}
        process = self.job.start(*arguments, module=PROGRAM, **environment)
        out, err = process.communicate(timeout=600)
        assert process.returncode in codes, f"{fail}: exit code {process.returncode}\n{out}\n{err}"
        assert "Traceback" not in err, f"{fail}: {err}"
        return json.loads(count.read_text()) | {"code": process.returncode}

    def plan(self) -> list[str]:
        return [
            f"{operation} {number} {error}"
            for operation, errors in ERRORS.items()
            for number, error in itertools.product(range(1, self.counts[operation] + 1), errors)
        ]

    def survives(self, fail: str) -> bool:
        """Check a run in which one operation fails, and the same command after it.

        Returns whether the first one went on; raises AssertionError if anything was lost.
        """
        shutil.rmtree(self.job.folder)
        shutil.copytree(self.before, self.job.folder)
        code = self.run(fail=fail, codes=(0, 3))["code"]
        if (self.job.run / "status.json").exists():
            status = self.job.status()
            assert status["state"] != "running", fail
            assert (status["state"] == "finished") or status["exit_code"] == code, fail
            assert code == 3 or (status["state"], status["step"]) == ("finished", STEPS), fail
        else:
            assert code == 3, fail
        checkpoints = self.job.run / "checkpoints"
        for step in checkpoint_steps(checkpoints):
            load_checkpoint(checkpoint_path(checkpoints, step))
        self.run()
        assert_same_state(self.job, self.undisturbed)
        lines = losses(self.job)
        is_lost = any(event["event"] == "record_lost" for event in self.job.events())
        assert lines == losses(self.undisturbed) or is_lost, fail
        assert set(lines) <= set(losses(self.undisturbed)), fail
        assert len(set(lines)) == len(lines), fail
        return code == 0


@pytest.mark.timeout(1200)
def test_some_of_the_operations_that_may_fail(make_job, images, tmp_path, figure):
    disk = Disk(make_job, images, tmp_path, "resumed")
    chosen = random.Random(0).sample(disk.plan(), SAMPLE)
    survived = sum(map(disk.survives, chosen))
    figure(f"failing disk, a sample: {len(chosen)} tried, {survived} survived, 0 lost")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("start", ["fresh", "resumed"])
def test_every_operation_that_may_fail(make_job, images, tmp_path, figure, start):
    disk, wrong = Disk(make_job, images, tmp_path, start), []
    plan, survived = disk.plan(), 0
    for fail in plan:
        try:
            survived += disk.survives(fail)
        except AssertionError as error:
            wrong.append(f"{fail}: {error}")
    figure(f"failing disk, {start}: {len(plan)} tried, {survived} survived, {len(wrong)} lost")
    assert not wrong, "\n".join(wrong)
