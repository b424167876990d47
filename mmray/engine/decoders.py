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
from mmray.errors import BadRow, RunError
from mmray.preprocess import Prepared
from mmray.serving import card
from mmray.serving.lane import Lane
from mmray.serving.settings import ServeConfig
from mmray.serving.shared import Decoded, Tray

ROWS = 4  # that a child is given in one go, when so many wait
SPARES = 1  # children that stand by: starting one takes seconds
LATE_S = 0.5  # after which a call is one that others should not wait for


class Decoders:
    """Child processes that prepare pairs; one that dies of a picture costs that picture alone: a
    spare one takes its place, and another is started at once."""

    def __init__(self, bundle: Bundle, cfg: ServeConfig) -> None:
        preprocessor, count = card.preprocessor_of(bundle, cfg), cfg.decode.processes
        size = bundle.preprocess.image.size
        self._trays = [Tray(size, ROWS) for _ in range(count + SPARES)]
        self._guards = [
            Guard(tray.filled_by(preprocessor), cfg.deadlines.decode_s) for tray in self._trays
        ]
        self._threads = ThreadPoolExecutor(len(self._guards))
        self._restarts = ThreadPoolExecutor(1)
        # Of those with a child the first: it has the warmest memory. Without one: the last resort.
        self._idle: queue.PriorityQueue[tuple[bool, int]] = queue.PriorityQueue()
        assert bundle.golden is not None
        samples = golden.inputs(bundle.golden)
        # Each of them starts its child now, before any request.
        each = range(len(self._guards))
        self._sound, *_ = self._threads.map(lambda i: self._sound_of(i, samples), each)
        for i in each:
            self._put_back(i)
        self._lane = Lane(self._given, ROWS, count)

    @property
    def busy(self) -> bool:
        """Whether pairs are being prepared now."""
        return self._lane.busy

    async def prepare(self, samples: Sequence[Sample]) -> list[Decoded]:
        """One outcome a sample, in order. Raises RunError when no child starts."""
        found: dict[int, Decoded] = {}
        while left := [i for i in range(len(samples)) if i not in found]:
            tried = zip(left, await self._lane.results(samples[i] for i in left), strict=True)
            found |= {i: row for i, row in tried if row is not None}
        return [found[i] for i in range(len(samples))]

    async def check(self) -> None:
        """Raises RunError when a golden pair cannot be prepared. It does not queue with others."""
        if self._sound is None:
            return
        loop = asyncio.get_running_loop()
        (found,) = await loop.run_in_executor(self._threads, self._prepare, [self._sound])
        if found is None or isinstance(found[0], BadRow):
            raise RunError(f"a golden pair cannot be prepared: {found and found[0]}")

    async def _given(self, samples: Sequence[Sample]) -> list[Decoded | None]:
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, self._prepare, samples)
        if (await asyncio.wait([work], timeout=LATE_S))[0]:
            return work.result()
        with self._lane.one_more():  # for the spare, while this one takes its time
            return await work

    def _prepare(self, samples: Sequence[Sample]) -> list[Decoded | None]:
        """One outcome a row; None for those after one that ended the child, which are not made to
        wait for another of its kind."""
        _, i = self._idle.get()
        try:
            found = self._outcomes(i, samples)
        finally:
            if self._guards[i].running:
                self._put_back(i)
            else:
                self._restarts.submit(self._restart, i)
        return [*found, *[None] * (len(samples) - len(found))]

    def _outcomes(self, i: int, samples: Sequence[Sample]) -> list[Decoded]:
        """Of at most ``ROWS`` samples, as many as a tray holds; none of those after one that ended
        the child."""
        tray = self._trays[i]
        return [tray.taken(outcome) for outcome in self._guards[i].outcomes(tray.laid(samples))]

    def _sound_of(self, i: int, samples: Sequence[Sample]) -> Sample | None:
        """The first that can be prepared, of samples that are all tried."""
        tried = [self._outcomes(i, [sample]) for sample in samples]
        sound = (
            s for s, ((row, _),) in zip(samples, tried, strict=True) if isinstance(row, Prepared)
        )
        return next(sound, None)

    def _restart(self, i: int) -> None:
        try:
            self._guards[i].start()
        finally:  # one that does not start says why to whoever is given it
            self._put_back(i)

    def _put_back(self, i: int) -> None:
        self._idle.put((not self._guards[i].running, i))
