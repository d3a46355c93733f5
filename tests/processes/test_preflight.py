"""Ranks that do not fit together are refused in one line that names hosts; nothing is written."""

import pytest
from helpers.runs import ROOT, after_start

from cmtrain.processes.preflight import Facts, clock_warnings, contradictions, version_of_code

FAULTY = str(ROOT / "tests" / "helpers" / "faulty_train.py")


def facts(host, offset=0.0, code="code"):
    return Facts(host, code, {"optim.lr": 0.1}, clock_offset_seconds=offset)


FITTING = [facts("a"), facts("a", 0.3), facts("b", -0.4)]


@pytest.mark.parametrize(
    ("odd", "line"),
    [
        ({"ODD_CLOCK": "60"}, "the clock of elsewhere is 60."),
        ({"ODD_CLOCK": "-60"}, " s ahead of that of elsewhere; set them by NTP"),
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
    assert clock_warnings(FITTING) == []


def test_the_clocks_of_two_hosts():
    for seconds, warned, refused in ((0.5, 0, 0), (1.5, 1, 0), (-4.0, 1, 0), (5.5, 1, 1), (-61.0, 1, 1)):
        ranks = [*FITTING, facts("c", seconds)]
        assert (len(clock_warnings(ranks)), len(contradictions(ranks))) == (warned, refused), seconds
    # One host has one clock: what differs is how long its ranks took to answer.
    assert contradictions([facts("a"), facts("a", 9.0)]) == []


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
