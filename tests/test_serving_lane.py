"""Rows that share calls: in order, none lost, none twice, whoever fails or leaves."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Sequence

import pytest

from mmray.errors import RunError
from mmray.serving.answers import Busy
from mmray.serving.lane import Lane


class Work:
    """Doubles what it is given, when it is let."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.gate = asyncio.Event()

    async def __call__(self, rows: list[int]) -> Sequence[int]:
        self.calls.append(rows)
        await self.gate.wait()
        if -1 in rows:
            raise RunError("the model failed")
        return [2 * row for row in rows]


def test_a_row_goes_at_once_and_those_that_come_meanwhile_go_together() -> None:
    async def run() -> None:
        work = Work()
        waits: list[float] = []
        lane = Lane(work, rows=4, calls=2, waited=waits.append)
        callers = []
        for i in range(12):
            callers.append(asyncio.ensure_future(lane.results([i])))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert work.calls == [[0], [1]]
        work.gate.set()
        assert await asyncio.gather(*callers) == [[2 * i] for i in range(12)]
        assert work.calls == [[0], [1], [2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]
        assert len(waits) == len(work.calls) and min(waits) >= 0
        assert await lane.results(range(9)) == [2 * i for i in range(9)]
        assert await lane.results([]) == []

    asyncio.run(run())


def test_a_call_is_held_for_rows_on_their_way_while_others_are_in_work_and_never_alone() -> None:
    async def run() -> None:
        work, coming = Work(), True
        lane = Lane(work, rows=3, calls=4, hold_s=0.05, coming=lambda: coming)
        callers = [asyncio.ensure_future(lane.results([0]))]
        await asyncio.sleep(0.001)
        assert work.calls == [[0]], "nothing else was in work"
        for i in (1, 2):
            callers.append(asyncio.ensure_future(lane.results([i])))
            await asyncio.sleep(0.001)
        assert work.calls == [[0]]
        callers.append(asyncio.ensure_future(lane.results([3])))
        await asyncio.sleep(0.001)
        assert work.calls == [[0], [1, 2, 3]], "it is full"
        callers.append(asyncio.ensure_future(lane.results([4])))
        await asyncio.sleep(0.2)
        assert work.calls[2:] == [[4]], "it has waited long enough"
        coming = False
        callers.append(asyncio.ensure_future(lane.results([5])))
        await asyncio.sleep(0.001)
        assert work.calls[3:] == [[5]], "nothing more comes"
        work.gate.set()
        assert await asyncio.gather(*callers) == [[2 * i] for i in range(6)]

    asyncio.run(run())


def test_one_call_more_is_begun_while_one_takes_its_time() -> None:
    async def run() -> None:
        work = Work()
        lane = Lane(work, rows=1, calls=1)
        callers = [asyncio.ensure_future(lane.results([i])) for i in range(3)]
        await asyncio.sleep(0.001)
        assert work.calls == [[0]]
        with lane.one_more():
            await asyncio.sleep(0.001)
            assert work.calls == [[0], [1]]
        work.gate.set()
        assert await asyncio.gather(*callers) == [[0], [2], [4]]

    asyncio.run(run())


def test_a_call_that_fails_costs_those_who_share_it_and_nobody_else() -> None:
    async def run() -> None:
        work = Work()
        lane = Lane(work, rows=2, calls=1)
        callers = [asyncio.ensure_future(lane.results(rows)) for rows in ([0], [1, -1], [3, 4])]
        await asyncio.sleep(0)
        work.gate.set()
        found = await asyncio.gather(*callers, return_exceptions=True)
        assert found[0] == [0] and found[2] == [6, 8]
        assert isinstance(found[1], RunError)
        assert await lane.results([5]) == [10]

    asyncio.run(run())


def test_a_call_is_of_all_who_share_it_and_no_part_of_the_request_that_began_it() -> None:
    asker: contextvars.ContextVar[str] = contextvars.ContextVar("asker", default="nobody")
    seen: list[str] = []

    async def work(rows: list[int]) -> Sequence[int]:
        seen.append(asker.get())
        await asyncio.sleep(0)
        return rows

    async def run() -> None:
        lane = Lane(work, rows=1, calls=1)
        asker.set("somebody")
        assert await lane.results([1, 2]) == [1, 2]

    asyncio.run(run())
    assert seen == ["nobody", "nobody"]


def test_a_call_that_is_cancelled_leaves_nobody_waiting() -> None:
    async def work(rows: list[int]) -> Sequence[int]:
        await asyncio.sleep(0)
        raise asyncio.CancelledError

    async def run() -> None:
        lane = Lane(work, rows=4, calls=1)
        found = await asyncio.gather(*(lane.results([i]) for i in range(3)), return_exceptions=True)
        assert [type(error) for error in found] == [Busy] * 3

    asyncio.run(asyncio.wait_for(run(), 10))


def test_rows_of_a_caller_who_left_are_not_worked_on() -> None:
    async def run() -> None:
        work = Work()
        lane = Lane(work, rows=8, calls=1)
        first = asyncio.ensure_future(lane.results([0]))
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await lane.results([1, 2])
        last = asyncio.ensure_future(lane.results([3]))
        await asyncio.sleep(0)
        work.gate.set()
        assert (await first, await last) == ([0], [6])
        assert work.calls == [[0], [3]]

    asyncio.run(run())
