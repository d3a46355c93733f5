"""What went wrong, said once a run of bad steps is given up: the first layer that overflowed, and on which samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmtrain.step.learner import Learner
from cmtrain.step.measure import samples_of


@dataclass(frozen=True)
class Finding:
    """What one rank, or all of them together, found in the last step.

    `cause`: one line. `suspects`: samples whose activations are not finite in the layer that it names; where images are
    mixed, the one that each was mixed with is as suspect. `samples`: all samples of the step.
    """

    cause: str
    suspects: tuple[int, ...]
    samples: tuple[int, ...]


def examine(learner: Learner) -> Finding:
    """Run the model once more on this rank's last micro-batch and look for the first module whose output is not finite.

    Synchronises; meant for the moment before a rollback. BatchNorm's statistics are put back. `cause` reads like
    `stem.conv2: not finite in 5 of 16 images, largest finite value 6.5e+04`, or is empty if all is finite.
    """
    batch = samples_of(learner.last_indices[-1:])
    cause, suspects = "", list[int]()

    def look(name: str, output: Tensor) -> None:
        nonlocal cause
        finite = torch.isfinite(output)
        if cause or finite.all():
            return
        where = ""
        if len(output) == len(batch):  # not so for a table of position biases
            bad = (~finite).flatten(1).any(1)  # (B,)
            suspects.extend(sample for sample, is_bad in zip(batch, bad.tolist(), strict=True) if is_bad)
            where = f" in {len(suspects)} of {len(batch)} images"
        largest = f"{output[finite].abs().max().item():.1e}" if finite.any() else "none"
        cause = f"{name}: not finite{where}, largest finite value {largest}"

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: look(name, output)

    leaves = [(name, module) for name, module in learner.model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(hook_of(name)) for name, module in leaves]
    try:
        # A compiled model does not look for hooks that were not there when it was compiled.
        with torch.compiler.set_stance("force_eager"):
            learner.replay()
    finally:
        for handle in handles:
            handle.remove()
    return Finding(cause, tuple(suspects), tuple(samples_of(learner.last_indices)))


def conclude(findings: Sequence[Finding]) -> Finding:
    """What all ranks found, given what each of them did: the first cause, named by rank, and everybody's samples."""
    causes = [f"rank {rank}: {finding.cause}" for rank, finding in enumerate(findings) if finding.cause]
    if len(findings) == 1:
        causes = [finding.cause for finding in findings if finding.cause]
    return Finding(
        causes[0] if causes else "every value of the last forward pass was finite",
        tuple(sample for finding in findings for sample in finding.suspects),
        tuple(sample for finding in findings for sample in finding.samples),
    )
