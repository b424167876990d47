"""Without these a model would be graded on pictures or captions it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny

from mmray import splits
from mmray.archive.rows import Sample
from mmray.archive.shards import list_shards, read_shard
from mmray.config import Columns, Data
from mmray.errors import ConfigError


def data(**changes: Any) -> Data:
    return Data(archive="archive", **changes)


def sample(row: int, label: Any, image: bytes, caption: str | None, **fields: Any) -> Sample:
    return Sample("a.tar", row, str(row), image, caption, {"label": label, **fields})


def identify(samples: Sequence[Sample]) -> pa.Table:
    return splits.identify(samples, label="label", split="split")


def entangled(rows: int, seed: int = 0) -> list[Sample]:
    """Three labels; many rows share a picture, a caption, or one each with two others."""
    random = np.random.default_rng(seed)
    return [
        sample(
            i,
            str(random.choice(["rare", "some", "many"], p=[0.1, 0.3, 0.6])),
            b"picture %d" % random.integers(rows),
            f"caption {random.integers(rows)}",
        )
        for i in range(rows)
    ]


class TestIdentity:
    def test_same_caption_in_other_clothes(self) -> None:
        same = [
            "A Day at the sea",
            "a day  at the\nsea ",
            "RT @someone: a day at the sea",
            "rt @a: RT @b: A day at the sea http://t.co/N8abc",
            "a day at the sea https://t.co/N8…",
        ]
        assert {splits.normal_caption(text) for text in same} == {"a day at the sea"}
        assert splits.normal_caption("start @someone") == "start @someone"

    def test_captions_without_text_link_nothing(self) -> None:
        texts = ["", "http://t.co/a", "RT @a: http://t.co/b", None]
        table = identify([sample(i, "x", b"%d" % i, text) for i, text in enumerate(texts)])
        assert table[splits.CAPTION_DIGEST].null_count == 4

    def test_a_row_without_picture_has_no_digest(self) -> None:
        table = identify([Sample("a", 0, "k"), Sample("a", 1, "k", b"", "")])
        assert table.schema == splits.IDENTITY_SCHEMA
        assert table[splits.IMAGE_DIGEST].null_count == 2

    def test_half_a_surrogate_pair_is_no_crash(self) -> None:
        identify([sample(0, "x", b"1", "broken \ud83d emoji")])

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            *((1, "1"), (1.0, "1"), ("1", "1"), (0, "0"), (True, "true"), (0.5, "0.5")),
            *((None, None), ("", None), (float("nan"), None)),
        ],
    )
    def test_labels_of_every_type(self, value: Any, text: str | None) -> None:
        assert splits.label_text(value) == text


class TestSeededSplit:
    @pytest.mark.parametrize("seed", range(3))
    def test_no_picture_or_caption_is_on_both_sides(self, seed: int) -> None:
        samples = entangled(600, seed)
        found = splits.assign(identify(samples), data=data(), seed=seed)
        sides: dict[str | bytes | None, set[str]] = {}
        for one, side in zip(samples, found.sides.to_pylist(), strict=True):
            for content in (one.image, one.caption):
                sides.setdefault(content, set()).add(side)
        assert all(len(both) == 1 for both in sides.values())
        assert found.report.leaks == {"image": 0, "caption": 0}

    def test_every_label_is_held_out_in_its_share(self) -> None:
        found = splits.assign(identify(entangled(3000)), data=data(dev_fraction=0.2), seed=0)
        for label, count in zip(found.labels.names, found.labels.counts, strict=True):
            assert abs(found.report.dev[label] - 0.2 * count) <= 2
            assert found.report.train[label] + found.report.dev[label] == count

    def test_order_of_rows_and_shards_does_not_matter(self) -> None:
        samples = entangled(400)
        one = splits.assign(identify(samples), data=data(), seed=7).sides.to_pylist()
        order = np.random.default_rng(1).permutation(400)
        table = pa.concat_tables(
            [identify([samples[i] for i in part]) for part in np.array_split(order, 3)]
        )
        again = splits.assign(table, data=data(), seed=7).sides.to_pylist()
        assert again == [one[i] for i in order]

    def test_a_slice_of_a_table_is_split_as_the_rows_it_holds(self) -> None:
        samples = entangled(300)
        one = splits.assign(identify(samples[100:]), data=data(), seed=7).sides
        assert splits.assign(identify(samples).slice(100), data=data(), seed=7).sides == one

    def test_the_seed_decides(self) -> None:
        table = identify(entangled(400))
        first, second = (splits.assign(table, data=data(), seed=seed).sides for seed in (0, 1))
        assert first != second

    def test_a_flood_of_copies_stays_in_train(self) -> None:
        flood = [sample(i, "ad", b"%d" % i, "take the quiz") for i in range(40)]
        plain = [sample(i, "ad" if i % 2 else "post", b"%d" % i, f"{i}") for i in range(40, 440)]
        found = splits.assign(identify(flood + plain), data=data(), seed=0)
        assert set(found.sides.to_pylist()[:40]) == {"train"}
        assert found.report.largest_group == 40
        assert sum(found.report.dev.values()) == 44

    def test_large_groups_are_held_out_where_there_are_no_small_ones(self) -> None:
        rows = [sample(i, "ab"[i % 2], b"%d" % (i // 10), None) for i in range(200)]
        found = splits.assign(identify(rows), data=data(dev_fraction=0.2), seed=0)
        assert found.report.dev == {"a": 20, "b": 20}

    def test_few_rows_still_hold_one_out(self) -> None:
        rows = [sample(i, "ab"[i % 2], b"%d" % i, None) for i in range(4)]
        found = splits.assign(identify(rows), data=data(), seed=0)
        assert sum(found.report.dev.values()) == 1

    def test_one_group_cannot_be_split(self) -> None:
        rows = [sample(i, "ab"[i % 2], b"same", None) for i in range(10)]
        with pytest.raises(ConfigError, match="nothing can be held out: all 10 labelled rows"):
            splits.assign(identify(rows), data=data(), seed=0)

    def test_rows_without_any_content_are_split_too(self) -> None:
        rows = [Sample("a", i, "k", fields={"label": "ab"[i % 2]}) for i in range(100)]
        found = splits.assign(identify(rows), data=data(), seed=0)
        assert found.report.dev == {"a": 5, "b": 5}


class TestSplitColumn:
    def test_the_archive_is_obeyed_and_its_leaks_counted(self) -> None:
        rows = [
            sample(0, "a", b"1", "one", split="train"),
            sample(1, "b", b"2", "two", split="train"),
            sample(2, "a", b"1", "three", split="dev"),  # the picture of row 0
            sample(3, "b", b"4", "RT @x: Two", split="dev"),  # the caption of row 1
            sample(4, "b", b"5", "five", split="dev"),
            sample(5, "a", b"6", "six", split="test"),
            sample(6, "a", b"7", "seven"),
        ]
        found = splits.assign(identify(rows), data=data(), seed=0)
        assert found.sides.to_pylist() == ["train", "train", "dev", "dev", "dev", None, None]
        assert found.report.leaks == {"image": 1, "caption": 1}
        assert found.report.unused == {"test": 1, "none": 1}
        assert len(splits.warnings(found.report)) == 2

    def test_every_row_is_accounted_for(self) -> None:
        rows = [
            *(sample(i, "ab"[i % 2], b"%d" % i, None, split="train") for i in range(6)),
            *(sample(i, "ab"[i % 2], b"%d" % i, None, split="dev") for i in range(6, 8)),
            sample(8, None, b"8", None, split="train"),
            sample(9, "a", b"9", None, split="other"),
            Sample("a", 10, "k", error="image oversized: 9 MB", error_stage="read"),
            Sample("a", 11, "k", error="image oversized: 8 MB", error_stage="read"),
        ]
        report = splits.assign(identify(rows), data=data(), seed=0).report
        assert report.errors == {"image oversized": 2}
        assert (report.unlabelled, report.unused) == (1, {"other": 1})
        counted = sum(report.train.values()) + sum(report.dev.values()) + report.unlabelled
        assert counted + sum(report.unused.values()) + sum(report.errors.values()) == report.rows
        assert report.rows == 12

    def test_a_value_that_is_not_there_lists_those_that_are(self) -> None:
        rows = [sample(i, "ab"[i % 2], b"%d" % i, None, split="training") for i in range(4)]
        with pytest.raises(ConfigError, match=r"data\.train: .*'train'.*training \(4\)"):
            splits.assign(identify(rows), data=data(), seed=0)

    def test_a_class_of_one_side_only_is_said(self) -> None:
        labels = ["a", "b", "a", "c"]
        sides = ["train", "train", "dev", "dev"]
        rows = [
            sample(i, label, b"%d" % i, None, split=side)
            for i, (label, side) in enumerate(zip(labels, sides, strict=True))
        ]
        found = splits.assign(identify(rows), data=data(), seed=0)
        assert found.labels.names == ("a", "b", "c")
        assert splits.warnings(found.report) == ["labels only in dev: c", "labels only in train: b"]


class TestLabels:
    def test_classes_are_sorted_and_counted(self) -> None:
        labels = pa.chunked_array([["b", "a", None], ["b", None, "c"]])
        index = splits.label_index(labels, key="label", fields=())
        assert (index.names, index.counts, index.unlabelled) == (("a", "b", "c"), (1, 2, 1), 2)
        assert index.codes(labels).tolist() == [1, 0, -1, 1, -1, 2]

    def test_a_label_key_that_is_not_there_lists_the_fields_that_are(self) -> None:
        rows = [sample(i, None, b"%d" % i, None) for i in range(3)]
        with pytest.raises(ConfigError, match=r"'mood'.*fields that are there: guid, label, split"):
            splits.assign(
                splits.identify(rows, label="mood", split=None),
                data=data(label="mood"),
                seed=0,
                fields=["label", "split", "guid"],
            )

    def test_one_class_is_nothing_to_learn(self) -> None:
        rows = [sample(i, "same", b"%d" % i, None) for i in range(3)]
        with pytest.raises(ConfigError, match="all 3 labelled rows have label = 'same'"):
            splits.assign(identify(rows), data=data(), seed=0)

    def test_an_archive_of_nothing_but_errors_says_which(self) -> None:
        rows = [Sample("a", i, "k", error="caption not UTF-8: x") for i in range(3)]
        with pytest.raises(ConfigError, match="nothing to learn from: 3 x caption not UTF-8"):
            splits.assign(identify(rows), data=data(), seed=0)


def read(root: Path, label: str) -> pa.Table:
    tables = []
    for shard in list_shards(str(root)):
        stream = read_shard(str(root), shard, columns=Columns(), fields=[label, "split"])
        samples = [item for item in stream if isinstance(item, Sample)]
        tables.append(splits.identify(samples, label=label, split="split"))
    return pa.concat_tables(tables)


class TestArchives:
    def test_a_tar_archive_is_split_by_its_own_field(self, tmp_path: Path) -> None:
        found = splits.assign(
            read(tiny.write_archive(tmp_path, [10, 10]), "label"), data=data(), seed=0
        )
        assert found.labels.names == tiny.LABELS
        assert found.sides.to_pylist() == (["dev"] + ["train"] * 4) * 4

    def test_tweets_have_the_counts_of_their_readme(self, shared: Path) -> None:
        found = splits.assign(read(shared / "data" / "tweets", "label"), data=data(), seed=0)
        assert found.report.train == {"negative": 836, "neutral": 293, "positive": 1671}
        assert found.report.dev == {"negative": 119, "neutral": 42, "positive": 239}
        assert found.report.leaks == {"image": 0, "caption": 0}

    def test_fashion_repeats_product_names_across_its_split(self, shared: Path) -> None:
        table = read(shared / "data" / "fashion", "season")
        given = splits.assign(table, data=data(label="season"), seed=0)
        assert given.report.leaks["image"] == 0
        assert given.report.leaks["caption"] > 200
        at = table.schema.get_field_index(splits.SPLIT)
        unnamed = table.set_column(at, splits.SPLIT, pa.nulls(table.num_rows, pa.string()))
        seeded = splits.assign(unnamed, data=data(label="season"), seed=0)
        assert seeded.report.leaks == {"image": 0, "caption": 0}
        assert sum(seeded.report.dev.values()) == round(0.1 * table.num_rows)
