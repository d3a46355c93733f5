"""Send every event of a run to the console, the metrics, the run folder and the experiment trackers."""

import json
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cmtrain.errors import EXIT_DATA
from cmtrain.monitoring import discovery, machine, routes
from cmtrain.monitoring.console import Console, print_result
from cmtrain.monitoring.http_server import Exporter
from cmtrain.monitoring.metrics import TrainMetrics
from cmtrain.monitoring.report.page import write_report
from cmtrain.monitoring.trackers import Trackers
from cmtrain.monitoring.units import duration, is_part, percent, state_name, step_place, workers
from cmtrain.processes.output import lost_output
from cmtrain.processes.preflight import version_of_code
from cmtrain.processes.rank import num_restarts
from cmtrain.step.evaluate import Evaluation, by_class
from cmtrain.step.measure import Pace, StepReport
from cmtrain.storage import run_folder
from cmtrain.storage.checkpoint_writer import Outcome
from cmtrain.storage.records import Losses, finite
from pipelines.checks.bad_list import BadFile, find_list
from pipelines.spec import DataError, print_lines

# Console lines of events, from their fields; `files` of some events are the first of their samples.
LINES = {
    "note": "{text}",
    "loss_spikes": "loss spikes: {count} in steps {first_step}..{last_step}, the highest at step "
    "{worst[step]}: loss {worst[loss]:.4f} ({worst[loss_z]:.1f} sigma), gradient norm "
    "{worst[grad_norm]:.2f} ({worst[grad_norm_z]:.1f} sigma)",
    "bad_batch": "step {step}: too many bad steps; {cause}; of {shown}, ...; look at it by "
    "cmtrain replay {run} --step {step}",
    "rollback": "step {step}: back to the state of step {good_step}, learning rate x {lr_factor:g}",
    "out_of_memory": "step {step}: out of memory; done again, and from now on in passes of "
    "{images_per_pass} images; these have the same pixels and targets, BatchNorm's batches are smaller",
    "ema_healed": "step {step}: EMA not finite, copied from the model again: {shown}",
    "checkpoint_failed": "checkpoint at step {step} failed, older ones are untouched: {error}",
    "checkpoints_not_dropped": "checkpoints that are no longer needed could not be deleted: {error}",
}


@dataclass
class RunLogger:
    """Logs on rank 0 to console, run folder and trackers; on every rank to metrics."""

    path: Path  # the run folder, made on rank 0
    _: KW_ONLY
    rank: int
    world_size: int
    first_step: int  # of this process's part of the run, as the last
    last_step: int
    epochs: int  # of the whole run, as the steps
    total_steps: int
    address: tuple[str, int] | None  # (host, port) to serve metrics at
    stall_seconds: float  # see routes.make_pages
    trackers: Trackers | None = None
    allowed_hosts: Sequence[str] = ()  # see http_server.is_own_host

    def __post_init__(self) -> None:
        self.step = self.first_step
        self.console = Console(enabled=self.rank == 0)
        self.metrics = TrainMetrics(self.path.name, self.rank)
        self.losses = Losses()
        self.folder = run_folder.RunFolder(self.path, self.losses) if self.rank == 0 else None
        self.speed: dict[str, Any] = {}  # at the last log point; the share of waiting is this rank's own
        self.bad_paths: set[str] = set()
        self.pace, self.begin = Pace(), time.monotonic()
        self.failure: dict[str, Any] = {}  # which is written to status.json by report_failure
        self.exporter: Exporter | None = None
        self.target: Path | None = None
        self.metrics_url: str | None = None
        if self.address:
            self._serve(*self.address)

    def _serve(self, host: str, port: int) -> None:
        """Serve metrics; if that fails, log why and go on without them."""
        pages = routes.make_pages(self.metrics, self._status, self.stall_seconds, self.path)
        try:
            self.exporter = Exporter(pages, host, port, self.allowed_hosts)
        except (OSError, UnicodeError) as error:
            self.console.line(f"no metrics: {error}")
            return
        self.metrics_url = f"{self.exporter.url}/metrics"
        place = self.path, self.rank, self.exporter.host, self.exporter.port
        self.target = self.losses.attempt("discovery of metrics", discovery.write_target, *place)
        if self.rank == 0:
            self.losses.attempt("discovery of metrics", discovery.forget_ranks, self.path, self.world_size)

    def _status(self) -> dict[str, Any]:
        return self.folder.snapshot() | self.failure if self.folder else self.speed

    def start(
        self, config_yaml: str, facts: Mapping[str, str], notes: Sequence[str], *, flops_per_image: int,
        device: torch.device, resumed: tuple[Path, StepReport] | None,
    ) -> None:  # fmt: skip
        """Log the start of a run, or of its next part.
        `facts`: see metrics.RUN_FACTS. `resumed`: the checkpoint that this part continues, and the report in
        it. Raises DataError: log or summary cannot be read, and would hold steps twice.
        """
        self.metrics.start(facts, last_step=self.last_step, flops_per_image=flops_per_image, device=device)
        if resumed:
            self.metrics.resume(resumed[1])
        if self.folder:
            self.folder.write("config.yaml", config_yaml)
            for name in (run_folder.MISTAKES_NAME, run_folder.RECEIPT_NAME):  # of an earlier end
                self.losses.attempt(name, (self.path / name).unlink, missing_ok=True)
            self.folder.status(
                state="running", step=self.first_step, last_step=self.last_step,
                total_steps=self.total_steps, metrics_url=self.metrics_url, host=socket.gethostname(),
                exit_code=None, reason=None, result=None, retries=True,
            )  # fmt: skip
            try:
                notes = [*notes, *self.folder.rewind(self.first_step)]
            except OSError as error:
                raise DataError(f"{error.filename or self.path}: {error.strerror or error}") from error
        for note in notes:
            self.report("note", text=note)
        state = "resumed" if resumed else "started"
        self._event(state, step=self.first_step, restarts=num_restarts(), **facts)
        self._event("environment", **machine.environment())
        self.console.line(f"{facts['model']}, {facts['precision']}, {workers(dict(facts))}")
        watch = f"  watch {self.exporter.url}/" if self.exporter else ""
        self.console.line(f"run folder {self.path}{watch}")
        if resumed:
            self.console.line(f"resumed from {resumed[0]}")
        self.console.start(self.first_step, self.last_step)

    def _event(self, kind: str, /, **fields: Any) -> None:
        if self.folder:
            self.folder.event(kind, **fields)

    def report(self, kind: str, /, *, shown: str = "", **fields: Any) -> None:
        """Log an event in the run folder, and its line of LINES, which also has `shown`, on the console."""
        self._event(kind, **fields)
        self.console.line(LINES[kind].format(**fields, shown=shown, run=shlex.quote(str(self.path))))

    # Steps and log points

    def count_step(
        self, step: int, seconds: float, wait_seconds: float, *, num_images: int, **measured: Any
    ) -> None:
        """Count a finished step; all numbers are of this rank. `measured`: see TrainMetrics.count_step."""
        self.step = step
        self.metrics.count_step(step, num_images, seconds=seconds, wait_seconds=wait_seconds, **measured)
        self.pace.step(num_images * self.world_size, seconds, wait_seconds)
        self.console.advance(step, seconds)
        self.report_losses()

    def report_losses(self) -> None:
        """Log which records and which output could not be written, each once, wherever that is possible."""
        for line in [*self.losses.take_news(), *lost_output()]:
            self._event("record_lost", step=self.step, what=line)
            text = f"step {self.step}: the run misses a record and goes on: {line}"
            if self.rank == 0:
                self.console.line(text)
            else:
                print_lines(f"rank {self.rank}: {text}")

    def log(self, report: StepReport) -> None:
        before = self.metrics.reported
        self.metrics.report(report)
        images_per_second, wait_share, step_seconds = self.pace.pop_averages()
        eta_seconds = step_seconds * (self.last_step - report.step)
        self.metrics.eta_timestamp.set(time.time() + eta_seconds)
        speed, share = round(images_per_second, 1), round(wait_share, 4)
        self.speed = {"images_per_second": speed, "data_wait_ratio": share}
        if self.folder:
            record = {key: finite(value) for key, value in asdict(report).items()} | self.speed
            self.folder.log(record | {"time": time.time()})
            self._track(record, report.step)
            news = {"loss": record["loss"], "eta_seconds": round(eta_seconds)}
            self.folder.status(step=report.step, **news, **self.speed)
        since = {"bad": report.bad_steps - before.bad_steps, "restores": report.restores - before.restores}
        if any(since.values()):
            since |= {"step": report.step, "since": before.step}
            self._event("bad_steps", **since, loss_scale=report.loss_scale)
        parts = [f"eta {duration(eta_seconds)}", f"loss {report.loss:.4f}"]
        parts += [f"{images_per_second:,.0f} img/s", f"data {percent(wait_share, 0)}"]
        if report.loss_scale != 1:
            parts.append(f"scale {report.loss_scale:g}")
        if report.bad_steps:
            parts.append(f"skip {report.bad_steps}")
        parts += [f"lr {report.lr:.2e}", f"grad {report.grad_norm:.2f}"]
        place = f"epoch {report.epoch + 1}/{self.epochs} step {report.step}/{self.last_step}"
        self.console.progress(place, *parts)

    def _track(self, record: dict[str, Any], step: int) -> None:
        if self.trackers:
            self.losses.attempt("metrics.trackers", self.trackers.log, record, step)

    # Bad files

    def left_out(self, files: Sequence[BadFile], root: Path) -> None:
        """Log the files that the run begins without. All ranks know the same ones; rank 0 counts them.
        `root`: the training split, to find the list of `cmtrain data check`.
        """
        self.bad_files([files], quiet=True)
        if files:
            where = f": {files[0].path}: {files[0].reason}"
            where += f", and {len(files) - 1:,} more in events.jsonl" if len(files) > 1 else ""
            where = f", see {path}" if (path := find_list(root, files)) else where
            self.console.line(f"{len(files):,} bad files are left out{where}")

    def bad_files(self, by_rank: Sequence[Sequence[BadFile]], *, quiet: bool = False) -> None:
        """Log each bad file once, whichever ranks met it; the first of them counts it."""
        for rank, files in enumerate(by_rank):
            for file in files:
                if file.path in self.bad_paths:
                    continue
                self.bad_paths.add(file.path)
                if rank == self.rank:
                    self.metrics.decode_errors(file.kind).inc()
                self._event("bad_file", path=file.path, reason=file.reason, kind=file.kind)
                if not quiet:
                    self.console.line(f"bad file, replaced from now on: {file.path}: {file.reason}")

    # Evaluations and checkpoints

    def evaluated(
        self, results: Mapping[str, Evaluation], class_names: Sequence[str], *, epoch: int, step: int,
        lr: float, seconds: float, best: tuple[float, int],
    ) -> None:  # fmt: skip
        """Log evaluations by weights, which took `seconds`. `best`: the run's best top-1, and its step."""
        reported = self.metrics.reported
        train_loss = finite(reported.loss) if reported.step else None  # None: before the first log point
        row: dict[str, Any] = {"epoch": epoch, "step": step, "train_loss": train_loss, "lr": lr}
        for weights, result in results.items():
            my_share = range(self.rank, result.num_images, self.world_size)
            self.metrics.evaluated(weights, result, len(my_share))
            prefix = "eval" if weights == "model" else f"eval_{weights}"
            row |= {f"{prefix}_{key}": value for key, value in result.figures.items()}
            mean_precision = "" if result.map is None else f"mAP {percent(result.map)} "
            line = f"epoch {epoch}/{self.epochs} {weights} {mean_precision}top-1 {percent(result.top1)}"
            images = [count for count in result.class_images if count]
            if max(images, default=0) >= 2 * min(images, default=1):  # top-1 says little of rare classes
                line += f" balanced {percent(result.balanced)}"
            line += f" top-5 {percent(result.top5)} loss {result.loss:.4f} on {result.num_images:,} images"
            if result.num_unreadable:
                line += f", {result.num_unreadable} unreadable ones counted as wrong"
            self.console.line(line)
        self.metrics.best_accuracy.set(best[0])
        if self.folder:
            self.folder.summary(row)
            self._track(row, step)
            content = json.dumps(by_class(dict(results), class_names, step))
            self.folder.write(run_folder.CLASSES_NAME, f"{content}\n")
            best_of = {"top1": max(result.top1 for result in results.values())}
            if precisions := [result.map for result in results.values() if result.map is not None]:
                best_of["map"] = max(precisions)
            self._event("evaluated", step=step, **best_of, seconds=round(seconds, 3))
            self.folder.status(step=step, best_top1=best[0], best_step=best[1])
        self.metrics.enter("train")

    def saved(self, outcome: Outcome) -> None:
        """Log how the save of a checkpoint ended."""
        step, error = outcome.step, outcome.error
        if outcome.path is None:
            self.metrics.checkpoint_failures.inc()
            self.report("checkpoint_failed", step=step, error=error)
            return
        self.metrics.saved(outcome.seconds, outcome.num_bytes)
        self._event("checkpoint", step=step, path=str(outcome.path), seconds=round(outcome.seconds, 3))
        if self.folder:
            self.folder.status(resume_from=str(outcome.path))
        if error:
            self.report("checkpoints_not_dropped", error=error)

    # The end

    def finish(
        self, state: str, *, exit_code: int, reason: str, results: Mapping[str, Evaluation] | None = None,
        as_json: bool = False,
    ) -> int:  # fmt: skip
        """Write how the run ended: status.json, report.html, the console, a JSON line (see print_result).
        Returns the exit code: `exit_code`, or 3 where status.json could not be written.
        """
        self.console.stop()
        if self.trackers:
            self.losses.attempt("metrics.trackers", self.trackers.close)
        if self.folder:
            result = self._result(state, results) if results else None
            end: dict[str, Any] = {"step": self.step, "exit_code": exit_code, "reason": reason}
            self._event(state, **end)
            self.report_losses()  # before status.json, which has them
            is_written = self.folder.status(state=state, result=result, retries=True, **end)
            status = self.folder.snapshot()
            place = f", {step_place(status, self.step)}" if is_part(status) else ""
            self.console.line(reason if state == "preempted" else f"{state_name(status)}{place}: {reason}")
            facts = {"code": version_of_code(), "environment": machine.environment(), "result": result}
            self.losses.attempt(run_folder.RECEIPT_NAME, run_folder.write_receipt, self.path, facts)
            report_path = self.path / run_folder.REPORT_NAME
            if self.losses.attempt(run_folder.REPORT_NAME, write_report, [self.path], report_path):
                self.console.line(f"report {report_path}")
            if result:
                print_result(result, asked=as_json)
            if not is_written:
                exit_code, what = EXIT_DATA, "status.json does not say how the run ended"
                self.console.line(f"{self.path}: {what}; run the same command again")
        self._close(waits=state != "preempted")
        return exit_code

    def fail(self, reason: str, *, waits: bool) -> None:
        """Print why the run failed; the failure itself is in the run folder already."""
        self.console.stop()
        self.console.line(f"failed: {reason}")
        self.failure = {"state": "failed", "reason": reason, "updated": time.time()}
        self._close(waits=waits)

    def _close(self, *, waits: bool) -> None:
        """Stop serving; if it `waits`, a browser that shows the live page fetches its last state first."""
        if self.target:
            self.losses.attempt("discovery of metrics", self.target.unlink, missing_ok=True)
        if self.exporter:
            if waits and self.rank == 0:
                self.exporter.linger("/")
            self.exporter.close()
        self.report_losses()

    def _result(self, state: str, results: Mapping[str, Evaluation]) -> dict[str, Any]:
        measured = {
            f"{'' if weights == 'model' else weights + '_'}{key}": finite(value)
            for weights, evaluation in results.items()
            for key, value in evaluation.figures.items()
        }
        return {
            "state": state, **measured, "num_images": results["model"].num_images,
            "num_unreadable": results["model"].num_unreadable, "step": self.last_step,
            "images_per_second": self.pace.images_per_second,
            "train_seconds": round(time.monotonic() - self.begin, 1), "run_dir": str(self.path),
            "metrics_url": self.metrics_url, "augmented": str(self.path / run_folder.SAMPLE_NAME),
            "report": str(self.path / run_folder.REPORT_NAME),
        }  # fmt: skip
