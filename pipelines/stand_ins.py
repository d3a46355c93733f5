"""Replace samples whose files turn out to be bad during a run."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.checks.bad_list import BadFile
from pipelines.checks.decode_one import Fault
from pipelines.checks.decode_pool import DecodePool
from pipelines.files.manifest import Manifest
from pipelines.plan import MicroBatch
from pipelines.spec import DataError

NUM_OTHERS = 7  # images tried, to separate a fault of files from one of the file server or the GPU

# DALI's own message, between the lines of its graph and those of its stack; both versions.
_MESSAGE = re.compile(r"encountered:\s*(.*?)\s*(?:Stacktrace|Current pipeline|$)", re.DOTALL)
_SOURCE_LINE = re.compile(r"\[\S+:\d+\]\s*")

# Decodes a part of a batch with DALI and drops the images. Raises RuntimeError or OSError when DALI cannot.
TestDecode = Callable[[MicroBatch], None]


class StandIns:
    """Files of `manifest` that turned out to be bad after it was made, and the samples used instead of them.

    A stand-in is the next sample in the manifest's order, cyclically, that Pillow can read. That depends on
    the files alone, so all ranks find the same one without asking each other. More bad files than the share
    `max_bad_fraction` end the run; a single file does only if that is 0. `processes` test-decode.
    """

    def __init__(self, manifest: Manifest, max_bad_fraction: float, processes: int) -> None:
        self._manifest = manifest
        self._max_bad_fraction = max_bad_fraction
        self._pool = DecodePool(processes)
        self._bad: dict[int, BadFile] = {}
        self._good: set[int] = set()
        self._new: list[BadFile] = []

    def bad_places(self, indices: NDArray[np.int64]) -> list[int]:
        """Return where in `indices` the bad files known so far are."""
        return np.flatnonzero(np.isin(indices, list(self._bad))).tolist()

    def check(self, indices: Iterable[int]) -> bool:
        """Test-decode images with Pillow; return whether another bad file was found.
        Raises DataError for more bad files than allowed, and when the machine cannot read a file.
        """
        unknown = sorted(set(indices) - self._bad.keys())
        before = len(self._bad)
        with self._manifest.files(unknown) as paths:
            results = list(self._pool.check(paths))
        for index, (height, width, fault, _) in zip(unknown, results, strict=True):
            now, was = f"{height}x{width}", f"{self._manifest.heights[index]}x{self._manifest.widths[index]}"
            if not fault and now != was:
                fault = Fault("other", f"is {now} now, was {was} when it was indexed")
            if fault:
                self._add(index, fault)
        return len(self._bad) > before

    def find_undecodable(self, batches: Sequence[MicroBatch], decode: TestDecode, error: Exception) -> None:
        """Find the files that DALI cannot decode although Pillow can, when `check` explains no failure.

        Such are BMPs of 16 bits a pixel (DALI 2.4) and animated WebP (1.34). One of `batches` failed with
        `error`; none if DALI failed before any. Raises DataError: none fails alone, other images fail, too,
        or more files are bad than allowed.
        """
        num_suspects = len({index for batch in batches for index in batch.indices.tolist()})
        what = f"a batch failed twice, but Pillow can read all of the {num_suspects} images in flight"
        if not batches or not self._decodes_another(batches[0], decode):
            raise DataError(f"{what}, and DALI can decode no others either: {_message(error)}") from error
        before = len(self._bad)
        for batch in batches:
            for index, message in _failing_alone(batch, decode):
                if index not in self._bad:
                    self._add(index, Fault("other", f"Pillow can read it, DALI cannot: {message}"))
        if len(self._bad) == before:
            what = f"{what}, and DALI can decode each one alone; together"
            raise DataError(f"{what}: {_message(error)}") from error

    def stand_in(self, index: int) -> int:
        """Return the sample to use instead of `index`. Raises DataError for more bad files than allowed."""
        for step in range(1, len(self._manifest)):
            if (candidate := (index + step) % len(self._manifest)) in self._bad:
                continue
            if candidate in self._good or not self.check([candidate]):
                self._good.add(candidate)
                return candidate
        raise DataError(f"no image can be read: {self._first_bad()}")

    def take_new(self) -> list[BadFile]:
        """Return the bad files found since the last call."""
        new, self._new = self._new, []
        return new

    def close(self) -> None:
        """End the decoding processes."""
        self._pool.close()

    def _decodes_another(self, batch: MicroBatch, decode: TestDecode) -> bool:
        """Return whether one of a few other images can be decoded with a sample's draws."""
        total = len(self._manifest)
        for step in range(1, NUM_OTHERS + 1):
            other = (batch.indices[:1] + step * total // (NUM_OTHERS + 1)) % total
            with contextlib.suppress(RuntimeError, OSError):
                decode(batch.part(slice(1))._replace(indices=other))
                return True
        return False

    def _add(self, index: int, fault: Fault) -> None:
        self._bad[index] = bad_file = BadFile(self._manifest.file(index), *fault)
        self._good.discard(index)
        self._new.append(bad_file)
        share, total = self._max_bad_fraction, len(self._manifest)
        if len(self._bad) > max(int(share * total), int(share > 0)):
            what = f"{len(self._bad)} of {total} images became unreadable during the run"
            limit = f"more than data.max_bad_fraction {share:g} allows"
            raise DataError(f"{self._manifest.root}: {what}, {limit}: {self._first_bad()}")

    def _first_bad(self) -> str:
        return "; ".join(f"{file.path}: {file.reason}" for file in list(self._bad.values())[:3])


def _failing_alone(batch: MicroBatch, decode: TestDecode) -> Iterator[tuple[int, str]]:
    """Yield the samples that cannot be decoded alone, with DALI's message, by trying ever smaller parts."""
    try:
        decode(batch)
    except (RuntimeError, OSError) as error:
        middle = len(batch.indices) // 2
        if not middle:
            yield int(batch.indices[0]), _message(error)
            return
        for half in (slice(middle), slice(middle, None)):
            yield from _failing_alone(batch.part(half), decode)


def _message(error: Exception) -> str:
    """Return what went wrong in one line, without the pages that DALI puts around it."""
    found = _MESSAGE.search(str(error))
    return " ".join(_SOURCE_LINE.sub("", found[1] if found else str(error)).split())
