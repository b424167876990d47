"""Without these a user would publish numbers that no other tool reproduces."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mmray.metrics import Confusion, wilson_interval

LABELS = ["a", "b", "c", "d", "e"]


def counted(true: np.ndarray, predicted: np.ndarray) -> Confusion:
    confusion = Confusion(LABELS)
    confusion.add(true, predicted)
    return confusion


@pytest.mark.parametrize("seed", range(12))
def test_equal_to_scikit_learn(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 60))
    # narrow ranges leave classes out: some never true, some never predicted, some neither
    true = rng.integers(0, int(rng.integers(1, 6)), rows)
    predicted = rng.integers(int(rng.integers(0, 4)), 5, rows)
    report = counted(true, predicted).report()
    assert report["rows"] == rows
    assert report["accuracy"] == pytest.approx(sklearn.accuracy_score(true, predicted))
    for average in ("macro", "weighted"):
        for name in ("precision", "recall", "f1"):
            score = getattr(sklearn, f"{name}_score")
            want = score(true, predicted, average=average, zero_division=0)
            assert report[f"{average}_{name}"] == pytest.approx(want), (average, name)
    want_classes = sklearn.precision_recall_fscore_support(
        true, predicted, labels=range(5), zero_division=0
    )
    got = [[c[k] for c in report["per_class"].values()] for k in ("precision", "recall", "f1")]
    np.testing.assert_allclose(got, want_classes[:3])
    assert [c["support"] for c in report["per_class"].values()] == want_classes[3].tolist()
    matrix = sklearn.confusion_matrix(true, predicted, labels=range(5))
    assert report["confusion"] == matrix.tolist()
    assert list(report["per_class"]) == report["labels"] == LABELS


def test_parts_merge_into_the_whole_however_they_are_cut() -> None:
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 5, (2, 101))
    whole = counted(true, predicted)
    merged = Confusion(LABELS)
    for start, stop in ((0, 1), (1, 60), (60, 60), (60, 101)):
        merged.merge(counted(true[start:stop], predicted[start:stop]))
    assert merged.report() == whole.report()
    assert Confusion(LABELS, whole.matrix).report() == whole.report()
    with pytest.raises(ValueError, match="labels differ"):
        merged.merge(Confusion(["x", "y"]))


def test_merging_does_not_change_what_was_given() -> None:
    first = counted(np.array([0]), np.array([1]))
    copy = Confusion(LABELS, first.matrix)
    copy.add([2], [2])
    assert first.rows == 1 and copy.rows == 2


def test_indices_outside_the_labels_are_refused() -> None:
    confusion = Confusion(LABELS)
    with pytest.raises(ValueError, match=r"predicted classes: got 0\.\.5; allowed 0\.\.4"):
        confusion.add([0, 1], [0, 5])
    with pytest.raises(ValueError, match=r"true classes: got -1\.\.0"):
        confusion.add([-1, 0], [0, 0])
    with pytest.raises(ValueError, match="2 true and 1 predicted"):
        confusion.add([0, 1], [0])
    with pytest.raises(ValueError, match="shape"):
        Confusion(LABELS, np.zeros((2, 2), np.int64))
    assert confusion.rows == 0


def test_the_report_is_plain_json_even_without_rows() -> None:
    report = Confusion(LABELS).report()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["rows"] == 0 and report["accuracy_interval"] == [0.0, 1.0]
    full = counted(np.array([0, 1]), np.array([0, 2])).report()
    assert json.loads(json.dumps(full, allow_nan=False)) == full


def test_the_accuracy_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    for right, rows in ((239, 400), (0, 10), (10, 10), (1, 1), (733, 767)):
        want = stats.binomtest(right, rows).proportion_ci(0.95, method="wilson")
        assert wilson_interval(right, rows) == pytest.approx((want.low, want.high), abs=1e-9)
    # it covers: over all outcomes of 60 tosses the true share lies inside about 95 % of the time
    rights = np.random.default_rng(1).binomial(60, 0.7, 4000)
    inside = [lo <= 0.7 <= hi for lo, hi in (wilson_interval(int(r), 60) for r in rights)]
    assert 0.92 < np.mean(inside) < 0.98
