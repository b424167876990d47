"""Decoding in Ray's tasks so that a row which crashes or stalls its decoder costs itself alone.

A process decodes under an alarm, so that a row which takes too long ends it, as a crash does. Ray
then runs what it did again, elsewhere; that begins with a chunk which was begun before, and from
there on decodes ``guarded``: the row comes out with what happened to it.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import ray

from mmray.archive.rows import Sample
from mmray.engine import guard
from mmray.engine.witness import acquaintance, called
from mmray.errors import BadRow

_again = False  # this process does what another one did not survive


class _Witness:
    """An actor that is told of every chunk before it is decoded."""

    def __init__(self) -> None:
        self._begun: set[tuple[str, int]] = set()

    def begin(self, shard: str, row: int) -> bool:
        """Whether the chunk whose first row this is was begun before."""
        again = (shard, row) in self._begun
        self._begun.add((shard, row))
        return again


@dataclass(frozen=True, slots=True)
class Careful:
    """Goes with the tasks of one pass over an archive. ``seconds``: what a row may take.

    The witness lives as long as the one that called it: those passed on are its acquaintances.
    """

    seconds: float = guard.ROW_SECONDS
    witness: Any = field(default_factory=lambda: called(_Witness))

    def __reduce__(self) -> tuple[Any, ...]:
        return Careful, (self.seconds, acquaintance(self.witness))

    def outcomes(self, does: guard.Prepares, samples: Sequence[Sample]) -> list[Any]:
        """What ``does.prepare`` gives for each sample, or the BadRow that it raises; BadRow, too,
        for one that crashes, takes too long or takes too much memory."""
        if not samples:
            return []
        if self._begun_before(samples[0]):
            guarded = _guard_of(cast(Hashable, does), self.seconds)
            return [guarded.prepare(sample) for sample in samples]
        return [guard.alarmed(does, sample, self.seconds) for sample in samples]

    def prepare_all(self, preprocessor: guard.Prepares, samples: Sequence[Sample]) -> guard.Ready:
        """As ``Preprocessor.prepare_all``."""
        left: list[Sample] = []
        prepared: list[Any] = []
        for sample, outcome in zip(samples, self.outcomes(preprocessor, samples), strict=True):
            bad = isinstance(outcome, BadRow)
            error = {"error": str(outcome), "error_stage": outcome.stage} if bad else {}
            left.append(replace(sample, **error))
            prepared.append(None if bad else outcome)
        return left, prepared

    def _begun_before(self, first: Sample) -> bool:
        global _again
        if not _again:
            try:
                _again = ray.get(self.witness.begin.remote(first.shard, first.row))
            except ray.exceptions.RayActorError:
                _again = True  # it is gone with its node: nothing is known
        return _again


@functools.lru_cache(maxsize=2)  # one child for all chunks of a process
def _guard_of(does: Any, seconds: float) -> guard.Guard:
    return guard.Guard(does, seconds)
