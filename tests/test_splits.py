"""Without these a model would be graded on pictures or captions it was trained on."""

from __future__ import annotations

import io
import itertools
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
from mmray.config import Columns, Data, Task, TextPreprocess
from mmray.errors import ConfigError
from mmray.preprocess import clean_text
from mmray.report.split import notes

NO_LEAKS = {"image": 0, "near-identical image": 0, "caption": 0}


def data(**changes: Any) -> Data:
    return Data(archive="archive", **changes)


def sample(row: int, label: Any, image: bytes, caption: str | None, **fields: Any) -> Sample:
    return Sample("a.tar", row, str(row), image, caption, {"label": label, **fields})


def identify(samples: Sequence[Sample]) -> pa.Table:
    return splits.identify(samples, data())


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


def accounted(report: splits.SplitReport) -> int:
    """The rows that a report says something of."""
    parts = (report.train, report.dev, report.left_out, report.unused, report.errors)
    return report.unlabelled + sum(sum(part.values()) for part in parts)


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

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("Tom &amp; Jerry", "Tom & Jerry"),
            ("Tom &amp;amp; Jerry", "Tom & Jerry"),
            ("caf\u00e9", "cafe\u0301"),
            ("\uff21\uff22\uff23", "ABC"),
            ("a\u200bday", "aday"),
            ("a\x07day", "aday"),
            ("@alice hi", "@bob hi"),
            ("RT @alice: hi @bob", "hi"),
            ("\uff32\uff34 \uff20alice: hi", "RT&#32;@bob: hi"),
            ("x" * 10_000 + "&amp;", "x" * 10_000 + "&"),
        ],
    )
    def test_same_caption_in_other_characters(self, one: str, other: str) -> None:
        assert splits.normal_caption(one) == splits.normal_caption(other) != ""
        assert splits.normal_caption(f"{one} 1") != splits.normal_caption(f"{other} 2")

    @pytest.mark.parametrize("others", ["keep", "drop", "token"])
    @pytest.mark.parametrize("lowercase", [False, True])
    @pytest.mark.parametrize("unicode", ["NFC", "NFKC"])
    def test_captions_that_a_model_reads_alike_are_the_same(
        self, unicode: Any, lowercase: bool, others: Any
    ) -> None:
        read = TextPreprocess(unicode=unicode, lowercase=lowercase, urls=others, mentions=others)
        parts = (
            ("@alice", "@bob", ""),
            ("Tom &amp; Jerry", "tom & jerry"),
            ("caf\u00e9", "cafe\u0301", "c\u200baf\u00e9", "CAF\u00c9"),
            ("day", "\uff24\uff21\uff39"),
            ("http://t.co/a", "www.b.c", ""),
        )
        same: dict[str, set[str]] = {}
        for words in itertools.product(*parts):
            text = " ".join(words)
            same.setdefault(clean_text(text, read), set()).add(splits.normal_caption(text))
        assert all(len(captions) == 1 for captions in same.values())

    def test_captions_without_text_link_nothing(self) -> None:
        texts = ["", "http://t.co/a", "RT @a: http://t.co/b", "@a @b", "&nbsp;\u200b", None]
        table = identify([sample(i, "x", b"%d" % i, text) for i, text in enumerate(texts)])
        assert table[splits.CAPTION_DIGEST].null_count == 6

    def test_a_row_without_picture_has_no_digest(self) -> None:
        table = identify([Sample("a", 0, "k"), Sample("a", 1, "k", b"", "")])
        assert table.schema == splits.IDENTITY_SCHEMA
        assert table[splits.IMAGE_DIGEST].null_count == 2

    def test_pictures_are_decoded_only_where_near_ones_count(self) -> None:
        rows = [sample(0, "x", tiny.jpeg(0), None), sample(1, "x", b"no picture", None)]
        assert identify(rows)[splits.PICTURE_HASH].null_count == 1
        assert splits.identify(rows, data(near=0))[splits.PICTURE_HASH].null_count == 2

    def test_half_a_surrogate_pair_is_no_crash(self) -> None:
        identify([sample(0, "x", b"1", "broken \ud83d emoji")])


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
        assert found.report.leaks == NO_LEAKS

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

    def test_a_picture_that_was_saved_again_is_no_other_picture(self) -> None:
        rows = []
        for i in range(60):
            picture, saved = tiny.scene(i, 128), []
            for image, quality in ((picture, 90), (picture.resize((100, 100)), 60)):
                sink = io.BytesIO()
                image.save(sink, "JPEG", quality=quality)
                saved.append(sink.getvalue())
            rows += [
                sample(2 * i + j, "ab"[i % 2], image_bytes, None)
                for j, image_bytes in enumerate(saved)
            ]
        found = splits.assign(identify(rows), data=data(dev_fraction=0.3), seed=0)
        sides = found.sides.to_pylist()
        assert sides[::2] == sides[1::2] and set(sides) == {"train", "dev"}
        assert found.report.leaks == NO_LEAKS and found.report.groups == 60
        assert found.report.duplicates["near-identical image"].sets == 60
        apart = splits.assign(identify(rows), data=data(near=0), seed=0).report
        assert apart.groups == 120 and not any(part.sets for part in apart.duplicates.values())

    def test_a_group_stays_on_one_side_even_where_duplicates_are_only_reported(self) -> None:
        rows = [sample(i, "ab"[i % 2], b"%d" % (i % 50), None, user=i // 4) for i in range(200)]
        asked = data(group="user", duplicates="report", dev_fraction=0.2)
        found = splits.assign(splits.identify(rows, asked), data=asked, seed=0)
        sides = np.array(found.sides.to_pylist()).reshape(50, 4)
        assert (sides == sides[:, :1]).all()
        assert found.report.leaks["group"] == 0 and found.report.leaks["image"] > 0

    def test_a_group_that_is_not_there_lists_the_fields_that_are(self) -> None:
        asked = data(group="user")
        rows = [sample(i, "ab"[i % 2], b"%d" % i, None) for i in range(4)]
        table = splits.identify(rows, asked)
        with pytest.raises(
            ConfigError, match=r"data\.group: .*'user'; fields that are there: label"
        ):
            splits.assign(table, data=asked, seed=0, fields=["label"])

    def test_labels_that_conflict_are_named(self) -> None:
        rows = [
            *(sample(i, label, b"same", None) for i, label in enumerate("aab")),
            *(sample(i, "a", b"other", None) for i in (3, 4)),
            *(sample(i, "ab"[i % 2], b"%d" % i, None) for i in range(5, 30)),
            sample(30, None, b"other", None),
        ]
        report = splits.assign(identify(rows), data=data(), seed=0).report
        found = report.duplicates["image"]
        assert (found.sets, found.rows, found.conflicting, found.conflicting_rows) == (2, 5, 1, 3)
        assert found.examples == ("a.tar[0] a and a.tar[2] b",)
        assert any("conflict in 1 of 2 sets" in line for line in notes(report))

    def test_one_flood_of_look_alikes_is_said(self) -> None:
        rows = [sample(i, "ab"[i % 2], b"%d" % max(i, 150), None) for i in range(600)]
        report = splits.assign(identify(rows), data=data(), seed=0).report
        assert any("151 of 600 rows" in line for line in notes(report))

    def test_one_group_cannot_be_split(self) -> None:
        rows = [sample(i, "ab"[i % 2], b"same", None) for i in range(10)]
        with pytest.raises(ConfigError, match="nothing can be held out: all 10 labelled rows"):
            splits.assign(identify(rows), data=data(), seed=0)

    def test_rows_without_any_content_are_split_too(self) -> None:
        rows = [Sample("a", i, "k", fields={"label": "ab"[i % 2]}) for i in range(100)]
        found = splits.assign(identify(rows), data=data(), seed=0)
        assert found.report.dev == {"a": 5, "b": 5}


class TestSplitColumn:
    def crossed(self) -> list[Sample]:
        """Rows whose picture or caption is on both sides."""
        return [
            sample(0, "a", b"1", "one", split="train"),
            sample(1, "b", b"2", "two", split="train"),
            sample(2, "a", b"1", "three", split="dev"),  # the picture of row 0
            sample(3, "b", b"4", "RT @x: Two", split="dev"),  # the caption of row 1
            sample(4, "b", b"5", "five", split="dev"),
            sample(5, "a", b"6", "six", split="test"),
            sample(6, "a", b"7", "seven"),
            sample(7, "a", b"1", "two", split="train"),  # both at once
            sample(8, "a", b"8", "eight", split="train"),
            sample(9, "b", b"8", "http://t.co/a", split="train"),
            sample(10, "b", b"10", "http://t.co/b", split="dev"),  # no caption but a link
        ]

    def test_the_archive_is_obeyed_and_its_leaks_counted(self) -> None:
        asked = data(duplicates="report")
        found = splits.assign(identify(self.crossed()), data=asked, seed=0)
        sides = [
            "train",
            "train",
            "dev",
            "dev",
            "dev",
            None,
            None,
            "train",
            "train",
            "train",
            "dev",
        ]
        assert found.sides.to_pylist() == sides
        assert found.report.leaks == NO_LEAKS | {"image": 1, "caption": 1}
        assert found.report.left_out == {}
        assert found.report.unused == {"test": 1, "none": 1}
        assert sum("too good" in line for line in notes(found.report)) == 2

    def test_training_rows_that_a_held_out_row_repeats_are_left_out(self) -> None:
        found = splits.assign(identify(self.crossed()), data=data(), seed=0)
        sides = [None, None, "dev", "dev", "dev", None, None, None, "train", "train", "dev"]
        assert found.sides.to_pylist() == sides
        report = found.report
        assert report.leaks == NO_LEAKS | {"image": 1, "caption": 1}
        assert report.left_out == NO_LEAKS | {"image": 2, "caption": 1}
        assert (report.train, report.dev) == ({"a": 1, "b": 1}, {"a": 1, "b": 3})
        told = notes(report)
        assert not any("too good" in line for line in told)
        assert any("image 2, caption 1" in line for line in told)

    @pytest.mark.parametrize("task", ["classify", "match"])
    def test_a_test_split_is_held_out_as_dev_is(self, task: Task) -> None:
        """`evaluate --split test` would count rows that the model has learned by heart."""
        rows = [
            sample(0, "a", b"0", "zero", split="train"),
            sample(1, "b", b"1", "one", split="train"),
            sample(2, "a", b"2", "two", split="train"),
            sample(3, "b", b"3", "three", split="train"),
            sample(4, "a", b"4", "four", split="dev"),
            sample(5, "b", b"0", "five", split="test"),  # the picture of row 0
            sample(6, "b", b"6", "Two", split="val2"),  # the caption of row 2
            sample(7, "a", b"1", "seven"),  # named by nobody: neither learned from nor counted
        ]
        table = splits.identify(rows, data(), task)
        found = splits.assign(table, data=data(), seed=0, task=task)
        assert found.sides.to_pylist() == [None, "train", None, "train", "dev", None, None, None]
        report = found.report
        assert report.rule == "column split: train / dev; held out too: test, val2"
        assert report.leaks == report.left_out == NO_LEAKS | {"image": 1, "caption": 1}
        assert report.unused == {"test": 1, "val2": 1, "none": 1}
        assert accounted(report) == report.rows == 8
        if task == "classify":
            assert report.duplicates["image"].conflicting == 1
        told = " ".join(notes(report))
        assert "1 held-out rows have the same image as training rows, now left out" in told
        assert "dev rows" not in told
        only_told = splits.assign(table, data=data(duplicates="report"), seed=0, task=task)
        assert only_told.report.train_rows == 4 and only_told.report.leaks == report.leaks
        assert sum("too good" in line for line in notes(only_told.report)) == 2

    def test_rows_without_a_label_hold_nothing_out(self) -> None:
        rows = [sample(i, "ab"[i % 2], b"%d" % i, None, split="train") for i in range(4)]
        rows.append(sample(4, "a", b"4", None, split="dev"))
        rows.append(sample(5, None, b"0", None, split="unlabelled"))  # the picture of row 0
        found = splits.assign(identify(rows), data=data(), seed=0)
        assert found.sides.to_pylist() == ["train"] * 4 + ["dev", None]
        assert found.report.rule == "column split: train / dev"
        assert found.report.leaks == found.report.left_out == NO_LEAKS

    def test_rows_of_a_group_in_dev_do_not_train(self) -> None:
        rows = [
            sample(i, "ab"[i % 2], b"%d" % i, None, user=user, split="dev" if i < 2 else "train")
            for i, user in enumerate([1, None, 1.0, "1", 2, 2, None, None])
        ]
        asked = data(group="user", duplicates="report")
        found = splits.assign(splits.identify(rows, asked), data=asked, seed=0)
        sides = ["dev", "dev", None, None, "train", "train", "train", "train"]
        assert found.sides.to_pylist() == sides
        assert found.report.left_out == {"group": 2}

    def test_nothing_left_to_train_on_is_said(self) -> None:
        rows = [
            sample(i, "ab"[i % 2], b"%d" % (i % 4), None, split="dev" if i < 4 else "train")
            for i in range(8)
        ]
        with pytest.raises(ConfigError, match=r"all 4 training rows.*image 4.*duplicates=report"):
            splits.assign(identify(rows), data=data(), seed=0)

    def test_every_row_is_accounted_for(self) -> None:
        rows = [
            *(sample(i, "ab"[i % 2], b"%d" % i, None, split="train") for i in range(6)),
            *(sample(i, "ab"[i % 2], b"%d" % i, None, split="dev") for i in range(6, 8)),
            sample(8, None, b"8", None, split="train"),
            sample(9, "a", b"9", None, split="other"),
            sample(12, "a", b"7", None, split="train"),  # the picture of a dev row
            Sample("a", 10, "k", error="image oversized: 9 MB", error_stage="read"),
            Sample("a", 11, "k", error="image oversized: 8 MB", error_stage="read"),
        ]
        report = splits.assign(identify(rows), data=data(), seed=0).report
        assert report.errors == {"image oversized": 2}
        assert (report.unlabelled, report.unused) == (1, {"other": 1})
        assert report.left_out["image"] == 1
        assert accounted(report) == report.rows == 13

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
        assert notes(found.report) == ["labels only in dev: c", "labels only in train: b"]


class TestLabels:
    def test_a_label_key_that_is_not_there_lists_the_fields_that_are(self) -> None:
        rows = [sample(i, None, b"%d" % i, None) for i in range(3)]
        with pytest.raises(ConfigError, match=r"'mood'.*fields that are there: guid, label, split"):
            splits.assign(
                splits.identify(rows, data(label="mood", split=None)),
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
        tables.append(splits.identify(samples, data(label=label)))
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
        assert found.report.leaks == NO_LEAKS
        # Their README: 105 sets of equal pictures, 21 with conflicting labels; most were saved
        # again since. What else is found is as alike.
        pictures = found.report.duplicates["near-identical image"]
        assert 105 <= pictures.sets <= 112 and pictures.conflicting >= 21
        assert found.report.largest_group < 20

    def test_fashion_repeats_product_names_across_its_split(self, shared: Path) -> None:
        table = read(shared / "data" / "fashion", "season")
        given = splits.assign(table, data=data(label="season"), seed=0)
        assert given.report.leaks["image"] == 0
        assert given.report.leaks["caption"] > 200
        assert given.report.left_out["caption"] > 200
        assert accounted(given.report) == given.report.rows == 7666
        pictures = given.report.duplicates["near-identical image"]  # of 92 that are identical
        assert pictures.sets < 130 and pictures.rows < 300
        assert given.report.largest_group < 30
        at = table.schema.get_field_index(splits.SPLIT)
        unnamed = table.set_column(at, splits.SPLIT, pa.nulls(table.num_rows, pa.string()))
        seeded = splits.assign(unnamed, data=data(label="season"), seed=0)
        assert seeded.report.leaks == NO_LEAKS
        assert sum(seeded.report.dev.values()) == round(0.1 * table.num_rows)
