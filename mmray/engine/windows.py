"""The order in which an epoch takes its rows, and which of them must be decoded at a time.

All follows from (seed, epoch), the number of rows in each unit of reading, and the rows of a
window: a step means the same rows with any number of workers, and when a run goes on.
N rows lie in U units, which are read one at a time; an epoch takes the units in W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def order_of(epoch: int, rows: int, seed: int) -> Ints:
    """The order in which an epoch takes its rows when all of them are at hand."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def share_of(step: int, order: Ints, batch_size: int, rank: int, world: int) -> tuple[Ints, int]:
    """The rows of a rank in a step, perhaps none, and how many the whole step has."""
    at = order[step * batch_size : (step + 1) * batch_size]
    return np.array_split(at, world)[rank], len(at)


def windows_of(sizes: Ints, window: int, shuffle: tuple[int, int] | None) -> list[Ints]:
    """The units of each window: about ``window`` rows together, at least one unit.

    ``sizes`` [U]: rows of each unit; ``shuffle``: (seed, epoch), None for the units' own order.
    """
    units = np.arange(len(sizes))
    if shuffle is not None:
        units = np.random.default_rng([*shuffle, 1]).permutation(units)
    before = np.cumsum(sizes[units]) - sizes[units]
    return np.split(units, np.flatnonzero(np.diff(before // window)) + 1)


@dataclass(frozen=True, slots=True)
class Order:
    """``rows`` [N] in the order they are taken; ``ends`` [W]: where in it each window ends."""

    rows: Ints
    ends: Ints

    def windows(self, start: int, stop: int) -> range:
        """The windows that the rows at ``start`` to ``stop`` (at least one) lie in."""
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right").tolist()
        return range(first, last + 1)


def arranged(rows: Ints, unit_of: Ints, windows: Sequence[Ints]) -> Order:
    """``rows`` [N] with those of the first window first, and so on; inside a window the order
    stays. ``unit_of`` [N]: the unit of each row."""
    window_of = np.zeros(sum(map(len, windows)), np.int64)
    for number, units in enumerate(windows):
        window_of[units] = number
    at = window_of[unit_of[rows]]
    ends = np.cumsum(np.bincount(at, minlength=len(windows)))
    return Order(rows[np.argsort(at, kind="stable")], ends)
