"""Train: read `run` from top to bottom, its loop is one batch's way from JPEG to metric."""

from __future__ import annotations

import math
import platform
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cmtrain import __version__, errors
from cmtrain.config.load import source_of
from cmtrain.config.schema import Config, flat, to_yaml
from cmtrain.monitoring import machine, trackers, units
from cmtrain.processes.collectives import gather, leave_together
from cmtrain.processes.failure import stop_code
from cmtrain.processes.rank import is_lost_contact, report_failure
from cmtrain.processes.signals import Stopped, StopRequest
from cmtrain.processes.watchdog import Watchdog
from cmtrain.step.evaluate import Evaluation, evaluate
from cmtrain.step.learner import Learner
from cmtrain.step.measure import StepReport, Stopwatch
from cmtrain.storage.finite import FiniteCheck, repair_or_reject
from cmtrain.storage.records import finite, replace_file
from cmtrain.storage.run_folder import MISTAKES_NAME, SAMPLE_NAME, RunLock
from cmtrain.training import build, mistakes
from cmtrain.training.build import Parts
from cmtrain.training.loaders import Data, batches_from, label_sets
from cmtrain.training.recovery import Recovery, find_overflow, merge_ranks
from cmtrain.training.resume import restore
from cmtrain.training.run_logger import RunLogger
from cmtrain.training.saver import Saver
from cmtrain.training.schedule import images_at_once
from pipelines.files.manifest import Manifest
from pipelines.preview import contact_sheet
from pipelines.spec import Batch


def train(
    config: Config, *, resume: str = "auto", max_steps: int | None = None, data: Data | None = None,
    as_json: bool = False,
) -> int:  # fmt: skip
    """Train the configuration in this process, one of several if a launcher started it.

    `resume`: see resume.choose_start. `max_steps`: after this many steps the run ends; None: all. `data`:
    the images, if they are open already. `as_json`: print the result on a terminal, too. Raises ConfigError,
    DataError: before anything is written. Returns the exit code: 0 done, 3 bad data or no checkpoint, 4
    diverged, 5 accuracy missed, 130 Ctrl-C, 143 another stop signal; of the rank that was the cause.
    """
    with closing(RunLock(Path(config.run.dir) / str(config.run.name))) as lock:
        return run(config, lock, resume, max_steps, data, as_json)


def run(
    config: Config, lock: RunLock, resume: str, max_steps: int | None, images: Data | None, as_json: bool
) -> int:
    """Do what `train` promises, in the run folder that `lock` guards."""
    # Set up, or resume. Whatever can be wrong is found before anything is written.
    parts = build.assemble(config, lock, resume, images)
    config = parts.config
    data, schedule, learner, recovery = parts.data, parts.schedule, parts.learner, parts.recovery
    accelerator, start = parts.accelerator, parts.start
    rank, world_size = accelerator.process_index, accelerator.num_processes
    first_step, last_step = start.step, min(schedule.total_steps, max_steps or schedule.total_steps)
    resumed, evaluation_due = None, False
    if start.checkpoint:
        # A stop signal may have come before the evaluation that belongs to the checkpoint.
        evaluation_due = start.checkpoint.state["progress"].get("evaluation_due", False)
        restore(learner, start.checkpoint)
        recovery.load_state_dict(start.checkpoint.state["recovery"])
        resumed = start.checkpoint.path, StepReport(**start.checkpoint.meta["report"])
    recovery.keep(start.step, learner)

    # Start: from here on the run folder is written, and signals and hangs are handled.
    stop, clock = StopRequest(parts.control), Stopwatch()
    logger = open_logger(config, lock.folder, parts, last_step)
    saver = Saver(lock.folder, logger, keep=config.checkpoint.keep, measure=config.best_measure)
    watchdog = Watchdog(
        lock.folder, rank, world_size, timeout_seconds=config.train.step_timeout_seconds,
        losses=logger.losses,
    )  # fmt: skip

    def lr_of(step: int) -> float:
        return schedule.lr_at(step) * recovery.lr_factor(step)

    eval_size = min(schedule.micro_batch_size, images_at_once(config))

    def val_batches() -> Iterator[Batch]:
        batches = watchdog.over(parts.eval_loader.epoch(0), "evaluation", logger.step)
        return stop.interrupting(batches, len(data.val) // (world_size * eval_size))

    def evaluate_after(step: int, *, log: bool = True) -> tuple[dict[str, Evaluation], bool]:
        """Return the results, {} if a stop signal came, and whether they are the run's best."""
        logger.metrics.enter("evaluate")
        clock.lap()
        results = evaluate_weights(parts, val_batches)
        improved = bool(results) and log and saver.is_best(results, step)
        if results and log:
            epoch, (seconds, _) = math.ceil(step / schedule.steps_per_epoch), clock.lap()
            logger.evaluated(
                results, data.train.class_names, epoch=epoch, step=step, lr=lr_of(step - 1), seconds=seconds,
                best=saver.best,
            )  # fmt: skip
        clock.lap()  # an evaluation is no part of the next step's time
        return results, improved

    received, diverged, results = 0, "", dict[str, Evaluation]()
    passes: list[tuple[int, float]] = []  # from which step on, with how many images at most
    try:
        if start.checkpoint:
            saver.resume(start.checkpoint.meta, data.val.fingerprint)
            saver.saved_step = stop.saved_step = start.step
        facts = {
            "model": config.model.name, "precision": build.precision_of(accelerator),
            "device": accelerator.device.type, "world_size": str(world_size), "version": __version__,
        }  # fmt: skip
        logger.start(
            to_yaml(config), facts, parts.notes, flops_per_image=parts.flops_per_image,
            device=accelerator.device, resumed=resumed,
        )  # fmt: skip
        for file in map(source_of, config.run.imports if logger.folder else ()):
            logger.losses.attempt(file.name, replace_file, lock.folder / file.name, file.read_bytes())
        logger.left_out(data.train.bad + data.val.bad, data.train.root)
        batches = clock.waiting(batches_from(first_step, parts.train_loader, schedule))
        batches = draw_first(batches, clock, logger, config, data.train)
        if evaluation_due or first_step >= last_step:
            # Resumed after the last step of an epoch or of the run: its evaluation or its report is missing.
            results, _ = evaluate_after(first_step, log=evaluation_due)
            received = 0 if results else stop.decision
            if received:
                first_step = last_step

        # The loop.
        for step in range(first_step, last_step):
            lr, images_per_pass = lr_of(step), learner.images_per_pass
            watchdog.begin("step", step)
            num_images = learner.step(batches, step, lr)
            if learner.images_per_pass != images_per_pass:
                passes.append((step + 1, learner.images_per_pass))
                logger.metrics.out_of_memory.inc()
                logger.report("out_of_memory", step=step + 1, images_per_pass=learner.images_per_pass)
            done, epoch = step + 1, step // schedule.steps_per_epoch
            final = done == last_step
            logger.count_step(
                done, *clock.lap(), num_images=num_images, num_bytes=parts.train_loader.take_num_bytes(),
                phases=learner.phases.pop_finished(),
            )  # fmt: skip
            saver.log_finished()
            stop.saved_step = saver.saved_step
            received = 0 if final else stop.agreed()

            # Log. Here host and device meet, and nowhere else in a step with AdamW or SGD.
            logs = done % config.train.log_every_steps == 0
            if logs or final:
                report = learner.report(done, epoch, lr, reset=logs)
                logger.log(report)
                log_bad_files(logger, parts, stop)
                if diverged := keep_or_roll_back(report, learner, recovery, logger, data.train, stop):
                    break

            # Evaluate.
            evaluates = final or schedule.ends_epochs(done, config.evaluate.every_epochs)
            results, improved = {}, False
            if evaluates and not received:
                results, improved = evaluate_after(done)
                received = 0 if results else stop.decision

            # Save.
            milestone = schedule.ends_epochs(done, config.checkpoint.milestone_every_epochs)
            every = config.checkpoint.every_steps
            due = schedule.ends_epochs(done, config.checkpoint.every_epochs) or (every and done % every == 0)
            if final or improved or received or milestone or due:
                watchdog.begin("checkpoint", done)
                # `samples` of `epoch` are consumed, by all ranks together.
                epoch, steps_into_epoch = divmod(done, schedule.steps_per_epoch)
                progress = {"step": done, "epoch": epoch, "evaluation_due": evaluates and not results}
                progress["samples"] = steps_into_epoch * schedule.global_batch_size
                recovered = {"recovery": recovery.state_dict(), "progress": progress}
                checked = repair_or_reject(**learner.weights) if config.guard.enabled else FiniteCheck()
                meta = meta_of(config, parts, passes, milestone=milestone)
                saver.save(learner.state_dict() | recovered, done, meta, checked, last=final or received > 0)
                clock.lap()
            if received:
                break

        log_bad_files(logger, parts, stop)

        # End.
        parts.train_loader.close()
        parts.eval_loader.close()
        stop.close()
        saver.close()
        if received:
            state, code, results = "preempted", stop_code(received), {}
            reason = stopped_by(received, logger.step, saver.unsaved)
        elif diverged:
            state, code, results = "diverged", errors.EXIT_DIVERGED, {}
            reason = f"{diverged}; lower optim.lr or set optim.clip_grad"
        else:
            state = "finished"
            code, reason = check_expectation(config, results, whole=last_step == schedule.total_steps)
            if saver.unsaved:
                state, code = "failed", errors.EXIT_DATA
                reason = f"{reason}, but its checkpoint is missing: {saver.unsaved}"
        if results and logger.folder:
            log_mistakes(logger, results, config, parts)
        code = logger.finish(state, exit_code=code, reason=reason, results=results, as_json=as_json)
    except KeyboardInterrupt:
        where = f"step {saver.saved_step}" if saver.saved_step else "the beginning"
        what = f"stopped at once by a second Ctrl-C at step {logger.step}, not saved"
        reason = f"{what}; run the same command to continue from {where}"
        logger.finish("preempted", exit_code=errors.EXIT_INTERRUPTED, reason=reason)
        return errors.EXIT_INTERRUPTED
    except BaseException as error:
        cause = report_failure(error, lock.folder, rank=rank, world_size=world_size, step=logger.step)
        logger.fail(cause.describe(), waits=cause.exit_code != errors.EXIT_INTERRUPTED)
        if cause.exit_code == errors.EXIT_ERROR and not is_lost_contact(error):
            raise
        return cause.exit_code
    leave_together()
    watchdog.close()
    logger.report_losses()
    return code


def draw_first(
    batches: Iterator[Batch], clock: Stopwatch, logger: RunLogger, config: Config, manifest: Manifest
) -> Iterator[Batch]:
    """Pass `batches` on, and draw the first one into the run folder for people to look at."""
    first = next(batches)
    if logger.folder:
        how = first.images, config.data.mean, config.data.std, logger.path / SAMPLE_NAME
        captions = [[manifest.label_name(label)] for label in first.labels.tolist()]
        logger.losses.attempt(SAMPLE_NAME, contact_sheet, *how, captions=captions)
    clock.lap()  # building the pipeline is no part of a step's time
    yield first
    yield from batches


def keep_or_roll_back(
    report: StepReport, learner: Learner, recovery: Recovery, logger: RunLogger, manifest: Manifest,
    stop: StopRequest,
) -> str:  # fmt: skip
    """At a log point, log spikes and keep a good state; or, after bad steps in a row or a spike, go back to
    one. For all ranks together. Returns why the run has diverged, or "" if it goes on; equal on all ranks.
    """
    if spikes := learner.spikes:  # the same on all ranks
        # The samples are those of the highest one.
        samples = [sample for share in gather(learner.spike_samples, stop.group) for sample in share]
        logger.report(
            "loss_spikes", first_step=spikes[0].step, last_step=spikes[-1].step, count=len(spikes),
            worst=asdict(max(spikes, key=lambda spike: spike.z)), samples=samples,
            files=[manifest.file(sample) for sample in samples[:3]],
        )  # fmt: skip
    if report.bad_steps_in_a_row >= recovery.after_bad_steps:
        found = merge_ranks(gather(find_overflow(learner), stop.group))
        files = [manifest.file(sample) for sample in (found.suspects or found.samples)[:3]]
        event = {"step": report.step, **asdict(found), "files": files}
        logger.report("bad_batch", **event, shown="; ".join(files))
        cause, good_until = found.cause, report.step - report.bad_steps_in_a_row
    elif spikes and recovery.on_spikes and not recovery.exhausted:
        cause, good_until = "a loss spike", spikes[0].step - 1
    else:
        if report.good_steps_in_a_row >= recovery.after_bad_steps:
            recovery.keep(report.step, learner)
        return ""
    if (good_step := recovery.roll_back(report.step, learner, good_until=good_until)) is not None:
        logger.metrics.rollbacks.inc()
        event = {"step": report.step, "good_step": good_step, "cause": cause}
        logger.report("rollback", **event, lr_factor=recovery.lr_factor(report.step))
        return ""
    bad = f"{report.bad_steps_in_a_row} bad steps in a row after {len(recovery.rollback_steps)} rollbacks"
    return f"{bad}, loss scale {report.loss_scale:g}, {cause}"


def log_bad_files(logger: RunLogger, parts: Parts, stop: StopRequest) -> None:
    """Log the files that could not be read since the last call, on any rank. For all ranks together."""
    found = parts.train_loader.take_bad_files() + parts.eval_loader.take_bad_files()
    logger.bad_files(gather(found, stop.group))


def evaluate_weights(parts: Parts, batches: Callable[[], Iterator[Batch]]) -> dict[str, Evaluation]:
    """Evaluate the model and its EMA, if any, on `batches()` each. Returns {} if a stop signal came."""
    accelerator, val = parts.accelerator, parts.data.val
    parts.learner.average_over_ranks()
    how = accelerator, len(val), parts.num_classes, label_sets(val, parts.num_classes, accelerator.device)
    try:
        results = {name: evaluate(module, batches(), *how) for name, module in parts.learner.weights.items()}
    except Stopped:
        results = {}
    if accelerator.device.type == "cuda":
        parts.eval_loader.close()  # the training step needs its memory until the next evaluation
    return results


def log_mistakes(logger: RunLogger, results: dict[str, Evaluation], config: Config, parts: Parts) -> None:
    """Draw the most confident mistakes of the better weights into the run folder."""
    best = max(results.values(), key=lambda result: result.score(config.best_measure))
    names = parts.data.train.class_names
    labels = [*names, *map(str, range(len(names), parts.num_classes))]
    how = best, parts.data.val, labels, config, parts.accelerator
    logger.losses.attempt(MISTAKES_NAME, mistakes.draw_mistakes, logger.path / MISTAKES_NAME, *how)


def meta_of(
    config: Config, parts: Parts, passes: Sequence[tuple[int, float]], *, milestone: bool
) -> dict[str, Any]:
    """Return the origin of a checkpoint, for its manifest. `passes`: images in a pass, since some steps."""
    versions = {"cmtrain": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {
        "config": config.model_dump(mode="json"), "fingerprint": parts.fingerprint,
        "val_fingerprint": parts.data.val.fingerprint, "micro_batch_size": parts.schedule.micro_batch_size,
        "world_size": parts.accelerator.num_processes, "versions": versions, "milestone": milestone,
        "images_per_pass": finite(parts.learner.images_per_pass), "passes": list(passes),
        "first_step": parts.start.step, "rollbacks": parts.recovery.rollback_steps,
        "environment": machine.environment(),
    }  # fmt: skip


def open_logger(config: Config, path: Path, parts: Parts, last_step: int) -> RunLogger:
    metrics, accelerator, schedule = config.metrics, parts.accelerator, parts.schedule
    return RunLogger(
        path, rank=accelerator.process_index, world_size=accelerator.num_processes,
        first_step=parts.start.step, last_step=last_step, epochs=schedule.total_epochs,
        total_steps=schedule.total_steps,
        address=(metrics.host, metrics.port + accelerator.local_process_index) if metrics.enabled else None,
        stall_seconds=metrics.stall_seconds, allowed_hosts=metrics.allowed_hosts,
        trackers=trackers.Trackers(accelerator, path.name, flat(config)),
    )  # fmt: skip


def stopped_by(number: int, step: int, unsaved: str) -> str:
    """Describe how a stop signal ended the run. `unsaved`: as of Saver."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    if unsaved:
        older = "run the same command to continue from an older checkpoint"
        return f"stopped by {name} at step {step}, not saved ({unsaved}); {older}"
    return f"stopped by {name} at step {step}, saved; run the same command to continue"


def check_expectation(config: Config, results: dict[str, Evaluation], *, whole: bool) -> tuple[int, str]:
    """Return exit code and reason: did a `whole` run reach the accuracy that its configuration expects?"""
    top1 = max(result.top1 for result in results.values())
    precisions = [result.map for result in results.values() if result.map is not None]
    found = f"mAP {units.percent(max(precisions))}, " if precisions else ""
    expect = config.expect
    if expect.top1 is None or not whole:
        return errors.EXIT_DONE, f"{found}top-1 {units.percent(top1)}"
    reached = top1 >= expect.top1 - expect.tolerance
    wanted = f"{units.percent(expect.top1)} expected" + (f" by {expect.source}" if expect.source else "")
    reason = f"{found}top-1 {units.percent(top1)}, {wanted}: {'reached' if reached else 'missed'}"
    return errors.EXIT_EXPECTATION if expect.enforce and not reached else errors.EXIT_DONE, reason
