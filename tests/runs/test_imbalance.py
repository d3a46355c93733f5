"""Train on digits of which half of the classes have a fiftieth of the images of the others."""

import json

import pytest

from pipelines.files.demo_images import demo_folder

KEPT_OF_RARE = 3  # of some 145
RARE = "56789"
WAYS = {
    "as they come": (),
    "sampling": ("--data.sampling", "balanced"),
    "weights": ("--mixing.class_weights", "auto"),
}


@pytest.mark.slow
def test_rare_classes_are_learned_if_they_are_drawn_or_weighed_more(make_job, tmp_path, figure):
    root, lines = demo_folder("digits", tmp_path), []
    for label in sorted((root / "train").iterdir()):
        files = sorted(label.iterdir())[: KEPT_OF_RARE if label.name in RARE else None]
        lines += [f"train/{label.name}/{file.name},{label.name}\n" for file in files]
    (root / "uneven.csv").write_text("".join(lines))
    balanced = {}
    for way, more in WAYS.items():
        job = make_job(
            way.replace(" ", "-"), model={"name": "resnet18"}, mixing={"smoothing": 0.1},
            data={"root": str(root), "train_list": "uneven.csv", "image_px": 32, "eval_resize_px": 32},
            augment={"scale": [0.6, 1.0], "hflip": 0.0}, schedule={"epochs": 8, "warmup_epochs": 1},
            train={"global_batch_size": 32, "max_batch_per_gpu": 32},
        )  # fmt: skip
        job(*more, "--evaluate.best", "balanced")
        counts = json.loads((job.run / "classes.json").read_text())["weights"]["model"]
        pairs = zip(counts["correct"], counts["images"], strict=True)
        balanced[way] = sum(correct / images for correct, images in pairs) / 10
    figure(f"digits 1:50, balanced accuracy: {balanced}")
    assert balanced["sampling"] > balanced["as they come"] + 0.05
    assert balanced["weights"] > balanced["as they come"]
