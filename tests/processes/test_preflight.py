"""Ranks that do not fit together are refused in one line that names hosts; nothing is written."""

import pytest
from helpers.runs import ROOT, after_start

from cmtrain.processes.preflight import Facts, contradictions, version_of_code

FAULTY = str(ROOT / "tests" / "helpers" / "faulty_train.py")


def facts(host, code="code"):
    return Facts(host, code, {"optim.lr": 0.1})


FITTING = [facts("a"), facts("a"), facts("b")]


@pytest.mark.parametrize(
    ("odd", "line"),
    [
        ({"ODD_OPTION": "--optim.lr=1e-3"}, "optim.lr is 0.001 for rank 1 on "),
        ({"ODD_FOLDER": "/"}, "run.dir must be on a file system that all hosts share"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(make_job, odd, line):
    job = make_job()
    job("--nproc", "2", module=FAULTY, WARM="1", code=3, **odd)
    (refusal,) = after_start(job.stderr.read_text())
    assert line in refusal
    assert not (job.folder / "runs").exists()


def test_what_fits_fits():
    assert contradictions(FITTING) == []


def test_other_code_is_named():
    (line,) = contradictions([*FITTING, facts("c", code="other code")])
    assert line == "rank 3 on c runs other code, rank 0 on a code; install the same everywhere"


def test_the_version_is_that_of_every_source_file(tmp_path, monkeypatch):
    before = version_of_code()
    assert before == version_of_code()
    (tmp_path / "a.py").write_text("a = 1")
    monkeypatch.setattr("pipelines.__file__", str(tmp_path / "__init__.py"))
    one = version_of_code()
    (tmp_path / "a.py").write_text("a = 2")
    assert len({before, one, version_of_code()}) == 3
