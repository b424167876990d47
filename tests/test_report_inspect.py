"""A user would pay for a run before knowing what of the archive is broken."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from archives import tar_bytes
from PIL import Image

from mmray.archive.pack import pack
from mmray.archive.shards import Shard
from mmray.errors import ConfigError, NotFound
from mmray.report import inspect as module
from mmray.report import inspection
from mmray.report.inspect import Asked, inspect, inspect_shard
from mmray.report.inspection import Counts, spread


def picture(kind: str, width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(out, kind)
    return out.getvalue()


JPEG, PNG = picture("JPEG", 40, 30), picture("PNG", 20, 50)


def members(prefix: str) -> list[tuple[str, bytes]]:
    return [
        (f"{prefix}a.jpg", JPEG), (f"{prefix}a.txt", b"a short caption"),
        (f"{prefix}a.json", b'{"label": "x", "split": "train"}'),
        (f"{prefix}b.png", PNG), (f"{prefix}b.txt", b"word " * 30),
        (f"{prefix}b.json", b'{"label": "y", "split": "dev"}'),
        (f"{prefix}c.jpg", JPEG[: len(JPEG) // 2]), (f"{prefix}c.txt", b"cut"),
        (f"{prefix}d.jpg", b"no picture"), (f"{prefix}d.txt", b"not found"),
        (f"{prefix}e.txt", b"no picture"),
        (f"{prefix}f.jpg", JPEG),
        (f"{prefix}g.jpg", JPEG), (f"{prefix}g.txt", b" \n"),
        (f"{prefix}h.jpg", JPEG), (f"{prefix}h.png", PNG), (f"{prefix}h.txt", b"two"),
        (f"{prefix}i.jpg", b""), (f"{prefix}i.txt", b"empty"),
    ]  # fmt: skip


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    root.mkdir()
    (root / "0.tar").write_bytes(tar_bytes(members("")))
    (root / "0.parquet").write_bytes(b"img2dataset's table")
    (root / "0_stats.json").touch()
    (root / "1.tar").write_bytes(tar_bytes(members(""), end=False)[: -512 * 4])
    (root / "2.parquet").write_bytes(b"no Parquet")
    return root


@pytest.mark.parametrize("workers", [1, 2])
def test_what_an_archive_holds_is_counted(archive: Path, workers: int) -> None:
    seen: list[Any] = []
    found = inspect(str(archive), workers=workers, progress=lambda *done: seen.append(done))
    result = json.loads(json.dumps(found.to_json()))
    assert result["shards"] == {"tar": 2, "parquet": 1}
    assert result["shards_read"] == 3
    assert result["ignored"] == {"sidecars": 1, "other": 1}
    assert result["bytes"] == sum(
        (archive / n).stat().st_size for n in ("0.tar", "1.tar", "2.parquet")
    )
    assert result["pairs"] == 17
    assert (result["usable"], result["usable_images"], result["usable_captions"]) == (4, 8, 11)
    assert result["images"]["count"] == 13
    assert result["images"]["formats"] == {"JPEG": 6, "PNG": 2}
    assert result["images"]["width"] == {"min": 20, "median": 40, "max": 40}
    assert result["images"]["height"] == {"min": 30, "median": 30, "max": 50}
    assert (result["captions"]["count"], result["captions"]["empty"]) == (14, 2)
    assert result["captions"]["chars"] == {"min": 2, "median": 9, "max": 150}
    assert result["labels"] == {"field": "label", "counts": {"x": 2, "y": 2}}
    assert result["splits"] == {"field": "split", "counts": {"train": 2, "dev": 2}}
    assert result["broken"] == {
        "image truncated": 2, "image not recognised": 2, "no image": 2, "no caption": 2,
        "empty caption": 2, "two images under one key": 1, "image empty": 1, "shard cut": 1,
    }  # fmt: skip
    assert result["usable"] + sum(result["broken"].values()) == result["pairs"]
    assert [problem.split(":")[0] for problem in result["problems"]] == ["1.tar", "2.parquet"]
    assert [(e["shard"], e["row"], e["label"]) for e in result["examples"]] == [
        ("0.tar", 0, "x"), ("0.tar", 1, "y"), ("1.tar", 0, "x")
    ]  # fmt: skip
    assert result["examples"][0]["image"] == "JPEG 40x30"
    assert len(result["examples"][1]["caption"]) == 60
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_it_reads_well(archive: Path) -> None:
    text = str(inspect(str(archive), workers=1, examples=1))
    for line in [
        "shards    1 parquet, 2 tar; ",
        "passed over: 1 tables beside tars, 1 other files",
        "pairs     17; usable: 4 as pairs, 8 as pictures, 11 as texts",
        "images    13: JPEG 6, PNG 2",
        "width 20 to 40 (median 40) px, height 30 to 50 (median 30) px",
        "captions  14: 2 to 150 (median 9) characters, 2 empty",
        "label     x 2, y 2",
        "broken    2 image truncated",
        "problems  1.tar: cut at byte ",
        "examples  0.tar[0] a: JPEG 40x30, 'a short caption' -> x",
    ]:
        assert line in text
    part = str(inspect(str(archive), workers=1, max_shards=1, examples=0))
    assert "pairs     9 in the first 1 shards; usable: 2 as pairs" in part
    assert "examples" not in part


def test_an_archive_on_s3(archive: Path, s3_endpoint: Any) -> None:
    root = s3_endpoint.bucket()
    pack(str(archive / "0.tar"), f"{root}/x")
    found = inspect(f"{root}/x", workers=2)
    assert found.counts.pairs == 9
    assert found.counts.labels == {"x": 1, "y": 1}


def test_nothing_to_inspect_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \.tar, \.tar\.gz, \.tgz or \.parquet shards"):
        inspect(str(tmp_path))
    with pytest.raises(NotFound):
        inspect(str(tmp_path / "nowhere"))


def test_the_reasons_are_those_of_scoring(shared: Path, tmp_path: Path) -> None:
    """Of 140 odd and broken images, those that a decoder accepts are usable, the rest are not."""
    pack(str(shared / "data" / "bad-images"), str(tmp_path / "out"))
    found = inspect(str(tmp_path / "out"), workers=1)
    counts = found.counts
    assert (counts.pairs, counts.images) == (140, 140)
    assert counts.usable_images == counts.broken["no caption"]
    assert counts.broken.total() == 140
    assert all(why == "no caption" or why.startswith("image ") for why in counts.broken)


def dies_on_the_second(asked: Asked, shard: Shard) -> Counts:
    """Stands for a decoder that takes its process along."""
    if shard.path == "1.tar":
        os._exit(11)
    return inspect_shard(asked, shard)


def test_a_decoder_that_kills_its_process_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("0.tar", "1.tar", "2.tar"):
        (tmp_path / name).write_bytes(tar_bytes([("a.txt", b"one"), ("b.txt", b"two")]))
    monkeypatch.setattr(module, "inspect_shard", dies_on_the_second)
    found = inspect(str(tmp_path), workers=2)
    assert found.counts.pairs == 4
    (problem,) = found.counts.problems
    assert problem.startswith("1.tar: worker died: ")


def test_counting_keeps_the_memory_it_needs_small() -> None:
    counts = Counts()
    for start in range(0, 5000, 500):
        ids = Counter({f"id-{number}": 1 for number in range(start, start + 500)})
        counts.add(Counts(labels=ids))
    assert len(counts.labels) <= inspection.MAX_NAMES
    assert counts.labels.total() == 5000
    assert counts.labels[inspection.OTHERS] > 3000


def test_spread() -> None:
    assert spread(Counter()) is None
    assert spread(Counter([3])) == {"min": 3, "median": 3, "max": 3}
    assert spread(Counter([5, 1, 1, 9, 9, 9])) == {"min": 1, "median": 5, "max": 9}
