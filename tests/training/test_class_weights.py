"""Weights of the classes in the loss: from the data, or from a file, whose mistakes are named by line."""

from types import SimpleNamespace

import numpy as np
import pytest

from cmtrain.config.load import load_config
from cmtrain.training.loaders import class_weights
from pipelines.spec import DataError


class Images(SimpleNamespace):
    def __len__(self):
        return len(self.labels)

    def class_counts(self):
        return np.bincount(self.labels, minlength=len(self.class_names))


IMAGES = Images(labels=np.array([0] * 6 + [1] * 2 + [3] * 4), class_names=["a", "b, c", "none", "d"])


def weights_of(given, num_classes=4):
    config = load_config("configs/demo.yaml", [("mixing.class_weights", str(given))]).config
    return class_weights(config, IMAGES, num_classes)


def test_none_and_inverse_to_the_images():
    assert weights_of("null") is None
    weights = weights_of("auto", 6)
    assert weights == [12 / 3 / 6, 12 / 3 / 2, 1.0, 12 / 3 / 4, 1.0, 1.0]
    assert np.mean(np.array(weights)[IMAGES.labels]) == pytest.approx(1)


def test_from_a_file(tmp_path):
    file = tmp_path / "weights.csv"
    file.write_bytes('\ufeffa,0.5\r\n"b, c",2\nnone,1e-2\n\nd, 3e+0\n'.encode())
    assert weights_of(file, 5) == [0.5, 2.0, 0.01, 3.0, 1.0]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a,1\ne,1\n", ":2: not a class that has no weight yet, a comma and a number from 1e-9 to 1e9"),
        ("a,1\na,1\n", ":2: not a class"),
        ("a,0\n", ":1: not a class"),
        ("a,-1\n", ":1: not a class"),
        ("a,nan\n", ":1: not a class"),
        ("a,1e+38\n", ":1: not a class"),
        ("a,1e-46\n", ":1: not a class"),
        ("a\n", ":1: not a class"),
        ("a,1\nd,1\nnone,1\n", ": no weight for class 'b, c'"),
        ("", ": no weight for class 'a'"),
    ],
)
def test_a_mistake_in_the_file_is_named_by_its_line(tmp_path, text, line):
    file = tmp_path / "weights.csv"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        weights_of(file)
    assert f"mixing.class_weights: {file}{line}" in str(error.value)


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(DataError, match=r"none.csv: No such file or directory$"):
        weights_of(tmp_path / "none.csv")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\0")
    with pytest.raises(DataError, match=r"class_weights: .*bytes"):
        weights_of(tmp_path / "bytes")


def test_a_run_is_not_resumed_with_other_weights(make_job, tmp_path):
    job, file = make_job(), tmp_path / "weights.csv"
    arguments = "--mixing.class_weights", str(file)
    file.write_text("class0,1\nclass1,2\nclass2,3\n")
    job(*arguments, "--max-steps", "1")
    job(*arguments, "--max-steps", "2")
    file.write_text("class0,1\nclass1,2\nclass2,4\n")
    job(*arguments, "--max-steps", "3", code=2)
    assert "the training images or class weights (fingerprint) changed" in job.stderr.read_text()
