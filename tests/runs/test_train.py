"""The promises of a run, kept by the program as a user starts it: whole processes, real JPEGs."""

import csv
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from helpers.photographs import write_folder
from helpers.runs import POISONED, ROOT, assert_same_state, final_state, logged, losses, wait_for
from helpers.tools import find
from PIL import Image

from cmtrain.monitoring.metrics import STATES
from cmtrain.step.measure import PHASES
from cmtrain.storage.checkpoint import checkpoint_steps


def test_a_run_leaves_what_it_promises(make_job):
    job = make_job(
        schedule={"epochs": 6}, augment={"color_jitter": None}, mixing={"mixup": 0, "cutmix": 0, "reprob": 0}
    )
    result = job(launcher=["-m"])
    assert result["state"] == "finished"
    assert result["step"] == 36
    assert result["top1"] > 0.5  # chance is 0.33
    assert result["run_dir"] == str(job.run.relative_to(job.folder))
    status = job.status()
    assert (status["state"], status["exit_code"], status["step"]) == ("finished", 0, 36)
    assert status["result"] == result
    assert [r["step"] for r in job.log()] == list(range(2, 37, 2))
    rows = list(csv.DictReader((job.run / "summary.csv").read_text().splitlines()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[-1]["eval_top1"]) == pytest.approx(result["top1"])
    kinds = [event["event"] for event in job.events()]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert kinds.count("checkpoint") >= 6
    assert checkpoint_steps(job.run / "checkpoints")[-3:] == [24, 30, 36]
    assert (job.run / "augmented.png").read_bytes()[:4] == b"\x89PNG"
    has_mistakes = max(result["top1"], result["ema_top1"]) < 1
    assert (job.run / "mistakes.png").exists() == has_mistakes
    report = (job.run / "report.html").read_text()
    assert ("A grid of validation images with their true" in report) == has_mistakes
    assert "top-1" in job.stderr.read_text()
    # The same command again has nothing to do, and reports the same.
    again = job()
    assert again["top1"] == result["top1"]
    assert [r["step"] for r in job.log()] == list(range(2, 37, 2))
    # The stored configuration is loadable and the same run.
    stored = subprocess.run(
        [sys.executable, "-m", "cmtrain", "config", "show", "--config", str(job.run / "config.yaml")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "cmt_micro" in stored


def test_kill_9_and_the_same_command_again_is_the_run_that_was_never_killed(make_job):
    undisturbed, killed = make_job("undisturbed"), make_job("killed")
    undisturbed()
    process = killed.start("--checkpoint.every_steps", "4")
    wait_for(lambda: logged(killed, 10), process)
    process.kill()
    process.communicate()
    assert killed.status()["state"] == "running"
    killed("--checkpoint.every_steps", "4")
    assert [e["event"] for e in killed.events()].count("resumed") == 1
    assert losses(killed) == losses(undisturbed)
    assert_same_state(killed, undisturbed)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)]
)
def test_a_stop_signal_ends_with_a_checkpoint_at_that_step(make_job, number, code):
    job = make_job(schedule={"epochs": 400})
    process = job.start("--checkpoint.every_epochs", "400", "--evaluate.every_epochs", "400")
    wait_for(lambda: logged(job, 4), process)
    process.send_signal(number)
    if number == signal.SIGTERM:
        process.send_signal(number)  # launchers deliver it twice
    _, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    status = job.status()
    assert (status["state"], status["exit_code"]) == ("preempted", code)
    steps = checkpoint_steps(job.run / "checkpoints")
    assert len(steps) == 1
    assert status["resume_from"].endswith(f"step-{steps[0]:09d}")
    assert steps[0] >= 4


def test_sigterm_and_resume_lose_no_step(make_job):
    undisturbed, stopped = make_job("undisturbed"), make_job("stopped")
    undisturbed()
    process = stopped.start()
    wait_for(lambda: logged(stopped, 8), process)
    process.terminate()
    process.communicate(timeout=600)
    stopped()
    assert losses(stopped) == losses(undisturbed)
    assert_same_state(stopped, undisturbed)


def test_two_ranks_are_one_rank_with_twice_the_accumulation(make_job):
    """Also: an SGD run that goes from 1 rank to 2 and back."""
    one, two = (
        make_job("one", optim={"opt": "sgd", "lr": 0.02}),
        make_job("two", optim={"opt": "sgd", "lr": 0.02}),
    )
    one()
    two("--max-steps", "6")
    two("--max-steps", "12", nproc=2)
    two()
    for mine, theirs in zip(losses(two), losses(one), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    a, b = final_state(one), final_state(two)
    for key, value in a.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(b[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("nproc", [2, 3])
def test_evaluation_is_exact_over_ranks(make_job, nproc):
    """Every rank asserts that all 31 images were seen; the figures are those of one rank."""
    job = make_job(train={"global_batch_size": 12, "max_batch_per_gpu": 12})
    one = job("--max-steps", "4")
    more = job("--max-steps", "4", nproc=nproc)
    for key in ("top1", "ema_top1"):
        assert more[key] == one[key]
    assert more["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_a_folder_of_photographs_never_seen_before(make_job, tmp_path):
    """Unicode names, grayscale, CMYK, a PNG named .jpg, odd sizes: trains and evaluates, on 1, 2 and 3
    ranks.
    """
    root = tmp_path / "photos"
    for split, count in (("train", 36), ("val", 17)):
        write_folder(root / split, count)
        (root / split / "c2").rename(root / split / "\u732b \u00e9t\u00e9")
        files = sorted(root.glob(f"{split}/*/*.jpg"))
        Image.open(files[0]).convert("L").save(files[0])
        Image.open(files[1]).convert("CMYK").save(files[1])
        Image.open(files[2]).save(files[2], format="PNG")
        Image.open(files[3]).resize((1, 1)).save(files[3])
        Image.open(files[4]).resize((700, 9)).save(files[4], progressive=True)
        files[5].rename(files[5].with_name("\u00fc\u0308 \u65e5\u672c.JPEG"))
    sections = {
        "data": {"root": str(root)},
        "train": {"global_batch_size": 12},
        "augment": {"rand_augment": "rand-m9-mstd0.5-inc1"},
    }
    jobs = [make_job(f"ranks{nproc}", **sections) for nproc in (1, 2, 3)]
    results = [job(nproc=nproc) for nproc, job in enumerate(jobs, start=1)]
    assert [(r["num_images"], r["step"]) for r in results] == [(17, 9)] * 3
    # Two ranks of 6 images are the same micro-batches as one rank of 2 x 6; three of 4 are other ones.
    for mine, theirs in zip(losses(jobs[0]), losses(jobs[1]), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


def test_metrics_are_served_while_the_run_runs(make_job):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = make_job(schedule={"epochs": 400}, metrics={"enabled": True, "port": port, "stall_seconds": 1e-3})
    began = time.time()
    process = job.start(nproc=2)
    wait_for(lambda: logged(job, 4), process)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def page(rank, path):
        return opener.open(f"http://127.0.0.1:{port + rank}{path}", timeout=120).read().decode()

    def is_unhealthy():
        try:
            page(1, "/-/healthy")
        except urllib.error.HTTPError as error:
            return error.code == 503
        return False

    pages = [page(rank, "/metrics") for rank in (0, 1)]
    statuses = [json.loads(page(rank, "/status.json")) for rank in (0, 1)]
    fronts = [page(rank, "/") for rank in (0, 1)]
    assert "steps done" in page(1, "/-/ready")
    wait_for(is_unhealthy, process)  # a step takes longer than a millisecond
    targets = [json.loads((job.run.parent / ".targets" / f"job-{rank}.json").read_text()) for rank in (0, 1)]
    process.terminate()
    process.communicate()
    assert targets == [[{"targets": [f"127.0.0.1:{port + rank}"], "labels": {}}] for rank in (0, 1)]
    assert list((job.run.parent / ".targets").iterdir()) == []
    assert (statuses[0]["state"], "state" in statuses[1]) == ("running", False)
    assert [status["now"]["rank"] for status in statuses] == [0, 1]
    assert all("cmt_micro \u00b7 fp32 \u00b7 2 processes on the CPU" in front for front in fronts)
    assert ["<h2>Curves" in front for front in fronts] == [True, False]
    assert "on the page of rank 0" in fronts[1]
    for rank, page in enumerate(pages):
        samples = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))

        def value(name, rank=rank, samples=samples, **labels):
            labels = {"rank": str(rank), "run": "job"} | labels
            return float(
                samples[
                    f"cmtrain_{name}{{{','.join(f'{k}={json.dumps(labels[k])}' for k in sorted(labels))}}}"
                ]
            )

        phases = {name: value("phase_duration_seconds_sum", phase=name) for name in PHASES}
        assert min(phases.values()) > 0
        assert sum(phases.values()) < value("step_duration_seconds_sum")
        assert value("phase_duration_seconds_count", phase="data_wait") == value(
            "step_duration_seconds_count"
        )
        # JPEGs of 48 x 48 pixels
        assert value("data_bytes_total") > 500 * value("images_total", split="train")
        assert (
            min(
                value(name)
                for name in ("flops_per_image", "weight_norm", "bn_running_var_max", "loss_scale")
            )
            > 0
        )
        assert sum(value("state", state=state) for state in STATES) == 1
        assert float(samples[f'cmtrain_images_total{{rank="{rank}",run="job",split="train"}}']) >= 32
        assert float(samples[f'cmtrain_steps_total{{rank="{rank}",result="applied",run="job"}}']) >= 4
        assert float(samples[f'cmtrain_last_step_timestamp_seconds{{rank="{rank}",run="job"}}']) > began
        assert 'world_size="2"' in page
    if find("promtool"):
        subprocess.run(["promtool", "check", "metrics"], input=pages[0].encode(), check=True, timeout=600)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_inf_on_one_rank_poisons_nothing(make_job, rank):
    job = make_job(mixing={"mixup": 0, "cutmix": 0})
    result = job(nproc=2, module=POISONED, POISON_STEPS="7", POISON_RANK=str(rank))
    assert all(torch.isfinite(v).all() for v in final_state(job).values() if isinstance(v, torch.Tensor))
    assert result["loss"] < 10
    assert job.log()[-1]["bad_steps"] == 1
    assert [e["bad"] for e in job.events() if e["event"] == "bad_steps"] == [1]


def test_without_the_guard_the_same_inf_poisons_the_run(make_job):
    job = make_job(guard={"enabled": False}, mixing={"mixup": 0, "cutmix": 0})
    job(module=POISONED, POISON_STEPS="7", POISON_RANK="0")
    state = final_state(job)
    assert torch.isnan(
        state[next(k for k in state if k.startswith(".model.") and k.endswith("running_var"))]
    ).any()
    assert torch.isnan(
        state[next(k for k in state if k.startswith(".ema.") and k.endswith("running_var"))]
    ).any()


def test_a_run_of_bad_steps_ends_as_diverged(make_job):
    job = make_job(
        guard={"rollback_after_bad_steps": 4, "max_rollbacks": 0}, mixing={"mixup": 0, "cutmix": 0}
    )
    job(module=POISONED, POISON_STEPS=",".join(map(str, range(6, 18))), POISON_RANK="0", code=4)
    status = job.status()
    assert (status["state"], status["exit_code"]) == ("diverged", 4)
    assert "4 bad steps in a row" in status["reason"]
    assert checkpoint_steps(job.run / "checkpoints") == [6]


def test_another_recipe_does_not_continue_a_run(make_job):
    job = make_job()
    job("--max-steps", "2")
    job("--max-steps", "4", "--optim.lr", "1e-3", code=2)
    assert "optim.lr: 0.002 -> 0.001" in job.stderr.read_text()
    assert job.status()["step"] == 2
    job("--max-steps", "4", "--optim.lr", "1e-3", "--resume", "force")
    assert job.status()["step"] == 4
    job("--max-steps", "4", "--resume", "never", code=2)
    assert "already holds checkpoints" in job.stderr.read_text()


def test_data_errors_leave_nothing_behind(make_job):
    job = make_job()
    job("--data.root", "NOWHERE", code=3)
    assert sum("NOWHERE" in line for line in job.stderr.read_text().splitlines()) == 1
    assert "NOWHERE" in job.stderr.read_text()
    job("--train.global_batch_size", "1000", code=3)
    assert "96" in job.stderr.read_text()
    job("--train.precision", "fp16", code=2) if not torch.cuda.is_available() else None
    job("--model.name", "cmt_tiny", code=2)
    assert "cmt_ti" in job.stderr.read_text()
    assert not (job.folder / "runs").exists()


def test_a_run_goes_on_where_the_gpus_decoder_does_not_work(make_job):
    """One line per way to decode that failed, on the console and in the run's events; then it trains."""
    job = make_job(schedule={"epochs": 1, "warmup_epochs": 0})
    assert job(module=str(ROOT / "tests" / "helpers" / "faulty_decoder_train.py"))["state"] == "finished"
    shown = [line for line in job.stderr.read_text().splitlines() if "data.decode" in line]
    noted = [event["text"] for event in job.events() if event["event"] == "note"]
    assert len(noted) == len(shown) == 2
    for text, note, line in zip(
        ("crashes (SIGSEGV)", "hangs (no answer in 2 s)"), noted, shown, strict=True
    ):
        assert text in note
        assert note in line


def test_an_expectation_that_is_not_met(make_job):
    job = make_job(
        expect={"top1": 1.0, "tolerance": 0.0, "enforce": True}, optim={"lr": 1e-6, "weight_decay": 0}
    )
    job("--schedule.epochs", "1", "--schedule.warmup_epochs", "0", code=5)
    assert job.status()["state"] == "finished"
    assert "expected" in job.status()["reason"]
