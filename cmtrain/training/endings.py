"""Describe for people how a run ended, and whether it reached the accuracy that was expected."""

import signal

from cmtrain.config.schema import Config
from cmtrain.errors import EXIT_DONE, EXIT_EXPECTATION
from cmtrain.monitoring.units import percent
from cmtrain.step.evaluate import Evaluation


def stopped_at_once(step: int, saved_step: int) -> str:
    """Describe how a second Ctrl-C ended the run after `step` steps. `saved_step`: as of Saver."""
    where = f"step {saved_step}" if saved_step else "the beginning"
    what = f"stopped at once by a second Ctrl-C at step {step}, not saved"
    return f"{what}; run the same command to continue from {where}"


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
    found = f"mAP {percent(max(precisions))}, " if precisions else ""
    expect = config.expect
    if expect.top1 is None or not whole:
        return EXIT_DONE, f"{found}top-1 {percent(top1)}"
    reached = top1 >= expect.top1 - expect.tolerance
    wanted = f"{percent(expect.top1)} expected" + (f" by {expect.source}" if expect.source else "")
    reason = f"{found}top-1 {percent(top1)}, {wanted}: {'reached' if reached else 'missed'}"
    return EXIT_EXPECTATION if expect.enforce and not reached else EXIT_DONE, reason
