"""The generated archive: it must really need both the picture and the text."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image

from mmray import ledger, storage
from mmray.demo import captions, generate
from mmray.demo.endpoint import s3_endpoint
from mmray.demo.run import (
    Size,
    Story,
    download,
    make_archive,
    score_and_kill,
    score_to_the_end,
    start_over,
    tell_table,
    tell_verdict,
)
from mmray.errors import ConfigError
from mmray.report.progress import Console

COUNT = 400


@pytest.fixture(scope="module")
def pairs() -> list[generate.Pair]:
    return list(generate.pairs(COUNT, seed=7))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(
    pairs: list[generate.Pair],
) -> None:
    assert list(generate.pairs(COUNT, seed=7)) == pairs
    assert [p.caption for p in generate.pairs(20, seed=8)] != [p.caption for p in pairs[:20]]


def test_neither_picture_nor_text_gives_the_label(pairs: list[generate.Pair]) -> None:
    """Whatever a model answers that knows one side only, half of its answers are wrong."""
    for split in ("train", "dev"):
        rows = [p for p in pairs if p.split == split]
        assert rows
        for one_side in ("weather", "tone"):
            for value in {getattr(p, one_side) for p in rows}:
                seen = Counter(p.label for p in rows if getattr(p, one_side) == value)
                assert max(seen.values()) * 2 == seen.total()
                assert len(seen) == 2


def test_both_together_give_the_label(pairs: list[generate.Pair]) -> None:
    labels = {(p.weather, p.tone): p.label for p in pairs}
    assert all(labels[p.weather, p.tone] == p.label for p in pairs)
    assert set(labels.values()) == set(generate.LABELS)


def test_no_caption_comes_twice_and_none_names_its_label_or_weather(
    pairs: list[generate.Pair],
) -> None:
    assert len({p.caption for p in pairs}) == COUNT
    words = {*generate.LABELS, "sun", "sunny", "rain", "storm", "stormy", "cloud", "clouds"}
    assert not [p for p in pairs if words & set(p.caption.lower().split())]
    assert not set(captions.PRAISE) & set(captions.COMPLAINT)


def test_pictures_are_small_rgb_jpegs_that_all_differ(pairs: list[generate.Pair]) -> None:
    assert len({p.image for p in pairs}) == COUNT
    for pair in pairs[:20]:
        image = Image.open(io.BytesIO(pair.image))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (112, 112))


def test_a_count_that_cannot_be_balanced_is_refused() -> None:
    with pytest.raises(ValueError, match="got 30; must be a positive multiple of 20"):
        list(generate.pairs(30))


def test_the_source_folder_has_one_line_and_one_file_a_pair(tmp_path: Path) -> None:
    generate.write_source(tmp_path / "source", 40, broken=8, seed=1)
    with open(tmp_path / "source" / generate.TABLE, encoding="utf-8", newline="") as handle:
        table = list(csv.DictReader(handle))
    assert len(table) == 40
    whole = {p.image for p in generate.pairs(40, seed=1)}
    images = [(tmp_path / "source" / row["image"]).read_bytes() for row in table]
    assert sum(image not in whole for image in images) == 8
    broken = [r["split"] for r, image in zip(table, images, strict=True) if image not in whole]
    assert set(broken) == {"train"}  # the held-out rows, and so the table of scores, stay whole


@pytest.mark.parametrize("how", generate.BAD_IMAGES)
def test_a_damaged_picture_cannot_be_decoded(pairs: list[generate.Pair], how: str) -> None:
    with pytest.raises(OSError):
        Image.open(io.BytesIO(generate.damage(pairs[0].image, how))).load()


def test_the_odd_tar_holds_good_and_broken_pairs_in_turn(tmp_path: Path) -> None:
    broken = generate.write_odd_tar(tmp_path / "odd.tar", 20)
    assert broken == 10
    members: dict[str, list[str]] = {}
    with tarfile.open(tmp_path / "odd.tar") as tar:
        for name in tar.getnames():
            key, _, extension = name.partition(".")
            members.setdefault(key, []).append(extension)
            if extension == "json":  # of no split, they hold nothing out of training
                assert set(json.load(tar.extractfile(name) or io.BytesIO())) == {"label"}
    assert len(members) == 20
    kinds = Counter(tuple(extensions) for extensions in members.values())
    assert kinds[("jpg", "json")] == kinds[("txt", "json")] == 2
    assert kinds[("jpg", "jpeg", "txt", "json")] == 2
    assert kinds[("jpg", "txt", "json")] == 14  # ten good, and those with bad text in them


# --- the run -------------------------------------------------------------------------------------


def test_the_endpoint_serves_s3_and_leaves_the_environment_as_it_was() -> None:
    before = dict(os.environ)
    with s3_endpoint("trial") as url:
        assert os.environ["AWS_ENDPOINT_URL"] == url
        storage.write_bytes("s3://trial/a/b", b"bytes")
        assert [item.path for item in storage.list_objects("s3://trial")] == ["a/b"]
    assert dict(os.environ) == before
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)


def test_an_earlier_demo_is_replaced_but_nothing_else_is(tmp_path: Path) -> None:
    said = io.StringIO()
    story = Story(Console(said))
    start_over(tmp_path / "demo", story)
    (tmp_path / "demo" / "old").touch()
    start_over(tmp_path / "demo", story)
    assert not (tmp_path / "demo" / "old").exists()
    assert "starting over" in said.getvalue()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="holds something else"):
        start_over(mine, story)
    assert (mine / "thesis.txt").exists()


def metrics_of(accuracy: float) -> dict[str, Any]:
    per_class = {label: {"support": n} for label, n in zip("abc", (50, 30, 20), strict=True)}
    return {"rows": 100, "accuracy": accuracy, "macro_f1": accuracy, "per_class": per_class}


@pytest.mark.parametrize(("fusion", "ahead"), [(0.9, True), (0.65, True), (0.59, False)])
def test_the_demo_says_so_when_fusion_is_not_ahead(fusion: float, ahead: bool) -> None:
    said = io.StringIO()
    metrics = {"fusion": metrics_of(fusion), "image": metrics_of(0.5), "text": metrics_of(0.52)}
    assert tell_table(metrics, Story(Console(said))) is ahead
    assert ("NOT clearly ahead" in said.getvalue()) is not ahead


@pytest.mark.timeout(600)
def test_a_killed_scoring_run_goes_on_and_loses_no_pair(tmp_path: Path) -> None:
    """The second half of the demo, with a bundle that was not trained."""
    said = io.StringIO()
    story = Story(Console(said))
    size = Size(pairs=400, broken=4, odd=20, shard_rows=10)
    with s3_endpoint("trial"):
        root = "s3://trial"
        broken = make_archive(tmp_path / "source", f"{root}/archive", size, story)
        assert broken == 14
        bundle = tiny.bundle(f"{root}/bundle")
        command = ["score", bundle, f"{root}/archive", "--out", f"{root}/scored"]
        score_and_kill(command, root, story)
        assert "kill -9" in said.getvalue()
        assert 0 < len(ledger.done_shards(f"{root}/scored")) < 41
        score_to_the_end(command, story)
        assert "going on: " in said.getvalue()
        assert tell_verdict(f"{root}/scored", broken, story)
        assert "420 rows = 406 scored + 14 set aside" in said.getvalue()
        download(f"{root}/scored", tmp_path / "scored")
    assert len(list((tmp_path / "scored/scores").rglob("*.parquet"))) == 41
