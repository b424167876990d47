"""Without these numbers would depend on how many workers counted, or on whose definition."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mmray.config import Task
from mmray.counts import AnswerCounts, quality

LABELS = ("a", "b", "c", "d")


def answers(task: Task, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """True labels and probabilities float32 [N, C]; no row has label d."""
    rng = np.random.default_rng(seed)
    if task == "multilabel":
        true = rng.random((rows, 4)) < [0.6, 0.3, 0.1, 0.0]
        odds = 2 * rng.normal(size=true.shape) + 2 * true - 1
        return true, (1 / (1 + np.exp(-odds))).astype(np.float32)
    true = rng.choice(3, rows, p=[0.6, 0.3, 0.1])
    odds = rng.normal(size=(rows, 4)) + 1.5 * np.eye(4)[true]
    shares = np.exp(odds)
    return true, (shares / shares.sum(1, keepdims=True)).astype(np.float32)


def counted(task: Task, true: np.ndarray, p: np.ndarray) -> AnswerCounts:
    counts = AnswerCounts(LABELS, task)
    counts.add(true, p)
    return counts


@pytest.mark.parametrize("task", ["classify", "multilabel"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_counts_the_same(task: Task, workers: int) -> None:
    """101 rows, which divide by none of them; the sum of vectors is what all-reduce makes."""
    true, p = answers(task, 101)
    whole = counted(task, true, p)
    shares = np.array_split(np.arange(101), workers)
    parts = [counted(task, true[at], p[at]) for at in shares]
    together = AnswerCounts(LABELS, task)
    together.load(np.sum([part.vector() for part in parts], axis=0))
    assert together.rows == 101
    assert together.report() == whole.report()
    merged = AnswerCounts(LABELS, task)
    for part in parts:
        merged.merge(part)
    assert merged.report() == whole.report()


def test_other_labels_are_not_merged() -> None:
    with pytest.raises(ValueError, match="labels or tasks differ"):
        AnswerCounts(("a", "b")).merge(AnswerCounts(LABELS))
    with pytest.raises(ValueError, match="labels or tasks differ"):
        AnswerCounts(LABELS, "multilabel").merge(AnswerCounts(LABELS))


def test_several_labels_a_row_are_counted_as_scikit_learn_does() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    true, p = answers("multilabel", 400)
    report, given = counted("multilabel", true, p).report(), p >= 0.5
    assert report["accuracy"] == pytest.approx(sklearn.accuracy_score(true, given))
    seen = (true | given).any(0)  # macro is over labels that occur
    for average in ("micro", "macro", "weighted"):
        for name in ("precision", "recall", "f1"):
            want = getattr(sklearn, f"{name}_score")(
                true[:, seen], given[:, seen], average=average, zero_division=0
            )
            assert report[f"{average}_{name}"] == pytest.approx(want), (average, name)
    each = sklearn.precision_recall_fscore_support(true, given, zero_division=0)
    for i, label in enumerate(LABELS):
        of = report["per_class"][label]
        got = [of[name] for name in ("precision", "recall", "f1", "support")]
        assert got == pytest.approx([column[i] for column in each])
        assert of["predicted"] == given[:, i].sum()
    want = sklearn.roc_auc_score(true[:, :3], p[:, :3], average="macro")
    assert report["auroc"] == pytest.approx(want, abs=1e-3)
    assert report["per_class"]["d"]["auroc"] is None


def test_auroc_of_many_classes_is_one_against_the_rest() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    true, p = answers("classify", 500)
    report = counted("classify", true, p).report()
    each = [sklearn.roc_auc_score(true == i, p[:, i]) for i in range(3)]
    assert report["auroc"] == pytest.approx(np.mean(each), abs=1e-3)
    assert (
        report["confusion"] == sklearn.confusion_matrix(true, p.argmax(1), labels=range(4)).tolist()
    )


def test_auroc_of_two_classes_is_that_of_the_second() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(4)
    true = rng.integers(0, 2, 300)
    p = rng.beta(2 + true, 3 - true).astype(np.float32)
    counts = AnswerCounts(("mismatch", "match"), "match")
    counts.add(true, np.stack([1 - p, p], axis=1))
    report = counts.report()
    assert report["auroc"] == pytest.approx(sklearn.roc_auc_score(true, p), abs=1e-3)
    low, high = report["auroc_interval"]
    assert low < report["auroc"] < high
    assert quality(report) == report["auroc"]
    assert quality({**report, "task": "classify"}) == report["macro_f1"]


@pytest.mark.parametrize("task", ["classify", "multilabel"])
def test_the_interval_of_macro_f1_covers(task: Task) -> None:
    """Macro-F1 over very many rows lies inside about 95 % of the intervals, or more for several
    labels a row, whose interval holds however they go together."""
    limit = counted(task, *answers(task, 200_000, 99)).report()["macro_f1"]
    inside, widths = 0, []
    for seed in range(150):
        report = counted(task, *answers(task, 400, seed)).report()
        low, high = report["macro_f1_interval"]
        inside += low <= limit <= high
        widths.append(high - low)
    assert inside / 150 >= 0.9
    assert 0.05 < np.mean(widths) < 0.2


@pytest.mark.parametrize("task", ["classify", "multilabel"])
def test_a_report_is_plain_json_even_without_rows(task: Task) -> None:
    for rows in (0, 1, 5):
        report = counted(task, *answers(task, rows)).report()
        assert json.loads(json.dumps(report, allow_nan=False)) == report
        assert report["rows"] == rows and report["task"] == task
    assert AnswerCounts(LABELS, task).report()["macro_f1_interval"] == [0.0, 1.0]
