"""Run cmtrain with kills, slow or full disks and non-finite weights, as the environment asks.

HALF: train in fp16 on the CPU, with a loss scale that must come down first: one more value.
KILL: "main N" or "writer N": kill -9 before the N-th call of any function, C or Python, that the training
    loop or the thread that writes checkpoints makes.
COUNT: a file to write the two numbers of calls to, for a run that is not killed.
SLOW: seconds that every fsync takes longer.
FULL: steps (comma-separated) during whose save no file can grow beyond 100 kB, as on a full disk.
NONFINITE: "1 ema, 2 model": a NaN in the BatchNorm statistics of these weights before the 1st, 2nd save.
SEEN: a folder to write the samples of each micro-batch to, one [step, samples] per line.
"""

import contextlib
import itertools
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import cmtrain.storage.checkpoint_writer
import cmtrain.storage.state_file
import cmtrain.training.build
import cmtrain.training.train
from cmtrain.cli.main import main
from helpers.half import HalfAccelerator

saves = itertools.count(1)
calls = {"main": 0, "writer": 0}
place, number = os.environ.get("KILL", "nowhere 0").split()


def count(where):
    def watch(frame, event, argument):
        if event in ("call", "c_call"):
            calls[where] += 1
            if where == place and calls[where] == int(number):
                os.kill(os.getpid(), signal.SIGKILL)

    return watch


def watched_batches(step, loader, schedule):
    """The batches of the program; from the first one on, calls are counted."""
    for number, batch in enumerate(batches_from(step, loader, schedule)):
        if "SEEN" in os.environ:
            record = [step + number // schedule.accumulation, batch.indices.tolist()]
            with open(Path(os.environ["SEEN"]) / f"{os.environ.get('RANK', 0)}.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        if sys.getprofile() is None and {"KILL", "COUNT"} & os.environ.keys():
            threading.setprofile(count("writer"))
            sys.setprofile(count("main"))
        yield batch


def save_on_a_full_disk(root, step, state, meta):
    full = str(step) in os.environ["FULL"].split(",")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        return save_checkpoint(root, step, state, meta)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def break_and_check(**weights):
    save = next(saves)
    for name, module in weights.items():
        if f"{save} {name}" in os.environ["NONFINITE"].split(", "):
            next(m for m in module.modules() if hasattr(m, "running_var")).running_var[0] = float("nan")
    return repair_or_reject(**weights)


class Accelerator(HalfAccelerator):
    is_main_process, local_process_index = True, 0

    def __init__(self, precision):
        super().__init__(init_scale=2.0**26)

    def local_main_process_first(self):
        return contextlib.nullcontext()


batches_from, save_checkpoint = (
    cmtrain.training.train.batches_from,
    cmtrain.storage.checkpoint_writer.save_checkpoint,
)
cmtrain.training.train.batches_from = watched_batches
if "HALF" in os.environ:
    cmtrain.training.build.make_accelerator = lambda precision, *_, **__: Accelerator(precision)
if "SLOW" in os.environ:
    fsync = os.fsync
    os.fsync = lambda file: (time.sleep(float(os.environ["SLOW"])), fsync(file))
if "FULL" in os.environ:
    cmtrain.storage.checkpoint_writer.save_checkpoint = save_on_a_full_disk
if "NONFINITE" in os.environ:
    repair_or_reject = cmtrain.training.train.repair_or_reject
    cmtrain.training.train.repair_or_reject = break_and_check
code = main()
sys.setprofile(None)
if "COUNT" in os.environ:
    Path(os.environ["COUNT"]).write_text(json.dumps(calls))
sys.exit(code)
