"""A student learns from a trained run as well (`distill.teacher`)."""

import hashlib

import pytest
from helpers.runs import assert_same_state, losses


def digests(folder):
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def teacher(make_job):
    job = make_job("teacher", run={"name": "job"}, data={"image_px": 64, "eval_resize_px": 64})
    job("--max-steps", "6")
    return job


def test_a_teacher_changes_the_loss_and_is_not_changed_itself(make_job, teacher):
    before = digests(teacher.run)
    plain, student, other = (make_job(name, run={"name": "job"}) for name in ("plain", "student", "other"))
    how = ("--distill.teacher", str(teacher.run), "--distill.weight", "0.7")
    plain("--max-steps", "6")
    student("--max-steps", "6", *how)  # its tables are resized: the student's images are smaller
    notes = student.stderr.read_text()
    assert "distill.teacher: " in notes
    assert "position tables resized" in notes
    other("--max-steps", "3", *how)
    other("--max-steps", "6", *how)  # goes on with the same teacher
    assert losses(student) != losses(plain)
    assert_same_state(student, other)
    assert digests(teacher.run) == before
    other("--max-steps", "7", code=2)
    assert "distill.teacher: " in other.stderr.read_text()  # it is a part of the recipe


def test_a_teacher_of_other_classes_or_none_is_refused_in_one_line(make_job, teacher, tmp_path):
    student = make_job("student", run={"name": "job"}, model={"num_classes": 5})
    student("--distill.teacher", str(teacher.run), code=2)
    assert f"distill.teacher: {teacher.run}: head.weight is " in student.stderr.read_text()
    student = make_job("unknown", run={"name": "job"})
    student("--distill.teacher", "resnet51", code=2)
    assert "distill.teacher: resnet51: model.pretrained: no weights resnet51" in student.stderr.read_text()
    student("--distill.teacher", "resnet18", code=2)
    assert "distill.teacher: resnet18: it has 1000 classes, and the data 3" in student.stderr.read_text()
    assert not (student.run / "checkpoints").exists()
