"""Without these a row would be learned or counted under labels that it does not have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmray import labels, splits
from mmray.archive.rows import Sample
from mmray.config import Data, Task
from mmray.errors import ConfigError


def data(**changes: Any) -> Data:
    return Data(archive="archive", **changes)


def index_of(column: pa.ChunkedArray, task: Task = "classify", **changes: Any) -> labels.LabelIndex:
    return labels.label_index(column, data=data(**changes), task=task, fields=())


def test_labels_of_any_type_are_text() -> None:
    for value, text in [
        ("x", "x"), (1, "1"), (1.0, "1"), (1.5, "1.5"), (True, "true"), (None, None), ("", None),
        (float("nan"), None), (["x"], None),
    ]:  # fmt: skip
        assert labels.label_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (["wild", "calm"], "calm|wild"),
        (["calm", "calm", None, ""], "calm"),
        ([2, 1.0], "1|2"),
        ("wild|calm", "calm|wild"),
        (" wild | calm |", "calm|wild"),
        ("calm", "calm"),
        (3, "3"),
        ([], ""),
        ("", ""),
        (None, None),
        (float("nan"), None),
    ],
)
def test_a_row_may_have_any_number_of_labels_or_nobody_looked(value: Any, text: str | None) -> None:
    """No label at all is an answer; a null is none."""
    assert labels.label_set(value, "|") == text


def test_a_label_with_the_separator_in_it_is_refused() -> None:
    """Scores could not be read back."""
    with pytest.raises(ConfigError, match=r"data\.label_separator: got '\|'.*'black\|white'"):
        labels.label_set(["red", "black|white"], "|")
    assert labels.label_set(["red", "black|white"], ";") == "black|white;red"


def test_classes_are_sorted_and_counted() -> None:
    column = pa.chunked_array([["b", "a", None], ["b", None, "c"]])
    index = index_of(column)
    assert (index.names, index.counts, index.unlabelled) == (("a", "b", "c"), (1, 2, 1), 2)
    assert index.codes(column).tolist() == [1, 0, -1, 1, -1, 2]
    assert index.members() is None
    assert index.counted(np.array([1, 1, 2])) == {"a": 0, "b": 2, "c": 1}


def test_sets_of_labels_are_told_apart_and_counted_by_label() -> None:
    column = pa.chunked_array([["a|b", "", "b"], ["b", None, "a|c"]])
    index = index_of(column, "multilabel")
    assert (index.names, index.counts, index.unlabelled) == (("a", "b", "c"), (2, 3, 1), 1)
    assert index.sets == ("", "a|b", "a|c", "b")
    codes = index.codes(column)
    assert codes.tolist() == [1, 0, 3, 3, -1, 2]
    members = index.members()
    assert members is not None
    assert members.tolist() == [[0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 0]]
    assert index.counted(codes[codes >= 0]) == {"a": 2, "b": 3, "c": 1}
    # by the rarest label; rows without any by themselves; nothing for the unlabelled
    assert index.strata(codes).tolist() == [0, 3, 1, 1, -1, 2]
    with pytest.raises(ConfigError, match=r"multilabel needs at least two.*label_separator, '\|'"):
        index_of(pa.chunked_array([["a", "", None]]), "multilabel")


def test_given_labels_are_joined_in_order() -> None:
    chosen = np.array([[True, False, True], [False, False, False]])
    assert labels.joined(("x", "b", "a"), chosen, ";") == ["x;a", ""]
    assert labels.multi_hot(["x;a", "", "a;new"], ("x", "b", "a"), ";").tolist() == [
        [True, False, True],
        [False, False, False],
        [False, False, True],
    ]


def test_a_split_by_seed_holds_out_a_share_of_every_label_and_of_rows_without_any() -> None:
    random = np.random.default_rng(0)
    names = np.array(["common", "some", "rare"])
    drawn = random.random((2000, 3)) < [0.5, 0.2, 0.03]
    samples = [
        # two rows share each picture: groups stay whole
        Sample("a.tar", i, str(i), b"%d" % (i // 2), f"c{i}", {"label": names[row].tolist()})
        for i, row in enumerate(drawn)
    ]
    settings = data(split=None)
    table = splits.identify(samples, settings, "multilabel")
    found = splits.assign(table, data=settings, seed=1, task="multilabel")
    report, sides = found.report, found.sides.to_pylist()
    assert sides[::2] == sides[1::2]
    assert not any(report.leaks.values())
    assert 190 <= report.dev_rows <= 200 and report.train_rows == 2000 - report.dev_rows
    dev = np.array(sides) == "dev"
    for i, name in enumerate(names.tolist()):
        assert report.dev[name] == drawn[dev, i].sum()
        share = report.dev[name] / (report.dev[name] + report.train[name])
        assert 0.05 < share < 0.15, (name, share)
    empty = ~drawn.any(1)
    assert 0.08 < (dev & empty).sum() / empty.sum() < 0.12


def test_match_needs_no_label_column() -> None:
    settings = data(negatives_within="kind", split=None)
    samples = [Sample("a", i, "k", b"%d" % i, f"c{i}", {"kind": "x"}) for i in range(20)]
    table = splits.identify(samples, settings, "match")
    found = splits.assign(table, data=settings, seed=0, task="match")
    assert found.labels.names == ("mismatch", "match")
    assert (found.report.train_rows, found.report.dev_rows, found.report.unlabelled) == (18, 2, 0)
    assert table[splits.WITHIN].to_pylist() == ["x"] * 20
    assert splits.identity_fields(settings, "match") == ("kind",)
