"""What a process has learnt about unreadable files while it runs, and what stands in for them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.checks.decode_pool import Judges
from pipelines.files.manifest import BadFile, Manifest
from pipelines.plan import MicroBatch
from pipelines.spec import DataError

NUM_OTHERS = 7  # images that are tried to tell a fault of files from one of the file server or the GPU

# What DALI says between the lines of its graph and those of its stack; both versions.
_WORDS = re.compile(r"encountered:\s*(.*?)\s*(?:Stacktrace|Current pipeline|$)", re.DOTALL)
_SOURCE_LINE = re.compile(r"\[\S+:\d+\]\s*")


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

    def examine_alone(
        self, batches: Sequence[MicroBatch], decode: Callable[[MicroBatch], None], error: Exception
    ) -> None:
        """Finds the files that DALI cannot decode although Pillow can, when a batch fails and `examine` finds nothing.

        DALI 2.4 does not decode a BMP of 16 bits a pixel, for one, and 1.34 no animated WebP.

        Args:
            batches: one of which failed; none if that happened before the first of them.
            decode: decodes a part of a batch with DALI; raises RuntimeError or OSError when it cannot.
            error: with which the batch failed.

        Raises:
            DataError: none fails alone, other images fail, too, or more files are bad than allowed.
        """
        num_suspects = len({index for batch in batches for index in batch.indices.tolist()})
        what = f"a batch failed twice, but Pillow can read all of the {num_suspects} images in flight"
        if not batches or not self._decodes_another(batches[0], decode):
            raise DataError(f"{what}, and DALI can decode no others either: {_words(error)}") from error
        before = len(self._reasons)
        for batch in batches:
            for index, words in _failing_alone(batch, decode):
                if index not in self._reasons:
                    self._found(index, f"Pillow can read it, DALI cannot: {words}")
        if len(self._reasons) == before:
            raise DataError(
                f"{what}, and DALI can decode each one alone; together: {_words(error)}"
            ) from error

    def stand_in(self, index: int) -> int:
        """The sample to use instead of `index`. Raises DataError when there are more bad files than allowed."""
        for step in range(1, len(self._manifest)):
            candidate = (index + step) % len(self._manifest)
            if (
                candidate not in self._good
                and candidate not in self._reasons
                and not self.examine([candidate])
            ):
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

    def _decodes_another(self, batch: MicroBatch, decode: Callable[[MicroBatch], None]) -> bool:
        """Whether any of a few images, spread over the manifest, can be decoded with the draws of one of `batch`."""
        one, total = batch._replace(copies=batch.copies[:1]), len(self._manifest)
        for step in range(1, NUM_OTHERS + 1):
            other = (batch.indices[:1] + step * total // (NUM_OTHERS + 1)) % total
            with contextlib.suppress(RuntimeError, OSError):
                decode(one._replace(indices=other))
                return True
        return False

    def _found(self, index: int, reason: str) -> None:
        self._reasons[index] = reason
        self._good.discard(index)
        self._untold.append(BadFile(self._manifest.file(index), reason))
        share, total = self._max_bad_fraction, len(self._manifest)
        if len(self._reasons) > max(int(share * total), int(share > 0)):
            named = "; ".join(
                f"{self._manifest.file(i)}: {why}" for i, why in list(self._reasons.items())[:3]
            )
            raise DataError(
                f"{self._manifest.root}: {len(self._reasons)} of {total} images became unreadable during the run, more "
                f"than data.max_bad_fraction {share:g} allows: {named}"
            )


def _failing_alone(batch: MicroBatch, decode: Callable[[MicroBatch], None]) -> Iterator[tuple[int, str]]:
    """The samples of `batch` that cannot be decoded by themselves and what DALI says, by trying ever smaller parts."""
    try:
        decode(batch)
    except (RuntimeError, OSError) as error:
        middle = len(batch.indices) // 2
        if not middle:
            yield int(batch.indices[0]), _words(error)
            return
        for half in (slice(middle), slice(middle, None)):
            yield from _failing_alone(
                batch._replace(indices=batch.indices[half], copies=batch.copies[half]), decode
            )


def _words(error: Exception) -> str:
    """What went wrong in one line, without the pages that DALI puts around it."""
    found = _WORDS.search(str(error))
    return " ".join(_SOURCE_LINE.sub("", found[1] if found else str(error)).split())
