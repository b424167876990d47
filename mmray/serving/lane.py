"""Rows that wait, wait together: what is bounded is how many calls there are, not of how many rows.

A row that comes alone goes at once. Those that come while calls are in work share the next one, so
batches grow with the load. A call that is not full may be held for rows that are known to be on
their way; nobody waits for a row that may not come.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from mmray.serving.answers import Busy

T = TypeVar("T")
R = TypeVar("R")


class Lane(Generic[T, R]):
    """Calls of ``work``, which takes rows and gives one result a row, in order."""

    def __init__(
        self,
        work: Callable[[list[T]], Awaitable[Sequence[R]]],
        rows: int,
        calls: int,
        waited: Callable[[float], None] = lambda seconds: None,
        *,
        hold_s: float = 0.0,
        coming: Callable[[], bool] = lambda: False,
    ) -> None:
        """``rows`` in a call at most, and ``calls`` at once; ``waited`` hears of every call for how
        long the first of its rows waited. While calls are in work and ``coming`` says that more
        rows are, one that is not full is held until its first row has waited ``hold_s``."""
        self._work, self._rows, self._calls, self._waited = work, rows, calls, waited
        self._hold_s, self._coming = hold_s, coming
        self._alarm: asyncio.TimerHandle | None = None
        self._waiting: deque[tuple[T, asyncio.Future[R], float]] = deque()
        self._running: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """Whether rows wait or are in work."""
        return bool(self._waiting or self._running)

    @contextlib.contextmanager
    def one_more(self) -> Iterator[None]:
        """Meanwhile there may be one more call at once."""
        self._calls += 1
        self._start()
        try:
            yield
        finally:
            self._calls -= 1

    async def results(self, rows: Iterable[T]) -> list[R]:
        """One result a row, in order. Raises what ``work`` raises for a call with any of them, Busy
        where that is cancelled; rows still waiting when this is cancelled are never worked on."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[R]] = []
        came = time.perf_counter()
        for row in rows:
            futures.append(loop.create_future())
            self._waiting.append((row, futures[-1], came))
        self._start()
        return list(await asyncio.gather(*futures))

    def _held(self) -> bool:
        """Whether those that wait, wait for more; then somebody looks again when that is over."""
        if not self._running or len(self._waiting) >= self._rows or not self._coming():
            return False
        left = self._waiting[0][2] + self._hold_s - time.perf_counter()
        if left > 0 and self._alarm is None:
            self._alarm = asyncio.get_running_loop().call_later(left, self._ring)
        return left > 0

    def _ring(self) -> None:
        self._alarm = None
        self._start()

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._calls and not self._held():
            group: list[tuple[T, asyncio.Future[R]]] = []
            since = self._waiting[0][2]
            while self._waiting and len(group) < self._rows:
                row, future, _ = self._waiting.popleft()
                if not future.done():  # its caller has gone
                    group.append((row, future))
            if group:
                self._waited(time.perf_counter() - since)
                # A call is of many requests; in the context of the one that began it, whoever
                # cancels what that request has begun would take the others' rows along.
                task = asyncio.get_running_loop().create_task(
                    self._call(group), context=contextvars.Context()
                )
                self._running.add(task)
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    async def _call(self, group: list[tuple[T, asyncio.Future[R]]]) -> None:
        found: Sequence[R] = ()
        failed: Exception | None = None
        try:
            found = await self._work([row for row, _ in group])
            assert len(found) == len(group)
        except asyncio.CancelledError:
            failed = Busy("cancelled before it was scored")
        except Exception as error:  # noqa: BLE001  # raised again in every caller
            failed = error
        for i, (_, future) in enumerate(group):
            if future.done():
                continue
            if failed is None:
                future.set_result(found[i])
            else:
                future.set_exception(failed)
