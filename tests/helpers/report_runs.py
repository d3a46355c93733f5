"""Write run folders for the tests of the report, as a run writes them."""

import csv
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from cmtrain.config.schema import Config, to_yaml
from cmtrain.storage.run_folder import SUMMARY_COLUMNS

BEGIN = 1_790_000_000.0  # Unix time at which all of these runs began


def write_run(
    path: Path,
    *,
    num_logs: int = 200,
    log_every_steps: int = 50,
    num_classes: int = 10,
    class_names: list[str] | None = None,
    state: str = "finished",
    reason: str = "top-1 0.8012",
    events: list[dict] | None = None,
    lr: float = 4e-3,
    seed: int = 0,
    **sections: dict,
) -> Path:
    """Write a run of `num_logs` log points, 2 s each, with an evaluation at each tenth of it."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    last_step = num_logs * log_every_steps
    values = {
        "data": {"root": "/data/imagenet"},
        "optim": {"lr": lr},
        "schedule": {"epochs": 10, "warmup_epochs": 1},
    }
    values |= {"train": {"global_batch_size": 512}, "run": {"name": path.name}, "expect": {"top1": 0.79}}
    config = Config.model_validate(values | sections)
    (path / "config.yaml").write_text(to_yaml(config))

    evaluations = rng.normal(size=10)
    noise = rng.normal(size=(num_logs, 4)).round(4).tolist()
    with open(path / "log.jsonl", "w") as file:
        for index in range(1, num_logs + 1):
            done, (a, b, c, d) = index / num_logs, noise[index - 1]
            record = {
                "step": index * log_every_steps,
                "epoch": int(10 * done),
                "loss": 6.9 * math.exp(-2.2 * done**0.6) + 0.05 * a,
                "lr": lr * min(10 * done, 0.5 * (1 + math.cos(math.pi * done))),
                "grad_norm": 1.5 + math.exp(0.4 * b),
                "loss_scale": 2.0 ** (12 + int(6 * done)),
                "bad_steps": int(3 * done),
                "bad_steps_in_a_row": 0,
                "restores": int(3 * done),
                "images_per_second": 12_800 + 300 * c,
                "data_wait_ratio": 0.03 + 0.01 * abs(d),
                "time": BEGIN + 2 * index,
            }
            file.write(json.dumps(record) + "\n")
    with open(path / "summary.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, SUMMARY_COLUMNS)
        writer.writeheader()
        for epoch in range(1, 11):
            top1 = 0.8 * (1 - math.exp(-epoch / 3)) + 0.01 * evaluations[epoch - 1]
            row = {"epoch": epoch, "step": epoch * last_step // 10, "train_loss": 3.0, "lr": lr}
            row |= {"eval_loss": 4 / epoch + 0.9, "eval_top1": top1, "eval_top5": (3 + top1) / 4}
            ema = top1 * min(1, epoch / 6)
            row |= {"eval_ema_loss": 5 / epoch + 0.8, "eval_ema_top1": ema, "eval_ema_top5": (3 + ema) / 4}
            writer.writerow(row)

    started = {
        "time": BEGIN,
        "event": "started",
        "step": 0,
        "model": "cmt_ti",
        "precision": "fp16",
        "device": "cuda",
    }
    happened = [started | {"world_size": "8", "version": "0.1.0"}, *(events or [])]
    happened.append({"time": BEGIN + 2 * num_logs, "event": state, "exit_code": 0, "reason": reason})
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in happened))
    status = {"state": state, "step": last_step, "last_step": last_step, "exit_code": 0, "reason": reason}
    status |= {"updated": BEGIN + 2 * num_logs, "best_top1": 0.8, "best_step": last_step}
    (path / "status.json").write_text(json.dumps(status))
    (path / "classes.json").write_text(json.dumps(class_outcomes(num_classes, class_names, rng)))
    for name in ("augmented.png", "mistakes.png"):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path / name)
    return path


def class_outcomes(num_classes: int, names: list[str] | None, rng: np.random.Generator) -> dict:
    """Return classes.json: 50 images per class, most recognised, the others taken for a neighbour."""
    confusion = np.zeros((num_classes, num_classes), int)
    for label in range(num_classes):
        right = rng.uniform(0.6, 1.0)
        offsets = rng.normal(0, num_classes / 8, 50).round().astype(int)
        guesses = np.where(rng.uniform(size=50) < right, label, (label + offsets) % num_classes)
        np.add.at(confusion[label], guesses, 1)
    counts = {"images": confusion.sum(1).tolist(), "correct": confusion.diagonal().tolist()}
    weights = {"model": counts | {"confusion": confusion.tolist() if num_classes <= 100 else None}}
    return {"step": 1, "classes": names or [f"class {i}" for i in range(num_classes)], "weights": weights}


def eventful() -> list[dict]:
    """Return one event of everything that can go wrong, and a resume."""
    at = [{"step": step, "time": BEGIN + 2 * step / 50} for step in range(0, 10_001, 500)]
    found = "blocks.1.3.attn.proj: not finite in 5 of 64 images"
    happened = [
        at[2]
        | {"event": "bad_file", "path": "train/n01440764/x.jpg", "reason": "truncated", "kind": "truncated"}
    ]
    happened += [
        at[i] | {"event": "bad_steps", "since": 450 * i, "bad": i, "restores": 1, "loss_scale": 2.0**11}
        for i in (3, 4, 11)
    ]
    happened += [at[5] | {"event": "rollback", "good_step": 2000, "cause": found, "lr_factor": 0.25}]
    happened += [
        at[7]
        | {
            "event": "loss_spikes",
            "first_step": 3490,
            "last_step": 3500,
            "count": 2,
            "samples": list(range(99)),
        }
    ]
    happened += [at[9] | {"event": "checkpoint", "path": "checkpoints/step-000004500", "seconds": 3.2}]
    happened += [at[9] | {"event": "evaluated", "top1": 0.7, "seconds": 21.5}]
    happened += [at[12] | {"event": "checkpoint_failed", "error": "No space left on device"}]
    happened += [at[14] | {"event": "resumed", "model": "cmt_ti", "world_size": "16", "version": "0.1.0"}]
    happened += [
        at[14]
        | {"event": "environment", "host": "node-7", "torch": "2.10.0", "gpu": "NVIDIA H100 80GB HBM3"}
    ]
    return happened
