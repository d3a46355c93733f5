"""What a process has learnt about unreadable files while it runs, and what stands in for them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pipelines.check import Judges
from pipelines.dataset import BadFile, Manifest
from pipelines.spec import DataError


class BadFiles:
    """Files of `manifest` that turned out to be bad after it was made.

    The stand-in of a sample is the next one in the manifest's order that Pillow can read, cyclically. That depends on
    the files alone, so every rank of any number of ranks finds the same one without asking the others.

    Args:
        max_bad_fraction: more bad files than this share of the manifest end the run, but one file alone never does
            unless the share is 0.
        processes: that decode suspects.
    """

    def __init__(self, manifest: Manifest, max_bad_fraction: float, processes: int) -> None:
        self._manifest = manifest
        self._max_bad_fraction = max_bad_fraction
        self._judges = Judges(processes, decode=True)
        self._reasons: dict[int, str] = {}
        self._good: set[int] = set()
        self._untold: list[BadFile] = []

    def places(self, indices: NDArray[np.int64]) -> list[int]:
        """Where in `indices` the bad files known so far are."""
        return np.flatnonzero(np.isin(indices, list(self._reasons))).tolist()

    def examine(self, indices: Iterable[int]) -> bool:
        """Decodes the images at `indices`; returns whether one was found bad that was not known to be.

        Raises:
            DataError: more bad files than allowed.
        """
        unknown = sorted(set(indices) - self._reasons.keys())
        before = len(self._reasons)
        with self._manifest.files(unknown) as paths:
            verdicts = list(self._judges.verdicts(paths))
        for index, (height, width, reason) in zip(unknown, verdicts, strict=True):
            expected = int(self._manifest.heights[index]), int(self._manifest.widths[index])
            if not reason and (height, width) != expected:
                reason = f"is {height}x{width} now, was {expected[0]}x{expected[1]} when it was indexed"
            if reason:
                self._found(index, reason)
        return len(self._reasons) > before

    def stand_in(self, index: int) -> int:
        """The sample to use instead of `index`. Raises DataError when there are more bad files than allowed."""
        for step in range(1, len(self._manifest)):
            candidate = (index + step) % len(self._manifest)
            if candidate not in self._good and candidate not in self._reasons and not self.examine([candidate]):
                self._good.add(candidate)
            if candidate in self._good:
                return candidate
        raise DataError(f"{self._manifest.root}: no image can be read")

    def take_untold(self) -> list[BadFile]:
        """The bad files found since the last call."""
        untold, self._untold = self._untold, []
        return untold

    def close(self) -> None:
        """Ends the decoding processes."""
        self._judges.close()

    def _found(self, index: int, reason: str) -> None:
        self._reasons[index] = reason
        self._good.discard(index)
        self._untold.append(BadFile(self._manifest.file(index), reason))
        share, total = self._max_bad_fraction, len(self._manifest)
        if len(self._reasons) > max(int(share * total), int(share > 0)):
            named = "; ".join(f"{self._manifest.file(i)}: {why}" for i, why in list(self._reasons.items())[:3])
            raise DataError(
                f"{self._manifest.root}: {len(self._reasons)} of {total} images became unreadable during the run, more "
                f"than data.max_bad_fraction {share:g} allows: {named}"
            )
