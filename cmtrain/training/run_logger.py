"""Everything a run says, in one place: console, metrics and run folder are told the same things together."""

import json
import math
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cmtrain.monitoring.console import Console
from cmtrain.monitoring.discovery import forget_ranks, write_target
from cmtrain.monitoring.http_server import Exporter
from cmtrain.monitoring.machine import environment, gpu_identity, memory_bytes
from cmtrain.monitoring.metrics import TrainMetrics
from cmtrain.monitoring.report.page import write_report
from cmtrain.monitoring.routes import make_pages
from cmtrain.monitoring.trackers import Trackers
from cmtrain.monitoring.units import duration
from cmtrain.processes.rank import num_restarts
from cmtrain.step.evaluate import Evaluation, by_class
from cmtrain.step.measure import Pace, StepReport, Stopwatch
from cmtrain.step.spikes import Spike
from cmtrain.storage.checkpoint import Loaded
from cmtrain.storage.checkpoint_writer import PATIENCE_SECONDS, CheckpointWriter, Outcome
from cmtrain.storage.finite import FiniteCheck, named
from cmtrain.storage.run_folder import REPORT_NAME, SAMPLE_NAME, RunFolder, finite
from cmtrain.training.recovery import Finding
from pipelines.checks.decode_one import kind_of
from pipelines.files.manifest import BadFile
from pipelines.preview import contact_sheet
from pipelines.spec import Batch, Channels

NUM_NAMED = 3  # files named on the console; all of them are in events.jsonl


class Journal:
    """Rank 0 writes the run folder and the console; every rank serves metrics.

    Args:
        path: the run folder; made here, on rank 0.
        first_step, last_step: of this process's part of the run.
        epochs, total_steps: of the whole run.
        address: (host, port) to serve metrics at, None for no metrics.
        stall_seconds: see pages.make_pages.
        device: that this rank computes on.
        trackers: experiment trackers to tell, too.
    """

    def __init__(
        self,
        path: Path,
        *,
        rank: int,
        world_size: int,
        first_step: int,
        last_step: int,
        epochs: int,
        total_steps: int,
        address: tuple[str, int] | None,
        stall_seconds: float,
        device: torch.device,
        trackers: Trackers | None = None,
    ) -> None:
        self.path, self.world_size, self.last_step, self.epochs = path, world_size, last_step, epochs
        self.total_steps = total_steps
        self.console = Console(enabled=rank == 0)
        self.metrics = TrainMetrics(path.name, rank)
        self.trackers = trackers
        self.folder = RunFolder(path) if rank == 0 else None
        self.writer = CheckpointWriter(path / "checkpoints")
        self.unsaved = ""  # why the state that the run ends with has no checkpoint
        self.device = device
        self.speed: dict[str, Any] = {}  # at the last log point; the share of waiting is this rank's own
        self.metrics_url: str | None = None
        self.exporter: Exporter | None = None
        self.target: Path | None = None
        if address:
            self._serve(address, stall_seconds)
        self.best_top1, self.best_step = 0.0, -1
        self.bad_paths: set[str] = set()
        self.train_loss = math.nan
        self.clock = Stopwatch()
        self.pace = Pace()
        self.first_step, self.begin = first_step, time.monotonic()
        self.step = first_step

    def _serve(self, address: tuple[str, int], stall_seconds: float) -> None:
        """Serve metrics, or say why not: a run does without."""
        try:
            status = self.folder.snapshot if self.folder else lambda: self.speed
            pages = make_pages(self.metrics, status, stall_seconds, self.path)
            self.exporter = Exporter(pages, *address)
            self.metrics_url = f"{self.exporter.url}/metrics"
            self.target = write_target(self.path, self.metrics.rank, self.exporter.host, self.exporter.port)
            if self.metrics.rank == 0:
                forget_ranks(self.path, self.world_size)
        except OSError as error:
            self.console.line(f"{'no discovery of metrics' if self.exporter else 'no metrics'}: {error}")

    def start(
        self,
        config_yaml: str,
        facts: dict[str, str],
        checkpoint: Loaded | None,
        notes: Sequence[str],
        *,
        flops_per_image: int,
    ) -> None:
        """Begin, or go on after `checkpoint`. `notes`: lines the user should see."""
        metrics = self.metrics
        metrics.one(metrics.steps_target).set(self.last_step)
        metrics.one(metrics.run_info, *facts.values()).set(1)
        metrics.one(metrics.flops_per_image).set(flops_per_image)
        if identity := gpu_identity(self.device):
            metrics.one(metrics.gpu_info, *identity).set(1)
        if checkpoint:
            metrics.resume(StepReport(**checkpoint.meta["report"]))
            self.best_top1, self.best_step = checkpoint.meta["best_top1"], checkpoint.meta["best_step"]
            self.train_loss = metrics.reported.loss
        if self.folder:
            self.folder.write_config(config_yaml)
            self.folder.rewind(self.first_step)
            self.folder.status(
                state="running", step=self.first_step, last_step=self.last_step, total_steps=self.total_steps,
                metrics_url=self.metrics_url, exit_code=None, reason=None, result=None, host=socket.gethostname(),
            )  # fmt: skip
        for note in notes:
            self.console.line(note)
            self.event("note", text=note)
        self.event(
            "resumed" if checkpoint else "started", step=self.first_step, restarts=num_restarts(), **facts
        )
        self.event("environment", **environment())
        self.console.line(" ".join(f"{key} {value}" for key, value in facts.items()))
        self.console.line(
            f"run folder {self.path}" + (f"  metrics {self.metrics_url}" if self.metrics_url else "")
        )
        if checkpoint:
            self.console.line(f"resumed from {checkpoint.path}")
        self.console.start(self.first_step, self.last_step)
        self.clock.lap()

    def event(self, kind: str, /, **fields: Any) -> None:
        if self.folder:
            self.folder.event(kind, **fields)

    def left_out(self, files: Sequence[BadFile]) -> None:
        """Say which files the run begins without; every rank knows the same ones, and rank 0 counts them."""
        self.bad_files([files], quiet=True)
        if files:
            named = "; ".join(f"{file.path}: {file.reason}" for file in files[:NUM_NAMED])
            more = f"; and {len(files) - NUM_NAMED:,} more in events.jsonl" if len(files) > NUM_NAMED else ""
            self.console.line(f"{len(files):,} bad files are left out: {named}{more}")

    def bad_files(self, by_rank: Sequence[Sequence[BadFile]], *, quiet: bool = False) -> None:
        """Say each bad file once, whichever ranks met it; the first of them counts it."""
        for rank, files in enumerate(by_rank):
            for file in files:
                if file.path in self.bad_paths:
                    continue
                self.bad_paths.add(file.path)
                kind = kind_of(file.reason)
                if rank == self.metrics.rank:
                    self.metrics.one(self.metrics.decode_errors, kind).inc()
                self.event("bad_file", path=file.path, reason=file.reason, kind=kind)
                if not quiet:
                    self.console.line(f"bad file, replaced from now on: {file.path}: {file.reason}")

    def sample(self, batches: Iterator[Batch], mean: Channels, std: Channels) -> Iterator[Batch]:
        """Pass `batches` on; the first one is also drawn into the run folder, for people to look at."""
        first = next(batches)
        if self.folder:
            contact_sheet(first.images, mean, std, self.path / SAMPLE_NAME)
        self.clock.lap()  # building the pipeline is not a step's time
        yield first
        yield from batches

    def count_step(
        self, step: int, num_images: int, num_bytes: int, phases: Sequence[Mapping[str, float]]
    ) -> None:
        """After every step; `num_images` of `num_bytes` on this rank. `phases`: see TrainMetrics.count_step."""
        self.step = step
        seconds, waited = self.clock.lap()
        self.metrics.count_step(
            step,
            num_images=num_images,
            num_bytes=num_bytes,
            seconds=seconds,
            wait_seconds=waited,
            phases=phases,
        )
        self.pace.step(num_images * self.world_size, seconds, waited)
        self.console.advance(step)
        self._tell_saves()
        if self.folder and self.folder.trouble:
            self.console.line(
                f"step {step}: the run folder misses a record, training goes on: {self.folder.trouble}"
            )
            self.folder.trouble = ""

    def log(self, report: StepReport) -> None:
        """At every log point."""
        before = self.metrics.reported
        self.metrics.report(report)
        for kind, num_bytes in memory_bytes(self.device).items():
            self.metrics.one(self.metrics.gpu_memory, kind).set(num_bytes)
        self.train_loss = report.loss
        images_per_second, wait_share, step_seconds = self.pace.take()
        eta_seconds = step_seconds * (self.last_step - report.step)
        self.metrics.one(self.metrics.eta_timestamp).set(time.time() + eta_seconds)
        self.speed = speed = {
            "images_per_second": round(images_per_second, 1),
            "data_wait_ratio": round(wait_share, 4),
        }
        if self.folder:
            record = {key: finite(value) for key, value in asdict(report).items()}
            self.folder.log(record | speed | {"time": time.time()})
            self._track(record | speed, report.step)
            self.folder.status(
                step=report.step, loss=record["loss"], eta_seconds=round(eta_seconds), **speed
            )
        bad, restores = report.bad_steps - before.bad_steps, report.restores - before.restores
        if bad or restores:
            self.event(
                "bad_steps",
                step=report.step,
                since=before.step,
                bad=bad,
                restores=restores,
                loss_scale=report.loss_scale,
            )
        self.console.progress(
            f"epoch {report.epoch + 1}/{self.epochs} step {report.step}/{self.last_step} loss {report.loss:.4f} "
            f"lr {report.lr:.2e} grad {report.grad_norm:.2f} {images_per_second:,.0f} img/s data {wait_share:.0%} "
            f"scale {report.loss_scale:g} skip {report.bad_steps} eta {duration(eta_seconds)}"
        )

    def evaluated(
        self, results: dict[str, Evaluation], class_names: Sequence[str], *, epoch: int, step: int, lr: float
    ) -> bool:
        """Record the evaluations of `model` and, if there is one, `ema`. Returns whether top-1 is the run's best."""
        metrics = self.metrics
        seconds, _ = self.clock.lap()
        row: dict[str, Any] = {"epoch": epoch, "step": step, "train_loss": finite(self.train_loss), "lr": lr}
        for weights, result in results.items():
            metrics.one(metrics.eval_accuracy, "1", weights).set(result.top1)
            metrics.one(metrics.eval_accuracy, "5", weights).set(result.top5)
            metrics.one(metrics.eval_loss, weights).set(result.loss)
            metrics.one(metrics.images, "eval").inc(
                len(range(metrics.rank, result.num_images, self.world_size))
            )
            prefix = "eval" if weights == "model" else f"eval_{weights}"
            row |= {
                f"{prefix}_loss": result.loss,
                f"{prefix}_top1": result.top1,
                f"{prefix}_top5": result.top5,
            }
            self.console.line(
                f"epoch {epoch}/{self.epochs} {weights} top1 {result.top1:.4f} top5 {result.top5:.4f} "
                f"loss {result.loss:.4f} on {result.num_images} images"
                + (
                    f", {result.num_unreadable} unreadable ones counted as wrong"
                    if result.num_unreadable
                    else ""
                )
            )
        top1 = max(result.top1 for result in results.values())
        best = top1 > self.best_top1 or self.best_step < 0
        if best:
            self.best_top1, self.best_step = top1, step
        metrics.one(metrics.best_accuracy).set(self.best_top1)
        if self.folder:
            self.folder.summary(row)
            self._track(row, step)
            self.folder.classes(by_class(results, class_names, step))
            self.event("evaluated", step=step, top1=top1, seconds=round(seconds, 3))
            self.folder.status(step=step, best_top1=self.best_top1, best_step=self.best_step)
        metrics.enter("train")
        self.clock.lap()
        return best

    def _track(self, record: dict[str, Any], step: int) -> None:
        if self.trackers and (trouble := self.trackers.log(record, step)):
            self.console.line(trouble)

    def spiked(self, spikes: Sequence[Spike], batch: Sequence[int], files: Sequence[str]) -> None:
        """Loss spikes since the last log point; `batch`: the samples of the highest one, `files`: some of them."""
        worst = max(spikes, key=lambda spike: spike.z)
        first, last = spikes[0].step, spikes[-1].step
        self.event(
            "loss_spikes", first_step=first, last_step=last, count=len(spikes), worst=asdict(worst),
            samples=list(batch), files=list(files),
        )  # fmt: skip
        self.console.line(
            f"loss spikes: {len(spikes)} in steps {first}..{last}, the highest at step {worst.step}: "
            f"loss {worst.loss:.4f} ({worst.loss_z:.1f} sigma), gradient norm {worst.grad_norm:.2f} "
            f"({worst.grad_norm_z:.1f} sigma)"
        )

    def bad_batch(self, step: int, found: Finding, files: Sequence[str]) -> None:
        """What the last of too many bad steps in a row was about; `files`: some of its samples."""
        self.event("bad_batch", step=step, **asdict(found), files=list(files))
        self.console.line(f"step {step}: too many bad steps; {found.cause}; of {'; '.join(files)}, ...")

    def rolled_back(self, step: int, good_step: int, cause: str, lr_factor: float) -> None:
        """Trouble was answered by going back to a good state."""
        self.metrics.one(self.metrics.rollbacks).inc()
        self.event("rollback", step=step, good_step=good_step, cause=cause, lr_factor=lr_factor)
        self.console.line(
            f"step {step}: back to the state of step {good_step}, learning rate x {lr_factor:g}"
        )
        self.clock.lap()

    def save(
        self,
        state: dict[str, Any],
        step: int,
        meta: dict[str, Any],
        check: FiniteCheck,
        *,
        keep: int,
        last: bool,
    ) -> None:
        """Have a checkpoint written, on rank 0, if `check` allows it; the `last` one is there when this returns.

        A failure (a full disk) is told and counted, and does not end the run.
        """
        begin = time.perf_counter()
        self.metrics.enter("checkpoint")
        if check.repaired:
            self.metrics.one(self.metrics.nonfinite, "ema", "heal").inc()
            self.event("ema_healed", step=step, tensors=list(check.repaired))
            self.console.line(
                f"step {step}: EMA not finite, taken from the model anew: {named(check.repaired)}"
            )
        if self.folder:
            if check.nonfinite:
                error = f"the model is not finite: {named(check.nonfinite)}"
                self._save_ended(Outcome(step, None, 0.0, error))
            else:
                meta = meta | {
                    "best_top1": self.best_top1,
                    "best_step": self.best_step,
                    "report": asdict(self.metrics.reported),
                }
                self.writer.save(step, state, meta, keep=keep, last=last)
                self._tell_saves()
        self.metrics.one(self.metrics.checkpoint_wait_seconds).inc(time.perf_counter() - begin)
        self.metrics.enter("train")
        self.clock.lap()

    def _tell_saves(self) -> None:
        for outcome in self.writer.take_outcomes():
            self._save_ended(outcome)

    def _save_ended(self, outcome: Outcome) -> None:
        metrics, step = self.metrics, outcome.step
        self.unsaved = "" if outcome.path else outcome.error
        if outcome.path is None:
            metrics.one(metrics.checkpoint_failures).inc()
            self.event("checkpoint_failed", step=step, error=outcome.error)
            self.console.line(f"checkpoint at step {step} failed, older ones are untouched: {outcome.error}")
            return
        metrics.one(metrics.checkpoint_seconds).observe(outcome.seconds)
        metrics.one(metrics.checkpoint_timestamp).set(time.time())
        metrics.one(metrics.checkpoint_bytes).set(outcome.num_bytes)
        self.event("checkpoint", step=step, path=str(outcome.path), seconds=round(outcome.seconds, 3))
        if self.folder:
            self.folder.status(resume_from=str(outcome.path))
        if outcome.error:
            self.event("checkpoints_not_dropped", error=outcome.error)
            self.console.line(f"checkpoints that are no longer needed could not be deleted: {outcome.error}")

    def finish(
        self, state: str, *, exit_code: int, reason: str, results: dict[str, Evaluation] | None = None
    ) -> None:
        """The last word: status.json, and for a finished run one JSON line on stdout."""
        self.console.stop()
        self.writer.wait(PATIENCE_SECONDS)
        self._tell_saves()
        if self.trackers and (trouble := self.trackers.close()):
            self.console.line(trouble)
        if self.folder:
            result = self._result(state, results) if results else None
            self.folder.status(
                state=state, step=self.step, exit_code=exit_code, reason=reason, result=result
            )
            self.event(state, step=self.step, exit_code=exit_code, reason=reason)
            self.console.line(f"{state}: {reason}")
            self._report()
            if result:
                print(json.dumps(result), flush=True)  # noqa: T201
        self._close()

    def give_up(self, reason: str) -> None:
        """The last word of a run that failed; rank.report_failure has written it down."""
        self.console.stop()
        self.console.line(f"failed: {reason}")
        self._close()

    def _close(self) -> None:
        if self.target:
            self.target.unlink(missing_ok=True)
        if self.exporter:
            self.exporter.close()

    def _report(self) -> None:
        try:
            write_report([self.path], self.path / REPORT_NAME)
        except (
            Exception
        ) as error:  # whatever is wrong with the report, the run is over and its exit code stands
            self.console.line(f"no report: {type(error).__name__}: {error}")

    def _result(self, state: str, results: dict[str, Evaluation]) -> dict[str, Any]:
        measured = {
            f"{'' if weights == 'model' else weights + '_'}{key}": finite(getattr(evaluation, key))
            for weights, evaluation in results.items()
            for key in ("top1", "top5", "loss")
        }
        return {
            "state": state,
            **measured,
            "num_images": results["model"].num_images,
            "num_unreadable": results["model"].num_unreadable,
            "step": self.last_step,
            "images_per_second": self.pace.images_per_second,
            "train_seconds": round(time.monotonic() - self.begin, 1),
            "run_dir": str(self.path),
            "metrics_url": self.metrics_url,
            "augmented": str(self.path / SAMPLE_NAME),
            "report": str(self.path / REPORT_NAME),
        }
