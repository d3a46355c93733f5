"""Save checkpoints in the background, and remember which one is best."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cmtrain.step.evaluate import Evaluation
from cmtrain.storage.checkpoint_writer import PATIENCE_SECONDS, CheckpointWriter, Outcome
from cmtrain.storage.finite import FiniteCheck, named
from cmtrain.training.run_logger import RunLogger


class Saver:
    """Writes checkpoints on rank 0 and logs how each save ended. `keep`: see checkpoint.drop_old.
    `measure`: what makes a checkpoint the best, see Evaluation.score. `best`: the best one's top-1 and step,
    (0, -1) before the first evaluation. `unsaved`: why the newest state has no checkpoint, "" if it has one.
    `saved_step`: of the newest checkpoint, 0 for none.
    """

    def __init__(self, path: Path, logger: RunLogger, *, keep: int, measure: str = "top1") -> None:
        self.writer = CheckpointWriter(path / "checkpoints")
        self.logger, self.keep, self.measure = logger, keep, measure
        self.best: tuple[float, int] = (0.0, -1)
        self.score = -math.inf
        self.unsaved, self.saved_step, self.last_step = "", 0, -1

    def resume(self, meta: Mapping[str, Any], val_fingerprint: str) -> None:
        """Continue from a checkpoint with this `meta`; its best counts by the same measure and images."""
        score = meta.get("best_score", {"top1": meta["best_top1"]}).get(self.measure)
        if meta.get("val_fingerprint", val_fingerprint) == val_fingerprint and score is not None:
            self.best, self.score = (meta["best_top1"], meta["best_step"]), score

    def is_best(self, results: Mapping[str, Evaluation], step: int) -> bool:
        """Note the result at `step`; return whether it is the run's best."""
        result = max(results.values(), key=lambda result: result.score(self.measure))
        improved = result.score(self.measure) > self.score or self.best[1] < 0
        if improved:
            self.best, self.score = (result.top1, step), result.score(self.measure)
        return improved

    def save(
        self, state: dict[str, Any], step: int, meta: Mapping[str, Any], checked: FiniteCheck, *, last: bool
    ) -> None:
        """Start to write a checkpoint, unless the model was `checked` to be not finite.
        The `last` one exists when this returns. A failure (a full disk) is logged; the run goes on.
        """
        begin, metrics, self.last_step = time.perf_counter(), self.logger.metrics, step
        metrics.enter("checkpoint")
        if checked.repaired:
            metrics.nonfinite("ema", "heal").inc()
            shown = named(checked.repaired)
            self.logger.report("ema_healed", step=step, tensors=list(checked.repaired), shown=shown)
        if self.logger.folder:
            if checked.nonfinite:
                self._log(Outcome(step, None, 0.0, f"the model is not finite: {named(checked.nonfinite)}"))
            else:
                best: dict[str, Any] = {"best_top1": self.best[0], "best_step": self.best[1]}
                if math.isfinite(self.score):
                    best |= {"best_score": {self.measure: self.score}}
                meta = {**meta, **best, "report": asdict(metrics.reported)}
                self.writer.save(step, state, meta, keep=self.keep, last=last)
                self.log_finished()
        metrics.checkpoint_wait.inc(time.perf_counter() - begin)
        metrics.enter("train")

    def log_finished(self) -> None:
        """Log the saves that have ended since the last call. Never waits."""
        for outcome in self.writer.take_outcomes():
            self._log(outcome)

    def _log(self, outcome: Outcome) -> None:
        if outcome.step == self.last_step:  # a save before it may end after it was refused
            self.unsaved = "" if outcome.path else outcome.error
        self.saved_step = outcome.step if outcome.path else self.saved_step
        self.logger.saved(outcome)

    def close(self) -> None:
        """Wait for the save under way, for PATIENCE_SECONDS at most, and log it."""
        self.writer.wait(PATIENCE_SECONDS)
        self.log_finished()
