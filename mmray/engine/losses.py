"""Rows whose worker died: they run again until the one that kills is known, and set aside alone.

A worker takes every chunk it holds with it, and which of them killed it is not known. So lost
chunks run again as they were, one at a time on a worker, before a witness: a chunk that it saw
begin twice and that never came back is cut into rows, and a row lost so twice is guilty. What was
only unlucky runs as in an undisturbed run, to the last bit of its scores: for a chunk to be cut,
its worker must die three times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ray

from mmray.engine.pieces import Piece
from mmray.ledger import Interval, joined

#: Before a witness: of a chunk until its rows run alone, and of a row alone until it is set aside.
DEATHS = 2


class Witness:
    """An actor that is told of every chunk before it is scored."""

    def __init__(self) -> None:
        self._begun: set[tuple[str, int, int]] = set()

    def begin(self, shard: str, start: int, stop: int) -> None:
        self._begun.add((shard, start, stop))

    def begun(self) -> set[tuple[str, int, int]]:
        return self._begun


class Losses:
    """What is known of the rows that were lost; ``suspects`` from before, by shard."""

    def __init__(self, suspects: Mapping[str, Iterable[int]]) -> None:
        self._suspects = {shard: set(rows) for shard, rows in suspects.items()}
        self._deaths: Counter[tuple[str, int, int]] = Counter()

    @property
    def known(self) -> int:
        """Grows with everything learned."""
        return sum(map(len, self._suspects.values())) + sum(self._deaths.values())

    def hear(self, witness: Any, lost: Mapping[str, Sequence[Interval]]) -> None:
        """Learn from what the witness saw begin, given the rows ``lost`` by shard."""
        try:
            begun = ray.get(witness.begun.remote())
        except ray.exceptions.RayActorError:
            return  # it died with its node: nothing is learned, the next pass has another
        for shard, start, stop in begun:
            left = {row for row in _rows(lost.get(shard, ())) if start <= row < stop}
            if start not in left:
                continue
            self._deaths[shard, start, stop] += 1
            if self._deaths[shard, start, stop] == DEATHS:
                self._suspects.setdefault(shard, set()).update(left)

    def guilty(self, shard: str, lost: Iterable[Interval]) -> list[int]:
        return [row for row in _rows(lost) if self._deaths[shard, row, row + 1] >= DEATHS]

    def pieces(self, of: Piece, lost: Iterable[Interval]) -> Iterator[Piece]:
        """The lost rows to run again ``of`` a whole shard: suspects one by one, others in chunks as
        before."""
        suspects = self._suspects.get(of.shard.path, set())
        alone = joined((row, row + 1) for row in _rows(lost) if row in suspects)
        others = joined((row, row + 1) for row in _rows(lost) if row not in suspects)
        if alone:
            yield of.only(alone, chunk_rows=1)
        if others:
            yield of.only(others)


def _rows(intervals: Iterable[Interval]) -> Iterator[int]:
    for start, stop in intervals:
        yield from range(start, stop)
