"""Find and draw the images whose class a model missed, the most confident answers first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from cmtrain.config.schema import Config
from cmtrain.monitoring.units import percent
from cmtrain.step.evaluate import THRESHOLD, Evaluation
from cmtrain.training import loaders
from pipelines.files.manifest import Manifest
from pipelines.preview import MAX_IMAGES, contact_sheet
from pipelines.spec import Placement


def draw_mistakes(
    path: Path, evaluation: Evaluation, manifest: Manifest, labels: Sequence[str], config: Config,
    accelerator: Accelerator, place: Placement | None = None,
) -> list[list[Any]]:  # fmt: skip
    """Draw the first MAX_IMAGES mistakes as the model sees them, with both classes; none: no picture.

    `labels`: a name for each output. Returns a row for each mistake: path, true and predicted class,
    probability. Raises OSError: `path` cannot be written.
    """
    # Find
    predicted, confidence = evaluation.ranked[:, 0].numpy(), evaluation.confidence.numpy()
    missed = ~manifest.are_of(predicted) & (predicted >= 0)
    if manifest.label_sets is not None:  # of no class is right, unless a class is likely
        missed &= manifest.label_sets[manifest.labels].any(1) | (confidence >= THRESHOLD)
    wrong = np.flatnonzero(missed)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    rows = [
        [manifest.file(index), manifest.label_name(true), labels[predicted[index]], confidence[index]]
        for index, true in zip(wrong.tolist(), manifest.labels[wrong], strict=True)
    ]

    # Draw
    path.unlink(missing_ok=True)
    if rows:
        place = place or Placement(prefetch_batches=1)  # on the CPU
        shown = manifest.select(wrong[:MAX_IMAGES])
        loader = loaders.make_eval_loader(config, shown, len(shown), accelerator, place)
        (batch,) = loader.epoch(0)
        captions = [[f"true: {true}", f"{percent(share)} {name}"] for _, true, name, share in rows]
        contact_sheet(batch.images, config.data.mean, config.data.std, path, captions=captions)
        loader.close()
    return rows
