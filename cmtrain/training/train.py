"""The training run. Read `train` from top to bottom: one batch's way from JPEG to metric is its loop."""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from cmtrain import __version__
from cmtrain.config.schema import Config, flat, to_yaml
from cmtrain.errors import EXIT_DATA, EXIT_DIVERGED, EXIT_DONE, EXIT_ERROR, EXIT_EXPECTATION
from cmtrain.models.cost import training_flops_per_image
from cmtrain.monitoring.trackers import Trackers
from cmtrain.processes.collectives import gather, leave_together
from cmtrain.processes.failure import stop_code
from cmtrain.processes.rank import is_lost_contact, report_failure
from cmtrain.processes.signals import Stopped, StopRequest
from cmtrain.processes.watchdog import Watchdog
from cmtrain.step.evaluate import Evaluation, evaluate
from cmtrain.step.learner import Learner
from cmtrain.step.measure import StepReport
from cmtrain.storage.finite import FiniteCheck, repair_or_reject
from cmtrain.storage.run_folder import RunLock
from cmtrain.storage.weights import start_from
from cmtrain.training import build
from cmtrain.training.recovery import Recovery, conclude, examine
from cmtrain.training.resume import choose_start, restore
from cmtrain.training.run_logger import NUM_NAMED, Journal
from cmtrain.training.schedule import Schedule
from pipelines.files.manifest import Manifest
from pipelines.loader import DaliLoader
from pipelines.spec import Batch, Loader


def train(config: Config, *, resume: str = "auto", max_steps: int | None = None) -> int:
    """Train as `config` says, in this process; one of several if a launcher started it.

    Args:
        resume: `auto`, `never`, `force` or a path; see resume.choose_start.
        max_steps: end the run after this many optimizer steps.

    Returns:
        The process exit code: 0 done, 3 too many bad files, 4 diverged, 5 expected accuracy not met, 130 Ctrl-C, 143
        another stop signal. Where several ranks run, that of the rank whose failure was the cause.

    Raises:
        ConfigError, DataError: before anything was written.
    """
    lock = RunLock(Path(config.run.dir) / str(config.run.name))
    with closing(lock):
        return run(config, lock, resume, max_steps)


def run(config: Config, lock: RunLock, resume: str, max_steps: int | None) -> int:
    """`train`, in the run folder that `lock` guards."""
    accelerator, control, warnings = build.join_ranks(config, lock.folder)
    rank, world_size = accelerator.process_index, accelerator.num_processes

    # Data, arithmetic, model, checkpoint: whatever can be wrong is found before anything is written.
    threads = build.split_threads(config, accelerator)
    data = build.open_data(config, accelerator)
    schedule = build.plan_steps(config, len(data.train), world_size)
    num_classes, classes = build.num_classes_of(config, data.train), data.train.class_names
    model = build.make_model(config, num_classes, accelerator.device)
    flops_per_image = training_flops_per_image(model, config.data.image_px)
    start = choose_start(lock, resume, config, data.train.fingerprint, is_main=accelerator.is_main_process)
    initial = (
        start_from(config.model.init_from, model) if config.model.init_from and not start.checkpoint else []
    )
    last_step = min(schedule.total_steps, max_steps or schedule.total_steps)

    # The loaders are not prepared by accelerate: order, sharding and every random draw are the plan's.
    train_loader = build.make_train_loader(config, data.train, schedule, accelerator, threads)
    eval_loader = build.make_eval_loader(config, data.val, schedule, accelerator, threads)
    learner = build.make_learner(config, model, schedule, num_classes, accelerator)
    if start.checkpoint:
        restore(learner, start.checkpoint)
    stop = StopRequest(control)
    journal = open_journal(config, lock.folder, accelerator, schedule, start.step, last_step)
    facts, notes = facts_of(config, accelerator), [*warnings, *start.notes, *initial]
    journal.start(to_yaml(config), facts, start.checkpoint, notes, flops_per_image=flops_per_image)
    journal.left_out(data.train.bad + data.val.bad)

    recovery = build.make_recovery(config, schedule)
    if start.checkpoint:
        recovery.load_state_dict(start.checkpoint.state["recovery"])
    recovery.keep(start.step, learner)
    watchdog = Watchdog(lock.folder, rank, world_size, timeout_seconds=config.train.step_timeout_seconds)

    def val_batches() -> Iterator[Batch]:
        batches = watchdog.over(eval_loader.epoch(0), "evaluation", journal.step)
        return stop.interrupting(batches, len(data.val) // (world_size * schedule.micro_batch_size))

    received, diverged, results = 0, "", dict[str, Evaluation]()
    try:
        batches = batches_from(start.step, train_loader, schedule)
        batches = journal.sample(journal.clock.waiting(batches), config.data.mean, config.data.std)
        if start.evaluation_due or start.step >= last_step:  # the evaluation, or its last words, were lost
            results = evaluate_weights(
                learner, eval_loader, val_batches, len(data.val), num_classes, accelerator
            )
            received = 0 if results else stop.decision
            if results and start.evaluation_due:
                lr = schedule.lr_at(start.step - 1) * recovery.lr_factor(start.step - 1)
                epoch = start.step // schedule.steps_per_epoch
                journal.evaluated(results, classes, epoch=epoch, step=start.step, lr=lr)
        for step in range(start.step, start.step if received else last_step):
            lr = schedule.lr_at(step) * recovery.lr_factor(step)
            watchdog.begin("step", step)
            num_images = learner.step(batches, step, lr)
            done, epoch = step + 1, step // schedule.steps_per_epoch
            final = done == last_step
            journal.count_step(done, num_images, train_loader.take_num_bytes(), learner.phases.take())
            received = 0 if final else stop.agreed()

            # Here host and device meet, and nowhere else in a step.
            logs = done % config.train.log_every_steps == 0
            if logs or final:
                report = learner.report(done, epoch, lr, reset=logs)
                journal.log(report)
                tell_bad_files(journal, [train_loader, eval_loader], stop)
                tell_spikes(journal, learner, data.train, stop)
                diverged = keep_or_roll_back(report, learner, recovery, journal, data.train, stop)
                if diverged:
                    break

            evaluates = final or schedule.ends_epochs(done, config.evaluate.every_epochs)
            results, improved = {}, False
            if evaluates and not received:
                journal.metrics.enter("evaluate")
                results = evaluate_weights(
                    learner, eval_loader, val_batches, len(data.val), num_classes, accelerator
                )
                improved = bool(results) and journal.evaluated(
                    results, classes, epoch=epoch + 1, step=done, lr=lr
                )
                received = 0 if results else stop.decision

            if final or improved or received or saves_at(done, config, schedule):
                state = learner.state_dict() | {"recovery": recovery.state_dict()}
                state["progress"] = progress_at(done, schedule) | {
                    "evaluation_due": evaluates and not results
                }
                watchdog.begin("checkpoint", done)
                meta = meta_of(config, data.train.fingerprint, schedule, accelerator)
                meta |= {"milestone": is_milestone(done, config, schedule)}
                check = repair_or_reject(**learner.weights) if config.guard.enabled else FiniteCheck()
                journal.save(
                    state, done, meta, check, keep=config.checkpoint.keep, last=final or received > 0
                )
            if received:
                break

        tell_bad_files(journal, [train_loader, eval_loader], stop)
    except BaseException as error:
        cause = report_failure(error, lock.folder, rank=rank, world_size=world_size, step=journal.step)
        journal.give_up(cause.describe())
        if cause.exit_code == EXIT_ERROR and not is_lost_contact(error):
            raise
        return cause.exit_code
    train_loader.close()
    eval_loader.close()
    stop.close()

    if received:
        code = stop_code(received)
        journal.finish("preempted", exit_code=code, reason=preemption_reason(received, journal.unsaved))
    elif diverged:
        code = EXIT_DIVERGED
        journal.finish(
            "diverged", exit_code=code, reason=f"{diverged}; lower optim.lr or set optim.clip_grad"
        )
    else:
        code, reason = judge(config, results, whole=last_step == schedule.total_steps)
        if journal.unsaved:
            code, reason = EXIT_DATA, f"{reason}, but its checkpoint is missing: {journal.unsaved}"
        how = "failed" if journal.unsaved else "finished"
        journal.finish(how, exit_code=code, reason=reason, results=results)
    leave_together()
    watchdog.close()
    return code


def batches_from(step: int, loader: Loader, schedule: Schedule) -> Iterator[Batch]:
    """This rank's micro-batches from optimizer step `step` on, epoch after epoch, without end."""
    while True:
        epoch, steps_into_epoch = divmod(step, schedule.steps_per_epoch)
        yield from loader.epoch(epoch, start=steps_into_epoch * schedule.global_batch_size)
        step = (epoch + 1) * schedule.steps_per_epoch


def keep_or_roll_back(
    report: StepReport,
    learner: Learner,
    recovery: Recovery,
    journal: Journal,
    manifest: Manifest,
    stop: StopRequest,
) -> str:
    """At a log point: remember a good state, or answer trouble (bad steps in a row, a spike) by going back to one.

    Returns:
        Why the run has diverged, or "" if it goes on. All ranks come to the same answer.
    """
    if report.bad_steps_in_a_row >= recovery.after_bad_steps:
        found = conclude(gather(examine(learner), stop.group))
        journal.bad_batch(report.step, found, name_some(manifest, found.suspects or found.samples))
        cause, good_until = found.cause, report.step - report.bad_steps_in_a_row
    elif learner.spikes and recovery.on_spikes and not recovery.exhausted:
        cause, good_until = "a loss spike", learner.spikes[0].step - 1
    else:
        if report.good_steps_in_a_row >= recovery.after_bad_steps:
            recovery.keep(report.step, learner)
        return ""
    good_step = recovery.roll_back(report.step, learner, good_until=good_until)
    if good_step is not None:
        journal.rolled_back(report.step, good_step, cause, recovery.lr_factor(report.step))
        return ""
    bad = f"{report.bad_steps_in_a_row} bad steps in a row after {len(recovery.rollback_steps)} rollbacks"
    return f"{bad}, loss scale {report.loss_scale:g}, {cause}"


def tell_spikes(journal: Journal, learner: Learner, manifest: Manifest, stop: StopRequest) -> None:
    """Say which steps since the last log point were spikes, and name the batch of the highest one."""
    if learner.spikes:  # the same on all ranks
        samples = [sample for share in gather(learner.spike_samples, stop.group) for sample in share]
        journal.spiked(learner.spikes, samples, name_some(manifest, samples))


def name_some(manifest: Manifest, samples: Sequence[int]) -> list[str]:
    """The files of the first few `samples`."""
    return [manifest.file(sample) for sample in samples[:NUM_NAMED]]


def tell_bad_files(journal: Journal, loaders: list[DaliLoader], stop: StopRequest) -> None:
    """Say which files could not be read since the last time, on any rank. For all ranks together."""
    found = [file for loader in loaders for file in loader.take_bad_files()]
    journal.bad_files(gather(found, stop.group))


def evaluate_weights(
    learner: Learner,
    loader: Loader,
    batches: Callable[[], Iterator[Batch]],
    num_images: int,
    num_classes: int,
    accelerator: Accelerator,
) -> dict[str, Evaluation]:
    """Evaluate the model and, if there is one, its EMA, each on the `batches` of `loader`; {} if a stop signal came."""
    learner.average_over_ranks()
    try:
        results = {
            name: evaluate(
                module,
                batches(),
                autocast=accelerator.autocast(),
                device=accelerator.device,
                num_images=num_images,
                num_classes=num_classes,
            )
            for name, module in learner.weights.items()
        }
    except Stopped:
        results = {}
    if accelerator.device.type == "cuda":
        loader.close()  # its memory is the training step's until the next evaluation
    return results


def saves_at(done: int, config: Config, schedule: Schedule) -> bool:
    every_steps = config.checkpoint.every_steps
    if is_milestone(done, config, schedule) or (every_steps and done % every_steps == 0):
        return True
    return schedule.ends_epochs(done, config.checkpoint.every_epochs)


def is_milestone(done: int, config: Config, schedule: Schedule) -> bool:
    every_epochs = config.checkpoint.milestone_every_epochs
    return every_epochs is not None and schedule.ends_epochs(done, every_epochs)


def progress_at(done: int, schedule: Schedule) -> dict[str, int]:
    """Where the run stands after `done` steps; `samples` of `epoch` are consumed, by all ranks together."""
    epoch, steps_into_epoch = divmod(done, schedule.steps_per_epoch)
    return {"step": done, "epoch": epoch, "samples": steps_into_epoch * schedule.global_batch_size}


def meta_of(
    config: Config, fingerprint: str, schedule: Schedule, accelerator: Accelerator
) -> dict[str, Any]:
    """What a checkpoint says about its origin."""
    return {
        "config": config.model_dump(mode="json"),
        "fingerprint": fingerprint,
        "micro_batch_size": schedule.micro_batch_size,
        "world_size": accelerator.num_processes,
        "versions": {
            "cmtrain": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def facts_of(config: Config, accelerator: Accelerator) -> dict[str, str]:
    return {
        "model": config.model.name,
        "precision": build.precision_of(accelerator),
        "device": accelerator.device.type,
        "world_size": str(accelerator.num_processes),
        "version": __version__,
    }


def open_journal(
    config: Config, path: Path, accelerator: Accelerator, schedule: Schedule, first_step: int, last_step: int
) -> Journal:
    metrics = config.metrics
    return Journal(
        path,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        first_step=first_step,
        last_step=last_step,
        epochs=schedule.total_epochs,
        total_steps=schedule.total_steps,
        address=(metrics.host, metrics.port + accelerator.local_process_index) if metrics.enabled else None,
        stall_seconds=metrics.stall_seconds,
        device=accelerator.device,
        trackers=Trackers(accelerator, path.name, dict(flat(config))),
    )


def preemption_reason(signal: int, unsaved: str) -> str:
    where = f" from an older checkpoint, since this one failed: {unsaved}" if unsaved else ""
    return f"signal {signal}; the same command resumes{where}"


def judge(config: Config, results: dict[str, Evaluation], *, whole: bool) -> tuple[int, str]:
    """Exit code and reason: was the accuracy reached that the configuration expects of a `whole` run?"""
    top1 = max(result.top1 for result in results.values())
    expect = config.expect
    if expect.top1 is None or not whole:
        return EXIT_DONE, f"top-1 {top1:.4f}"
    reached = top1 >= expect.top1 - expect.tolerance
    wanted = f"expected {expect.top1:.4f} within {expect.tolerance:g}" + (
        f" ({expect.source})" if expect.source else ""
    )
    reason = f"top-1 {top1:.4f}, {wanted}: {'reached' if reached else 'missed'}"
    return EXIT_EXPECTATION if expect.enforce and not reached else EXIT_DONE, reason
