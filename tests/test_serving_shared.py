"""A user would get another picture's score, or lose their own, if pixels that are not sent went
wrong."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import tiny

from mmray import bundle as bundles
from mmray.archive.rows import Sample
from mmray.engine.guard import Guard
from mmray.errors import BadRow
from mmray.preprocess import Prepared, Preprocessor
from mmray.serving import shared
from mmray.serving.shared import Elsewhere, Filled, Laid, Receiver, Sender, Tray, Where

SIZE, ROWS = 8, 4


def prepared(seed: int, *, pixels: bool = True) -> Prepared:
    draw = np.random.default_rng(seed)
    drawn = draw.integers(0, 256, (SIZE, SIZE, 3), np.uint8).transpose(2, 0, 1)
    return Prepared(drawn if pixels else None, np.arange(seed + 1, dtype=np.int32))


def expect_same(found: Sequence[Prepared], expected: Sequence[Prepared]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.tokens is not None and np.array_equal(one.tokens, other.tokens)
        assert (one.pixels is None) == (other.pixels is None)
        if one.pixels is not None and other.pixels is not None:
            assert np.array_equal(one.pixels, other.pixels)
            assert one.pixels.strides == other.pixels.strides  # what the model is given, as it lies


def _receive(pipe: Connection) -> None:
    receiver = Receiver()
    while True:
        left, where = pipe.recv()
        pipe.send(receiver.rows(left, where))


def test_another_process_sees_the_pixels_that_it_is_not_sent() -> None:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_receive, args=[theirs], daemon=True)
    process.start()
    sender = Sender(SIZE, ROWS)
    sent: list[Prepared] = []

    async def question(left: Sequence[Prepared], where: Where | None) -> list[Prepared]:
        sent.extend(left)
        pipe.send((left, where))
        found: list[Prepared] = pipe.recv()
        return found

    for first in (0, 2, 7):
        rows = [prepared(first), prepared(first + 1, pixels=False), prepared(first + 2)]
        expect_same(asyncio.run(sender.ask(rows, question)), rows)
    process.kill()
    assert all(row.pixels is None for row in sent)


async def answer(left: Sequence[Prepared], where: Where | None) -> list[Prepared]:
    """As a receiver in this process would; copies, as a batch is one."""
    assert where is not None
    found = Receiver().rows(left, where)
    assert found is not None
    await asyncio.sleep(0.01)
    return [replace(row, pixels=np.array(row.pixels)) for row in found]


def test_rows_that_find_no_room_are_sent_and_none_gets_the_pixels_of_another() -> None:
    sender = Sender(SIZE, ROWS)
    groups = [[prepared(10 * i + j) for j in range(3)] for i in range(4)]  # 12 rows, room for 4

    async def together() -> None:
        found = await asyncio.gather(*(sender.ask(rows, answer) for rows in groups))
        for one, other in zip(found, groups, strict=True):
            for got, was in zip(one, other, strict=True):
                assert got.pixels is not None and was.pixels is not None
                assert np.array_equal(got.pixels, was.pixels)

    for _ in range(3):
        asyncio.run(together())


def test_room_comes_back_also_where_nothing_was_answered() -> None:
    sender, counts = Sender(SIZE, ROWS), []

    async def fails(left: Sequence[Prepared], where: Where | None) -> list[Prepared]:
        counts.append(sum(row.pixels is None for row in left))
        raise ValueError

    for _ in range(3):
        with pytest.raises(ValueError):
            asyncio.run(sender.ask([prepared(i) for i in range(ROWS)], fails))
    assert counts == [ROWS] * 3


def test_one_who_cannot_see_them_is_sent_them_and_so_are_all_after() -> None:
    sender, asked = Sender(SIZE, ROWS), []
    rows = [prepared(0), prepared(1)]

    async def far(left: Sequence[Prepared], where: Where | None) -> list[Prepared] | Elsewhere:
        asked.append(where is None)
        return Elsewhere() if where is not None else list(left)

    for _ in range(2):
        expect_same(asyncio.run(sender.ask(rows, far)), rows)
    assert asked == [False, True, True]


def test_where_memory_cannot_be_shared_pixels_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(name: str) -> int:
        raise PermissionError(name)

    async def far(left: Sequence[Prepared], where: Where | None) -> list[Prepared]:
        assert where is None
        return list(left)

    monkeypatch.setattr(os, "memfd_create", forbidden)
    expect_same(asyncio.run(Sender(SIZE, ROWS).ask([prepared(0)], far)), [prepared(0)])
    monkeypatch.delattr(os, "memfd_create")  # another system
    expect_same(asyncio.run(Sender(SIZE, ROWS).ask([prepared(0)], far)), [prepared(0)])


@pytest.fixture(scope="module")
def preprocessor(tmp_path_factory: pytest.TempPathFactory) -> Preprocessor:
    bundle = bundles.load(tiny.bundle(str(tmp_path_factory.mktemp("tray") / "b"), missing=True))
    return bundle.build_preprocessor()


def samples(first: int, count: int) -> list[Sample]:
    """The second of them without a picture."""
    pictures = [None if i == 1 else tiny.jpeg(first + i) for i in range(count)]
    return [Sample("s", i, "", p, tiny.caption(first + i)) for i, p in enumerate(pictures)]


def test_pictures_and_pixels_lie_in_a_tray_and_the_rest_is_sent(
    preprocessor: Preprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = sorted(len(tiny.jpeg(i)) for i in (10, 12, 13))[1]
    monkeypatch.setattr(shared, "PICTURE_BYTES", most)  # one of these is larger
    tray = Tray(preprocessor.cfg.image.size, ROWS)
    guard = Guard(tray.filled_by(preprocessor), 30)
    try:
        for first in (0, 10, 20):  # 3 of 4 slots each time, so that they go round
            asked = samples(first, ROWS)
            laid = tray.laid(asked)
            assert [isinstance(each, Laid) for each in laid] == [
                bool(first) and 0 < len(sample.image or b"") <= most for sample in asked
            ]
            assert all(each.sample.image is None for each in laid if isinstance(each, Laid))
            outcomes = guard.outcomes(laid)
            assert all(isinstance(outcome, Filled) for outcome in outcomes)
            assert [outcome.slot is None for outcome in outcomes] == [False, True, False, False]
            assert all(outcome.row.pixels is None for outcome in outcomes[2:])
            found, seconds = zip(*map(tray.taken, outcomes), strict=True)
            assert all(each > 0 for each in seconds)
            expect_same(found, [preprocessor.prepare(sample) for sample in asked])
        kept, (other,) = found, guard.outcomes(tray.laid(samples(30, 1)))
        tray.taken(other)
        expect_same(kept, [preprocessor.prepare(sample) for sample in asked])
        for picture in (b"no picture", b""):
            (broken,) = guard.outcomes(tray.laid([Sample("s", 0, "", picture, "a caption")]))
            assert isinstance(broken, BadRow) and tray.taken(broken) == (broken, 0.0)
    finally:
        guard._end(0)


def test_pixels_that_no_tray_can_be_had_for_are_sent(
    preprocessor: Preprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sample,) = samples(0, 1)
    fills = Tray(preprocessor.cfg.image.size, ROWS).filled_by(preprocessor)  # its tray is gone
    expect_same([fills.prepare(sample).row], [preprocessor.prepare(sample)])
    monkeypatch.delattr(os, "memfd_create")
    tray = Tray(preprocessor.cfg.image.size, ROWS)
    row, seconds = tray.taken(tray.filled_by(preprocessor).prepare(sample))
    assert isinstance(row, Prepared) and seconds > 0
    expect_same([row], [preprocessor.prepare(sample)])


def test_what_is_not_the_senders_memory_is_not_opened(tmp_path: Path) -> None:
    """The same numbers on another machine name anything: opening a pipe would wait for ever."""
    seen: list[Where] = []

    async def keep(left: Sequence[Prepared], where: Where | None) -> list[Prepared]:
        assert where is not None
        seen.append(where)
        return []

    asyncio.run(Sender(SIZE, ROWS).ask([prepared(0)], keep))
    sender = Sender(SIZE, ROWS)
    asyncio.run(sender.ask([prepared(0)], keep))
    ended, (_, where) = seen[0], seen
    receiver, left = Receiver(), [prepared(0, pixels=False)]
    assert receiver.rows(left, where) is not None
    inside, outside = os.pipe()
    file = os.open(tmp_path, os.O_RDONLY)
    try:
        for number in (inside, file, 10**6):
            assert receiver.rows(left, replace(where, file=number, key=b"another")) is None
        assert receiver.rows(left, replace(where, pid=2**22 + 1, key=b"another")) is None
        assert receiver.rows(left, replace(where, key=bytes(64))) is None, "another sender's"
        assert receiver.rows(left, ended) is None, "it is gone"
    finally:
        for number in (inside, outside, file):
            os.close(number)
