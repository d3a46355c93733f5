"""The failure of the re-implementation (its section 4.3), end to end on the demo's JPEGs."""

from helpers.runs import ROOT

HALF = str(ROOT / "tests" / "helpers" / "half_train.py")

REIMPL = {
    "data": {"root": "demo:digits", "eval_resize_px": 32},
    "model": {"drop_path_rate": 0.0, "drop_rate": 0.0},
    "augment": {"scale": [0.6, 1.0], "hflip": 0.0, "color_jitter": 0.3},
    "mixing": {"mixup": 0, "cutmix": 0, "reprob": 0, "smoothing": 0.1},
    "optim": {"opt": "sgd", "lr": 1.6, "momentum": 0.9, "weight_decay": 1e-4, "clip_grad": None},
    "schedule": {"epochs": 5, "warmup_epochs": 0},
    "train": {"global_batch_size": 64, "max_batch_per_gpu": 64, "log_every_steps": 5},
    "evaluate": {"every_epochs": 5},
    "checkpoint": {"every_epochs": 5},
    "guard": {"rollback_after_bad_steps": 10},
    "ema": {"decay": 0.9},
}


def test_the_run_that_was_lost_is_trained(make_job):
    """Without the guard every evaluation is NaN; with it the run ends nearly where one at a sane rate
    ends.
    """
    lost, saved, sane = (make_job(name, **REIMPL) for name in ("lost", "saved", "sane"))
    unguarded = lost("--guard.enabled", "false", "--max-steps", "44", module=HALF)
    assert unguarded["loss"] is unguarded["ema_loss"] is None  # NaN, of which JSON knows nothing
    assert unguarded["top1"] < 0.2  # one of ten classes

    healthy = sane("--optim.lr", "0.1", module=HALF)
    guarded = saved(module=HALF)
    rollbacks = [event for event in saved.events() if event["event"] == "rollback"]
    last = saved.log()[-1]
    print(
        f"\nSGD at 1.6 in fp16, {last['step']} steps: top-1 {guarded['top1']:.3f} "
        f"(EMA {guarded['ema_top1']:.3f}), {last['bad_steps']} bad steps, "
        f"{last['restores']} restores of BatchNorm and {len(rollbacks)} rollbacks; "
        f"at 0.1 {healthy['top1']:.3f}; without the guard NaN"
    )
    assert guarded["top1"] >= 0.95 * healthy["top1"]
    assert guarded["ema_top1"] >= 0.95 * healthy["ema_top1"]
    assert healthy["top1"] > 0.95
    assert last["restores"] == last["bad_steps"] > 0
    assert 1 <= len(rollbacks) <= 3
    assert "not finite in" in rollbacks[0]["cause"]
