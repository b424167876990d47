"""Decoding of what is posted: pictures that kill or hang their decoder cost themselves alone."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from mmray import bundle as bundles
from mmray.archive.rows import Sample
from mmray.engine import decoders
from mmray.engine.decoders import Decoders
from mmray.errors import BadRow, RunError
from mmray.preprocess import Prepared
from mmray.serving.settings import Deadlines, Decode, ServeConfig

DEADLINE_S = 3.0


class Deadly:
    """Does what the caption says."""

    def prepare(self, sample: Sample) -> Prepared:
        if sample.caption == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if sample.caption == "hang":
            time.sleep(60)
        return Prepared(None, np.array([sample.row], np.int32))


def asked(*captions: str) -> list[Sample]:
    return [Sample("request", i, str(i), None, caption) for i, caption in enumerate(captions)]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Decoders:
    bundle = bundles.load(tiny.bundle(str(tmp_path / "b")))
    monkeypatch.setattr(decoders.card, "preprocessor_of", lambda bundle, cfg: Deadly())
    cfg = ServeConfig(deadlines=Deadlines(decode_s=DEADLINE_S), decode=Decode(processes=1))
    return Decoders(bundle, cfg)


def test_a_picture_that_kills_or_hangs_its_decoder_costs_itself_alone_and_no_time(
    made: Decoders,
) -> None:
    async def run() -> None:
        began = time.monotonic()
        found = [row for row, _ in await made.prepare(asked("a", "die", "b", "c", "d", "e"))]
        assert [isinstance(row, Prepared) for row in found] == [True, False, *[True] * 4]
        assert [row.tokens[0] for row in found if isinstance(row, Prepared)] == [0, 2, 3, 4, 5]
        assert "decode crashed: its process ended with SIGKILL" in str(found[1])
        assert time.monotonic() - began < 1.5, "they waited for a new decoder to start"
        while made._idle.qsize() < 2:  # the new one
            await asyncio.sleep(0.1)

        began = time.monotonic()
        hangs = asyncio.ensure_future(made.prepare(asked("hang")))
        await asyncio.sleep(0.1)
        ((row, _),) = await made.prepare(asked("a"))
        assert isinstance(row, Prepared) and time.monotonic() - began < DEADLINE_S - 1
        ((late, seconds),) = await hangs
        assert isinstance(late, BadRow) and late.reason == "decode took too long"
        assert seconds == 0.0

    asyncio.run(run())


def test_a_replica_whose_decoders_do_not_start_is_told_so(
    made: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the health check, which then has the replica replaced."""

    async def run() -> None:
        await made.check()

        def fails(self: object) -> None:
            raise RunError("a process to decode in did not start")

        monkeypatch.setattr("mmray.engine.guard.Guard._start", fails)
        for _ in range(2):  # with both children gone: it has one, and a spare one
            await made.prepare(asked("die"))
        with pytest.raises(RunError, match="did not start"):
            await made.check()

    asyncio.run(run())
