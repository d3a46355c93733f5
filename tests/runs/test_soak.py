"""Ten minutes of every fault that a run of weeks meets: nothing is lost and nothing grows."""

import json
import os
import random
import signal
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from helpers.runs import ROOT, assert_same_state, free_port, losses, wait_for

from cmtrain.storage.checkpoint import checkpoint_path, checkpoint_steps

HURT = str(ROOT / "tests" / "helpers" / "hurt_train.py")
STEPS = int(os.environ.get("SOAK_STEPS", "20000"))
STEPS_PER_EPOCH = 6  # 48 images in batches of 8
FAULTS = ("kill", "kill the writer", "stop", "full disk", "slow disk", "damage")
SECTIONS = {
    "data": {"fraction": 0.5},
    "train": {"global_batch_size": 8, "max_batch_per_gpu": 8, "log_every_steps": 10},
    "schedule": {"epochs": STEPS // STEPS_PER_EPOCH},
    "evaluate": {"every_epochs": max(1, STEPS // STEPS_PER_EPOCH // 20)},
    "checkpoint": {"every_steps": max(2, STEPS // 100), "every_epochs": STEPS, "keep": 3},
}


def last_step(job):
    try:
        return json.loads((job.run / "log.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def resources(pid):
    """Resident bytes, open descriptors and threads of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return (
        pages * os.sysconf("SC_PAGESIZE"),
        len(os.listdir(f"/proc/{pid}/fd")),
        len(os.listdir(f"/proc/{pid}/task")),
    )


@pytest.mark.slow
@pytest.mark.timeout(9000)
def test_nothing_is_lost_and_nothing_grows(make_job, figure):
    port = free_port()
    undisturbed = make_job("undisturbed", **SECTIONS, metrics={"enabled": True, "port": port})
    process = undisturbed.start(module=HURT)
    pid, watched, ended = process.processes[0].pid, [], threading.Event()

    def scrape():
        while not ended.wait(0.2):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=120) as page:
                page.read()

    wait_for(lambda: last_step(undisturbed) >= STEPS // 20, process, seconds=1800)
    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        while last_step(undisturbed) < 0.97 * STEPS:
            assert process.poll() is None, process.communicate()
            watched.append(resources(pid))
            time.sleep(STEPS / 20000)
    finally:
        ended.set()
        scraper.join()
    process.communicate(timeout=600)
    assert process.returncode == 0
    # Of the second and of the last quarter of its life, the median: allocators breathe.
    quarter = len(watched) // 4
    early, late = (
        [sorted(values)[len(values) // 2] for values in zip(*part, strict=True)]
        for part in (watched[quarter : 2 * quarter], watched[-quarter:])
    )
    assert late[0] < 1.02 * early[0], f"memory: {early[0]:,} -> {late[0]:,} bytes"
    assert late[1:] <= early[1:], f"descriptors and threads: {early[1:]} -> {late[1:]}"

    draw = random.Random(STEPS)
    job = make_job("hurt", **SECTIONS)
    injected, round_of_faults = dict.fromkeys(FAULTS, 0), []
    while last_step(job) < 0.95 * STEPS:
        round_of_faults = round_of_faults or draw.sample(FAULTS, len(FAULTS))
        fault = round_of_faults.pop()
        saved = checkpoint_steps(job.run / "checkpoints")
        if fault == "damage" and len(saved) < 2:
            continue  # of a single one, nothing could be saved
        injected[fault] += 1
        if fault == "damage":
            state = checkpoint_path(job.run / "checkpoints", saved[-1]) / "state.safetensors"
            with open(state, "r+b") as file:
                file.seek(draw.randrange(state.stat().st_size))
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1 << draw.randrange(8)]))
        hurt = {
            "kill the writer": {"KILL": f"writer {draw.randrange(1, 600)}"},
            "full disk": {
                "FULL": ",".join(
                    str(step) for step in range(0, STEPS, 2 * SECTIONS["checkpoint"]["every_steps"])
                )
            },
            "slow disk": {"SLOW": "0.1"},
        }
        process = job.start(module=HURT, **hurt.get(fault, {}))
        target = last_step(job) + draw.randrange(STEPS // 40, STEPS // 10)
        while process.poll() is None and last_step(job) < min(target, STEPS):
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM if fault in ("stop", "slow disk") else signal.SIGKILL)
        process.communicate(timeout=600)
        assert process.returncode in (0, 143, -signal.SIGKILL), process.communicate()
    assert min(injected.values()) > 0
    job(module=HURT)
    assert_same_state(job, undisturbed)
    assert losses(job) == losses(undisturbed)
    total = ", ".join(f"{fault} {number}" for fault, number in injected.items())
    figure(
        f"soak: {STEPS} steps, {sum(injected.values())} faults survived ({total}), 0 lost updates; memory "
        f"{early[0] / 2**20:.0f} -> {late[0] / 2**20:.0f} MiB, descriptors {early[1]} -> {late[1]}, threads "
        f"{early[2]} -> {late[2]}"
    )
