"""A user would score a sidecar as pairs, miss shards, or see folders in another order on S3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from archives import pairs, read, tar_bytes

from mmray import storage
from mmray.archive.shards import Ignored, Shard, kind_of, list_archive, list_shards, read_shard
from mmray.errors import Conflict, NotFound


def put(root: str, *names: str) -> None:
    for name in names:
        storage.write_bytes(storage.join(root, name), b"")


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    return str(request.getfixturevalue("s3_endpoint").bucket()) + "/in"


def test_names_tell_what_a_shard_is() -> None:
    kinds = {
        "a.tar": "tar", "b/a.tar.gz": "tar", "a.tgz": "tar", "A.TAR": "tar", "a.parquet": "parquet",
        "a.tar.bz2": None, "a.json": None, "tar": None, "a.tar.parquet": "parquet", "a.csv": None,
    }  # fmt: skip
    assert {name: kind_of(name) for name in kinds} == kinds


def test_shards_come_in_key_order_and_the_rest_is_told(root: str) -> None:
    put(
        root,
        "b/2.tar",
        "b/10.tar",
        "a.parquet",
        "README.md",
        "b-1.tgz",
        "b/_stats.json",
        "c.tar.gz",
    )
    found = list(list_archive(root))
    shards = [item.path for item in found if isinstance(item, Shard)]
    assert shards == ["a.parquet", "b-1.tgz", "b/10.tar", "b/2.tar", "c.tar.gz"]
    assert [item.path for item in list_shards(root)] == shards
    ignored = {item.path: item.sidecar for item in found if isinstance(item, Ignored)}
    assert ignored == {"README.md": False, "b/_stats.json": False}


def test_img2dataset_tables_beside_tars_are_passed_over(root: str) -> None:
    tars = ["00000.tar", "00001.tar.gz", "d/00002.tgz", "x.1.tar", "x.tar"]
    sidecars = ["00000.parquet", "00001.parquet", "d/00002.parquet", "x.1.parquet", "x.parquet"]
    shards = ["00002.parquet", "00003.parquet", "d/00000.parquet", "x.10.parquet", "x.a.tar"]
    stats = ["00000_stats.json", "d/00002_stats.json"]
    put(root, *tars, *sidecars, *shards, *stats)
    found = list(list_archive(root))
    kept = [item.path for item in found if isinstance(item, Shard)]
    assert kept == sorted([*tars, *shards])
    ignored = {item.path: item.sidecar for item in found if isinstance(item, Ignored)}
    assert ignored == dict.fromkeys(sidecars, True) | dict.fromkeys(stats, False)


def test_listing_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million shards must not be held to give the first."""
    taken = 0

    def endless(_root: str) -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield storage.Object(f"{taken:09d}.{'parquet' if taken % 2 else 'tar'}", 1, "e")

    monkeypatch.setattr(storage, "list_objects", endless)
    shards = list_shards("s3://b/p")
    for number in range(1, 10_001):
        next(shards)
        assert taken <= number + 2


def test_one_shard_can_be_the_archive(root: str) -> None:
    data = tar_bytes(pairs(3))
    storage.write_bytes(storage.join(root, "d/x.tar"), data)
    storage.write_bytes(storage.join(root, "d/y.tar"), data)
    samples, (end,) = read(storage.join(root, "d/x.tar"))
    assert [(s.shard, s.row) for s in samples] == [("x.tar", 0), ("x.tar", 1), ("x.tar", 2)]
    assert end.shard == "x.tar"
    with pytest.raises(NotFound):
        list(list_shards(str(Path("/nowhere/x.tar"))))


def test_a_directory_named_like_a_shard_is_a_directory(root: str) -> None:
    inner = storage.join(root, "x.tar")
    storage.write_bytes(storage.join(inner, "x.tar"), tar_bytes(pairs(2)))
    samples, _ = read(inner)
    assert [s.row for s in samples] == [0, 1]


def test_a_shard_that_changed_after_the_listing_is_refused(root: str) -> None:
    storage.write_bytes(storage.join(root, "x.tar"), tar_bytes(pairs(2)))
    (shard,) = list_shards(root)
    storage.write_bytes(storage.join(root, "x.tar"), tar_bytes(pairs(3)))
    with pytest.raises(Conflict, match="changed since it was listed"):
        list(read_shard(root, shard))
