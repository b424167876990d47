"""Rows that are decoded again in every epoch, without Ray: the feeder runs in this process."""

from __future__ import annotations

import gzip
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import test_engine_loop as loops
import tiny
import torch

from mmray.archive.shards import list_shards, read_shard
from mmray.config import Columns
from mmray.engine import feed, feeder, frozen, loop
from mmray.engine.feed import Feed
from mmray.engine.feeder import Feeder, Stream, _Decoder, prepare_again
from mmray.engine.prepared import BLOCK_SCHEMA, PreparedRows, Recipe, Wanted, prepare_chunk
from mmray.engine.scan import one_row
from mmray.engine.units import units_of
from mmray.errors import RunError
from mmray.preprocess import train_tokenizer

SHARDS = (21, 30, 13)
BROKEN, UNUSED = 4, 9  # rows of every shard
CHUNK = 6
DEVICE = torch.device("cpu")


class Remote:
    """An object whose methods are called as an actor's are; arguments and answers stay here."""

    def __init__(self, there: Any) -> None:
        self.there = there

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self.there, name))


class Archive:
    """Three tars, the last one gzip'd, prepared as a run's first pass does: with the pixels of all
    rows (``kept``) and without (``light``)."""

    def __init__(self, root: Path) -> None:
        self.root, first = root, 0
        for number, count in enumerate(SHARDS):
            found = dict(tiny.members(count, first))
            picture = f"{first + BROKEN:05d}.jpg"
            found[picture] = found[picture][:200]
            tiny.write_tar(root / f"{number:05d}.tar", found.items())
            first += count
        last = root / "00002.tar"
        last.with_suffix(".tgz").write_bytes(gzip.compress(last.read_bytes()))
        last.unlink()
        self.shards = {shard.path: shard for shard in list_shards(str(root))}
        cfg = loops.config(Path("none")).preprocess
        tokenizer = train_tokenizer(map(tiny.caption, range(50)), cfg.text)
        self.recipe = Recipe(cfg, tokenizer.to_json(), "both")
        self.wanted: dict[str, Wanted] = {}
        self.kept: list[pa.Table] = []
        self.light: list[pa.Table] = []
        self.chunks: list[dict[str, Any]] = []
        for shard in self.shards.values():
            self._prepare(shard)

    def _prepare(self, shard: Any) -> None:
        *samples, _ = read_shard(str(self.root), shard)
        at = np.arange(len(samples))
        wanted = self.wanted[shard.path] = Wanted((at % 2).astype(np.int32), at % 5 == 0)
        wanted.classes[UNUSED] = -1
        for start in range(0, len(samples), CHUNK):
            chunk = samples[start : start + CHUNK]
            place = {"start": start, "stop": start + len(chunk), "byte": chunk[0].byte}
            where = dict.fromkeys(BLOCK_SCHEMA.names) | {"shard": shard.path, **place}
            for blocks, pixels in ((self.kept, True), (self.light, False)):
                made = prepare_chunk(
                    shard.path, chunk, wanted, self.recipe.build(), keep_pixels=pixels
                )
                blocks.append(one_row(where | made, BLOCK_SCHEMA))
            self.chunks.append({k: v for k, v in (where | made).items() if k != "payload"})

    def stream(self, window: int, epochs: int = 3) -> Stream:
        sides = [units_of(self.chunks, self.wanted, dev=dev) for dev in (False, True)]
        return Stream(
            root=str(self.root),
            shards=self.shards,
            columns=Columns(),
            wanted=self.wanted,
            recipe=self.recipe,
            sides=(sides[0], sides[1]),
            window=window,
            epochs=epochs,
            seed=0,
        )

    def rows(self, *, streamed: bool) -> list[PreparedRows]:
        blocks = self.light if streamed else self.kept
        shuffled = [blocks[i] for i in np.random.default_rng(1).permutation(len(blocks))]
        return [
            PreparedRows(shuffled, dev=dev, image_size=loops.SIZE, streamed=streamed)
            for dev in (False, True)
        ]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return Archive(tmp_path_factory.mktemp("archive"))


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's part: references are the things themselves."""
    played = SimpleNamespace(get=lambda x: x)
    for module in (feed, feeder):
        monkeypatch.setattr(module, "ray", played)
    monkeypatch.setattr(feeder, "wanted_in", lambda wanted: wanted)
    monkeypatch.setattr(feeder, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(feeder.pace, "share", lambda: None)


def fed(archive: Archive, window: int, epochs: int = 3) -> Feeder:
    stream = archive.stream(window, epochs)
    return Feeder([stream], [Remote(_Decoder([stream])) for _ in range(2)])


def feed_of(
    sides: list[PreparedRows], made: Feeder | None, window: int | None, **where: int
) -> Feed:
    rank, world = where.get("rank", 0), where.get("world", 1)
    remote = None if made is None else Remote(made)
    return Feed(sides, seed=0, rank=rank, world=world, feeder=remote, window=window)


def batches(sides: list[PreparedRows], source: Feed, epoch: int, first: int = 0) -> list[Any]:
    return list(source.batches(frozen.FeatureRows(sides[0]), epoch, first, 8, DEVICE))


def same(one: Any, other: Any) -> bool:
    parts = ("pixels", "tokens", "mask", "labels")
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in parts)


# --- what is decoded again -----------------------------------------------------------------------


def test_a_window_over_all_rows_feeds_the_same_bytes_as_rows_that_are_kept(
    archive: Archive,
) -> None:
    kept, streamed = archive.rows(streamed=False), archive.rows(streamed=True)
    assert len(kept[0]) == len(streamed[0]) == sum(n - -(-n // 5) - 2 for n in SHARDS)
    for epoch in (0, 1):
        expected = batches(kept, feed_of(kept, None, None), epoch)
        got = batches(streamed, feed_of(streamed, fed(archive, 1000), 1000), epoch)
        assert len(expected) == len(got) == -(-len(kept[0]) // 8)
        for (one, *counts), (other, *others) in zip(expected, got, strict=True):
            assert counts == others and same(one, other)


@pytest.mark.parametrize("window", [1, 10, 25])
def test_small_windows_feed_every_row_once_as_it_is(archive: Archive, window: int) -> None:
    """Each epoch has each training row once, each dev row once, with its own pixels."""
    kept, streamed = archive.rows(streamed=False), archive.rows(streamed=True)
    made = fed(archive, window)
    source = feed_of(streamed, made, window)
    for epoch in range(3):
        assert len(_rows_of(batches(streamed, source, epoch))) == len(kept[0])
        assert _rows_of(batches(streamed, source, epoch)) == _rows_of(
            batches(kept, feed_of(kept, None, None), epoch)
        )
        dev = [at for part in source.shares(2 * epoch + 1, 4) for at in part.tolist()]
        assert dev == list(range(len(kept[1])))
    for at in source.shares(1, 4):
        assert same(streamed[1].batch(at), kept[1].batch(at))


def _rows_of(found: list[Any]) -> list[bytes]:
    """What tells rows apart, whatever their order."""
    return sorted(pixels.numpy().tobytes() for batch, *_ in found for pixels in batch.pixels)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_workers_goes_on_inside_a_window_with_the_same_rows(
    archive: Archive, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is an address: whoever takes it up, with a feeder that knows nothing of before, gets
    the rows that the undisturbed run has there."""
    monkeypatch.setattr(feed, "dist", SimpleNamespace(barrier=lambda: None))
    sides = archive.rows(streamed=True)
    whole = batches(sides, feed_of(sides, fed(archive, 15), 15), epoch=1)
    made = fed(archive, 15)
    ranks = []
    for rank in range(world):
        mine = archive.rows(streamed=True)
        ranks.append(batches(mine, feed_of(mine, made, 15, rank=rank, world=world), 1, first=3))
    for step, parts in enumerate(zip(*ranks, strict=True), 3):
        expected, _, total = whole[step]
        pixels = torch.cat([batch.pixels[:own] for batch, own, _ in parts])
        assert torch.equal(pixels, expected.pixels)
        assert sum(own for _, own, _ in parts) == total and {n for *_, n in parts} == {total}


@pytest.mark.parametrize("window", [None, 12, 25])
def test_dev_rows_come_in_the_same_batches_with_any_number_of_workers(
    archive: Archive, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 a row's scores depend, in their last digits, on its batch. Each row is some rank's
    once; a rank may have none."""
    monkeypatch.setattr(feed, "dist", SimpleNamespace(barrier=lambda: None))
    streamed = window is not None
    found = []
    for world in (1, 2, 5):
        made = fed(archive, window) if window else None
        ranks = []
        for rank in range(world):
            sides = archive.rows(streamed=streamed)
            source = feed_of(sides, made, window, rank=rank, world=world)
            ranks.append([tuple(at.tolist()) for at in source.shares(1, 4)])
        batches = [batch for rank in ranks for batch in rank]
        assert sorted(row for batch in batches for row in batch) == list(range(len(sides[1])))
        lengths = [len(rank) for rank in ranks]
        assert max(lengths) - min(lengths) <= 1
        found.append(sorted(batches))
    assert found[0] == found[1] == found[2]


def test_features_of_frozen_encoders_need_the_pixels_once(archive: Archive, tmp_path: Path) -> None:
    cfg = loops.config(tmp_path)
    preprocessor = archive.recipe.build()
    found = []
    for streamed, window in ((False, None), (True, 12)):
        sides = archive.rows(streamed=streamed)
        torch.manual_seed(0)
        model = loops._frozen_image(cfg, loops.spec_for(cfg, preprocessor), tmp_path)
        made = fed(archive, 12) if streamed else None
        source = feed_of(sides, made, window)
        parts = frozen.precompute(model, sides, source, precision="float32", say=lambda *_: None)
        assert made is None or not made._alive
        batch, *_ = next(source.batches(parts[0], 0, 0, 8, DEVICE))
        found.append([part.batch(np.arange(len(part))).pixels for part in parts] + [batch.pixels])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# --- memory --------------------------------------------------------------------------------------


def test_windows_that_are_passed_are_let_go(archive: Archive) -> None:
    """At most two windows lie in the object store; the memory of those before is free."""
    sides = archive.rows(streamed=True)
    made = fed(archive, 12)
    source = feed_of(sides, made, 12)
    seen: dict[feeder.Key, list[weakref.ref[pa.Table]]] = {}
    for _ in source.batches(frozen.FeatureRows(sides[0]), 0, 0, 8, DEVICE):
        source._ahead.submit(lambda: None).result()  # the batch ahead is put together
        assert len(made._alive) <= max(2, len(source._held))
        for key, window in made._alive.items():
            seen.setdefault(key, [weakref.ref(block) for _, block in window])
        for key, blocks in seen.items():
            there = [block() is not None for block in blocks]
            assert all(there) if key in made._alive else not any(there), key
    assert len(seen) > 4 and min(made._alive) == (1, 0)  # the dev rows come next
    assert not source._held and not sides[0]._held


def test_a_tar_is_entered_where_a_unit_begins(archive: Archive, tmp_path: Path) -> None:
    """Reading each tar from its beginning for every chunk would cost its square."""
    stream = archive.stream(12)
    plain = [unit for unit in stream.sides[0] if unit.shard == "00001.tar"]
    assert len(plain) == 5 and all(unit.byte for unit in plain[1:])
    assert [u.rows.tolist() for u in stream.sides[0] if u.shard == "00002.tgz"] == [
        [row for row in range(13) if row % 5 and row not in (BROKEN, UNUSED)]
    ]
    damaged = bytearray((archive.root / "00001.tar").read_bytes())
    damaged[: plain[3].byte] = b"?" * plain[3].byte
    (tmp_path / "00001.tar").write_bytes(damaged)
    elsewhere = _moved(stream, tmp_path)
    assert "payload" in prepare_again(elsewhere, archive.wanted, plain[3])
    assert "failure" in prepare_again(elsewhere, archive.wanted, plain[2])


def _moved(stream: Stream, root: Path) -> Stream:
    shards = {shard.path: shard for shard in list_shards(str(root))}
    return replace(stream, root=str(root), shards=shards)


# --- what cannot be decoded any more -------------------------------------------------------------


def _without(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _broken(path: Path) -> None:
    data = path.read_bytes()
    at = data.index(tiny.jpeg(SHARDS[0] + 17)) + 100
    path.write_bytes(data[:at] + bytes(400) + data[at + 400 :])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_without, r"00001\.tar.*(not there|no such|not found)"),
        (_cut, r"00001\.tar: row 1\d could be prepared before and cannot be now"),
        (_broken, r"00001\.tar: row 17 could be prepared before and cannot be now.*image"),
    ],
)
def test_a_row_that_cannot_be_prepared_again_ends_the_run(
    harm: Callable[[Path], None], message: str, archive: Archive, tmp_path: Path
) -> None:
    """An epoch that is silently shorter would train on other data than it says."""
    for path in archive.root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stream = archive.stream(12)
    shard = tmp_path / "00001.tar"
    there = _moved(stream, tmp_path)
    harm(shard)
    if shard.exists():
        there = _moved(stream, tmp_path)
    sides = archive.rows(streamed=True)
    made = Feeder([there], [Remote(_Decoder([there]))])
    with pytest.raises(RunError, match=f"(?i){message}"):
        batches(sides, feed_of(sides, made, 12), 0)
    assert not made._alive  # a worker that begins anew tries again


# --- the whole loop ------------------------------------------------------------------------------


def test_training_is_the_same_whether_rows_are_kept_or_decoded_again(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights to the bit; and a run that is stopped inside a window goes on in it."""
    cfg = loops.config(tmp_path, epochs=2)
    spec = loops.spec_for(cfg, archive.recipe.build())

    def trained(name: str, window: int | None, stop_after: int | None = None) -> Any:
        stage = loops.Stage(tmp_path / name, monkeypatch.setattr)
        if stop_after is not None:
            stage.stop_after = stop_after
        blocks = archive.kept if window is None else archive.light
        task = loops.job(cfg, tmp_path / name, blocks, spec)["job"]
        source = None if window is None else Remote(fed(archive, window, epochs=2))
        done = loop.train_loop({"job": replace(task, feeder=source, window=window)})
        if stop_after is not None:
            assert done["outcome"] == loop.STOPPED
            return trained(name, window)
        return loops.weights(tmp_path / name, done), loops.without_times(done["epochs"])

    expected, history = trained("kept", None)
    got, again = trained("streamed", 1000)
    assert again == history
    small, shuffled = trained("small", 12)
    parts, stopped = trained("parts", 12, stop_after=3)
    assert shuffled == stopped != history
    for one, other in ((expected, got), (small, parts)):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
