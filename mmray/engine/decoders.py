"""Preparing the pairs of requests, apart from whoever speaks HTTP."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from mmray import golden
from mmray.archive.rows import Sample
from mmray.bundle import Bundle
from mmray.engine.guard import Guard
from mmray.errors import BadRow
from mmray.preprocess import Prepared, fault
from mmray.serving import card
from mmray.serving.lane import Lane
from mmray.serving.settings import ServeConfig

ROWS = 4  # that a child is given in one go, when so many wait


class Decoders:
    """Child processes that prepare pairs; one that dies of a picture costs that picture alone."""

    def __init__(self, bundle: Bundle, cfg: ServeConfig) -> None:
        preprocessor, count = card.preprocessor_of(bundle, cfg), cfg.decode.processes
        self._threads = ThreadPoolExecutor(count)
        self._idle: queue.SimpleQueue[Guard] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(Guard(preprocessor, cfg.deadlines.decode_s))
        warm = [golden.inputs(bundle.golden)[:1]] * count  # starts the children, before any request
        list(self._threads.map(self._prepare, warm))
        self._lane = Lane(self._given, ROWS, count)

    async def prepare(self, samples: Sequence[Sample]) -> list[Prepared | BadRow]:
        """One outcome a sample, in order. Raises RunError when no child starts."""
        found: dict[int, Prepared | BadRow] = {}
        while left := [i for i in range(len(samples)) if i not in found]:
            tried = zip(left, await self._lane.results(samples[i] for i in left), strict=True)
            found |= {i: row for i, row in tried if row is not None}
        return [found[i] for i in range(len(samples))]

    async def _given(self, samples: Sequence[Sample]) -> list[Prepared | BadRow | None]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._prepare, samples)

    def _prepare(self, samples: Sequence[Sample]) -> list[Prepared | BadRow | None]:
        """One outcome a row; None for those after one that ended the child, which are not made to
        wait for another of its kind."""
        found: list[Prepared | BadRow | None] = []
        guard = self._idle.get()
        try:
            for sample in samples:
                (tried,), (row,) = guard.prepare_all([sample])
                found.append(fault(tried) if row is None else row)
                if not guard.running:
                    break
        finally:
            self._idle.put(guard)
        return found + [None] * (len(samples) - len(found))
