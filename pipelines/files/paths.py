"""A million paths in one buffer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BLOCK = (
    65_536  # paths selected at a time: their byte positions, eight bytes each, are the memory that it takes
)
_ODD = 0x9E3779B97F4A7C15
_INVERSE = pow(_ODD, -1, 2**64)


@dataclass(frozen=True, eq=False)
class Paths:
    """Relative paths in one buffer, because 1.28 million Python strings are heavy and slow to pickle.

    `buffer` holds the encoded paths one after another, path i in `buffer[offsets[i] : offsets[i + 1]]`.
    """

    buffer: NDArray[np.uint8]
    offsets: NDArray[np.int64]  # (N + 1,)

    @staticmethod
    def of(paths: Iterable[str]) -> Paths:
        encoded = [os.fsencode(path) for path in paths]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(path) for path in encoded], out=offsets[1:])
        return Paths(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        begin, end = self.offsets[index], self.offsets[index + 1]
        return os.fsdecode(self.buffer[begin:end].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def find(self, wanted: Paths) -> NDArray[np.int64]:
        """Where each of `wanted` is in here, (len(wanted),); -1 where it is not.

        By 64-bit hashes: to take one path for another among a million has a chance of 1 in ten million.
        """
        mine, theirs = self._hashes(), wanted._hashes()
        order = np.argsort(mine, kind="stable")
        places = order[np.minimum(np.searchsorted(mine, theirs, sorter=order), len(mine) - 1)]
        return np.where(mine[places] == theirs, places, -1)

    def padded(self, indices: NDArray[np.int64], prefix: str) -> NDArray[np.uint8]:
        """`prefix` + path of each index as bytes, (B, length of the longest), padded with zeros."""
        start = np.frombuffer(os.fsencode(prefix), np.uint8)
        begins, ends = self.offsets[indices, None], self.offsets[indices + 1, None]  # (B, 1)
        columns = begins + np.arange(int((ends - begins).max()))  # (B, L)
        names = np.where(columns < ends, self.buffer[np.minimum(columns, len(self.buffer) - 1)], 0)
        return np.concatenate(
            [np.broadcast_to(start, (len(indices), len(start))), names], axis=1, dtype=np.uint8
        )

    def select(self, indices: NDArray[np.int64]) -> Paths:
        """The paths at `indices`, in their order."""
        offsets = np.zeros(len(indices) + 1, np.int64)
        np.cumsum(self.offsets[indices + 1] - self.offsets[indices], out=offsets[1:])
        buffer = np.empty(offsets[-1], np.uint8)
        for first in range(0, len(indices), _BLOCK):
            block = indices[first : first + _BLOCK]
            bounds = offsets[first : first + len(block) + 1]
            shift = np.repeat(self.offsets[block] - bounds[:-1], np.diff(bounds))
            buffer[bounds[0] : bounds[-1]] = self.buffer[np.arange(bounds[0], bounds[-1]) + shift]
        return Paths(buffer, offsets)

    def _hashes(self) -> NDArray[np.uint64]:
        """(N,) sum of byte k times the k-th power of an odd number, modulo 2**64."""
        hashes = np.empty(len(self), np.uint64)
        for first in range(0, len(self), _BLOCK):
            bounds = self.offsets[first : first + _BLOCK + 1]
            block = self.buffer[bounds[0] : bounds[-1]]
            # Powers are counted from the start of the block, so that they need no gathering, and then divided out.
            sums = np.zeros(len(block) + 1, np.uint64)
            np.cumsum(block * _powers(_ODD, len(block)), out=sums[1:])
            begins, ends = bounds[:-1] - bounds[0], bounds[1:] - bounds[0]
            hashes[first : first + _BLOCK] = (sums[ends] - sums[begins]) * _powers(_INVERSE, len(sums))[
                begins
            ]
        return hashes


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    powers = np.full(count, base, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers)
