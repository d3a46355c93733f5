"""Run cmtrain with a fault on one rank, or with ranks that its launcher forks from this warm process.

All environment variables are optional; everything else is the program itself:

FAULT, FAULT_RANK, FAULT_STEP, FAULT_TIMES
    a function below, its rank, the steps done before it, how many attempts have it (default 1)
SLOW_START, SLOW_CHECKPOINT, SLOW_EVALUATION
    opening the data, each write, each batch of an evaluation writes the file `slow` and takes 2 s more
SAVE_AT_ONCE
    every save waits for its end, as the last one does, so that the next step finds it logged
ODD_FOLDER, ODD_OPTION
    rank 1 is in another folder, with one more option
WEIGHTS
    each rank writes a digest of its weights after each evaluation, to the file `weights-rank<r>`
WARM
    fork the ranks instead of starting them; else ODD_* are about every rank that has them in its environment
PROCESS_1
    be process 1 of a namespace of its own, as in a container; the file `process1` has its id outside
"""

import ctypes
import functools
import hashlib
import os
import signal
import sys
import time
import traceback

import cmtrain.cli.main
import cmtrain.processes.launcher
import cmtrain.step.evaluate
import cmtrain.step.learner
import cmtrain.storage.checkpoint
import cmtrain.storage.checkpoint_writer
import cmtrain.training.loaders
import cmtrain.training.train
import pipelines.loader  # noqa: F401 - DALI, for the ranks that are forked
from cmtrain.processes.rank import num_restarts
from pipelines.spec import DataError


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def segv():
    ctypes.string_at(0)


def exception():
    raise ValueError("injected")


def data():
    raise DataError("injected: the data is gone")


def sleep():
    time.sleep(1000)


def gil():
    mutex, libc = ctypes.create_string_buffer(64), ctypes.PyDLL(None)  # PyDLL keeps the interpreter's lock
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # which no signal interrupts


def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)


def faulty_mix(mix, images, labels, spec, key):
    here = os.environ.get("RANK", "0") == os.environ["FAULT_RANK"] and key[1] == int(
        os.environ["FAULT_STEP"]
    )
    if here and num_restarts() < int(os.environ.get("FAULT_TIMES", "1")):
        globals()[os.environ["FAULT"]]()
    return mix(images, labels, spec, key)


def slowly(function, marker, *arguments, **keywords):
    """Write the file `marker`, and take two seconds more."""
    open(marker, "w").close()
    time.sleep(2)
    return function(*arguments, **keywords)


def weighed(evaluate_weights, parts, batches):
    """Write a digest of this rank's weights."""
    results = evaluate_weights(parts, batches)
    digest = hashlib.sha256()
    for name, module in parts.learner.weights.items():
        digest.update(
            name.encode()
            + b"".join(parameter.detach().numpy().tobytes() for parameter in module.parameters())
        )
    with open(f"weights-rank{os.environ.get('RANK', '0')}", "w") as file:
        file.write(digest.hexdigest())
    return results


def fork(command, environment):
    """cmtrain.processes.launcher.start without the five seconds of imports."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ.update(environment)
    if os.environ.get("RANK") == "1":
        be_odd()
    code = 1
    try:
        code = cmtrain.cli.main.main()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def become_process_1():
    """Go on as process 1 of a new process namespace, while this one waits for it and passes its end on."""
    clone_newpid = 0x20000000
    if ctypes.CDLL(None, use_errno=True).unshare(clone_newpid) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    child = os.fork()
    if child:
        with open("process1", "w") as file:
            file.write(str(child))
        _, status = os.waitpid(child, 0)
        os._exit(abs(os.waitstatus_to_exitcode(status)))


def be_odd():
    """Differ from the other ranks in what must be equal."""
    if "ODD_FOLDER" in os.environ:
        os.chdir(os.environ["ODD_FOLDER"])
    if "ODD_OPTION" in os.environ:
        sys.argv.append(os.environ["ODD_OPTION"])


if "PROCESS_1" in os.environ:
    become_process_1()
if "FAULT" in os.environ:
    cmtrain.step.learner.mix = functools.partial(faulty_mix, cmtrain.step.learner.mix)
if "SLOW_START" in os.environ:
    cmtrain.training.loaders.open_data = functools.partial(
        slowly, cmtrain.training.loaders.open_data, "slow"
    )
if "SLOW_CHECKPOINT" in os.environ:
    cmtrain.storage.checkpoint.verify = functools.partial(slowly, cmtrain.storage.checkpoint.verify, "slow")
if "SAVE_AT_ONCE" in os.environ:
    save = cmtrain.storage.checkpoint_writer.CheckpointWriter.save
    cmtrain.storage.checkpoint_writer.CheckpointWriter.save = lambda *arguments, **keywords: save(
        *arguments, **(keywords | {"last": True})
    )
if "SLOW_EVALUATION" in os.environ:
    add = cmtrain.step.evaluate.Answers.add
    cmtrain.step.evaluate.Answers.add = lambda *arguments: slowly(add, "slow", *arguments)
if "WEIGHTS" in os.environ:
    cmtrain.training.train.evaluate_weights = functools.partial(
        weighed, cmtrain.training.train.evaluate_weights
    )
if "WARM" not in os.environ:
    be_odd()
else:
    cmtrain.processes.launcher.start = fork
sys.exit(cmtrain.cli.main.main())
