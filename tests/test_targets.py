"""A user would lose shards, or pay for them twice, if a run's listing were kept wrongly."""

from __future__ import annotations

import numpy as np
import pytest

from mmray.archive.shards import Shard
from mmray.engine.pieces import Piece, Plan
from mmray.targets import BATCH, Target, Targets, batched, strings


def shard(name: str, size: int = 1, etag: str = "e") -> Shard:
    return Shard(name, size, etag, "parquet" if name.endswith(".parquet") else "tar")


def of(*shards: Shard) -> Targets:
    return Targets.of(map(Target, shards))


def test_targets_come_back_as_they_went_in() -> None:
    many = [Target(shard(f"{i}.tar", i, f"e{i}"), i if i % 2 else None) for i in range(BATCH + 3)]
    targets = Targets.of(iter(many))
    assert list(targets) == many and len(targets) == len(many)
    assert targets[BATCH + 1] == many[BATCH + 1] and targets[-1] == many[-1]
    assert list(targets[2:5]) == many[2:5]
    assert targets.size == sum(range(BATCH + 3))
    with pytest.raises(IndexError):
        targets[len(many)]


def test_no_targets_are_no_targets() -> None:
    none = Targets.of(())
    assert not none and list(none) == [] and none.size == 0
    assert of(shard("a.tar")).among(none.paths).tolist() == [False]


def test_what_changed_and_what_is_new() -> None:
    held = of(shard("a.tar"), shard("b.tar", 2), shard("c.parquet", etag="x"))
    now = of(shard("c.parquet", etag="y"), shard("b.tar", 2), shard("a.tar", 9), shard("d.tar"))
    assert held.changed(now) == ["a.tar", "c.parquet"]
    assert held.changed(held) == []
    new = now.take(~now.among(held.paths))
    assert [target.shard.path for target in held.joined(new)] == [
        "a.tar", "b.tar", "c.parquet", "d.tar",
    ]  # fmt: skip
    assert now.among(strings(["d.tar", "z.tar"])).tolist() == [False, False, False, True]
    assert [t.shard.path for t in now.take(np.array([3, 1]))] == ["d.tar", "b.tar"]


def test_batches_hold_every_item_once() -> None:
    assert list(batched(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(batched([], 2)) == []


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_every_piece_is_in_one_strip_and_large_shards_are_read_first(count: int) -> None:
    pieces = [
        Piece(
            shard(f"{i}.parquet" if i % 3 else f"{i}.tar", size=(i * 37) % 101),
            index=i,
            start=i,
            stop=i + 5 if i % 2 else None,
            covered=((i, i + 1), (i + 2, i + 3)) if i % 5 == 0 else (),
            whole=i % 2 == 0,
            chunk_rows=1 if i % 7 == 0 else None,
        )
        for i in range(count)
    ]
    plan = Plan(iter(pieces))
    strips = plan.strips(readers=2)
    found = [piece for strip in strips for piece in strip]
    assert len(plan) == count and sorted(found, key=lambda piece: piece.index) == pieces
    for strip in strips:
        sizes = [piece.shard.size for piece in strip]
        assert sizes == sorted(sizes, reverse=True)
    firsts = [next(iter(strip)).shard.size for strip in strips]
    assert firsts == sorted((p.shard.size for p in pieces), reverse=True)[: len(strips)]
