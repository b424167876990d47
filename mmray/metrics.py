"""Mergeable counts -> accuracy, precision, recall, F1 and intervals. numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.integer[Any]] | Sequence[int]

#: 0.975 quantile of the normal distribution: two-sided 95 %
Z95 = 1.959963984540054


class Confusion:
    """Counts of (true class, predicted class) over ``labels``.

    ``matrix``: int64 [classes, classes], rows are the true class, columns the predicted one.
    Counts of parts add up to the counts of the whole, whatever the parts.
    """

    def __init__(self, labels: Sequence[str], matrix: Counts | None = None) -> None:
        size = len(labels)
        if matrix is not None and matrix.shape != (size, size):
            raise ValueError(f"matrix: got shape {matrix.shape} for {size} labels")
        self.labels = tuple(labels)
        self.matrix: Counts = np.zeros((size, size), np.int64)
        if matrix is not None:
            self.matrix += matrix

    @property
    def rows(self) -> int:
        """Rows counted."""
        return int(self.matrix.sum())

    def add(self, true: Indices, predicted: Indices) -> None:
        """Count rows: two equally long sequences of class indices in [0, classes)."""
        true_N = np.asarray(true, np.int64).reshape(-1)
        predicted_N = np.asarray(predicted, np.int64).reshape(-1)
        size = len(self.labels)
        if len(true_N) != len(predicted_N):
            raise ValueError(f"got {len(true_N)} true and {len(predicted_N)} predicted classes")
        for name, indices in (("true", true_N), ("predicted", predicted_N)):
            if len(indices) and (indices.min() < 0 or indices.max() >= size):
                raise ValueError(
                    f"{name} classes: got {indices.min()}..{indices.max()}; allowed 0..{size - 1}"
                )
        flat = np.bincount(true_N * size + predicted_N, minlength=size * size)
        self.matrix += flat.reshape(size, size)

    def merge(self, other: Confusion) -> None:
        """Add the counts of ``other``, which must be over the same labels."""
        if other.labels != self.labels:
            raise ValueError(f"labels differ: {list(self.labels)} and {list(other.labels)}")
        self.matrix += other.matrix

    def report(self) -> dict[str, Any]:
        """The numbers, as plain JSON types.

        ``rows``, ``accuracy`` and its 95 % Wilson interval ``accuracy_interval`` [low, high];
        ``macro_*`` and ``weighted_*`` of precision, recall and f1, with ``macro_f1_interval``;
        ``per_class`` {label: {precision, recall, f1, support}}; ``confusion`` (rows: true) and
        ``labels``.

        As in scikit-learn with ``zero_division=0``: a ratio without a denominator is 0, macro is
        the mean over the classes that occur, true or predicted, and weighted is by true rows.
        """
        hits = np.diagonal(self.matrix).astype(np.float64)
        support, claimed = self.matrix.sum(1), self.matrix.sum(0)
        scores = {
            "precision": _ratio(hits, claimed),
            "recall": _ratio(hits, support),
            "f1": _ratio(2 * hits, support + claimed),
        }
        occurs = (support + claimed) > 0
        rows, right = self.rows, int(hits.sum())
        report: dict[str, Any] = {
            "rows": rows,
            "accuracy": right / rows if rows else 0.0,
            "accuracy_interval": list(wilson_interval(right, rows)),
        }
        for name, values in scores.items():
            report[f"macro_{name}"] = float(values[occurs].mean()) if rows else 0.0
        for name, values in scores.items():
            report[f"weighted_{name}"] = float(values @ support) / rows if rows else 0.0
        spread = self._macro_f1_spread(scores["f1"], support + claimed, occurs)
        report["macro_f1_interval"] = list(interval(report["macro_f1"], spread))
        report["per_class"] = {
            label: {name: float(values[i]) for name, values in scores.items()}
            | {"support": int(support[i])}
            for i, label in enumerate(self.labels)
        }
        report["confusion"] = self.matrix.tolist()
        report["labels"] = list(self.labels)
        return report

    def _macro_f1_spread(self, f1_C: Floats, below_C: Counts, occurs_C: Mask) -> float:
        """Standard deviation of macro-F1 by the delta method, infinite without rows.

        Takahashi et al. 2022, "Confidence interval for micro-averaged F1 and macro-averaged F1
        scores". One more row in cell (i, j) moves F1 of class c = 2 hits / below by
        (2 [i = j = c] - F1 ([i = c] + [j = c])) / below: their mean is 0, their variance that of
        macro-F1 times ``rows``.
        """
        if not self.rows:
            return math.inf
        slope_C = _ratio(f1_C, below_C)
        moves_CC = -(slope_C[:, None] + slope_C[None, :])
        moves_CC[np.diag_indices(len(f1_C))] += 2 * _ratio(np.ones_like(f1_C), below_C)
        return float(np.sqrt((self.matrix * np.square(moves_CC)).sum()) / occurs_C.sum())


class LabelCounts:
    """Right and wrong decisions on each of ``labels``, of which a row may have any number.

    ``matrix``: int64 [labels, 4]: hits, false alarms, misses, right rejections; ``exact``: rows
    all of whose labels are right. Counts of parts add up to the counts of the whole.
    """

    def __init__(self, labels: Sequence[str], matrix: Counts | None = None, exact: int = 0) -> None:
        self.labels = tuple(labels)
        self.matrix: Counts = np.zeros((len(labels), 4), np.int64)
        self.exact = exact
        if matrix is not None:
            self.matrix += matrix

    @property
    def rows(self) -> int:
        """Rows counted."""
        return int(self.matrix[0].sum()) if len(self.labels) else 0

    def add(self, true: Mask, predicted: Mask) -> None:
        """Count rows: bool [N, labels] twice."""
        assert true.shape == predicted.shape and true.shape[1] == len(self.labels)
        each = (true & predicted, ~true & predicted, true & ~predicted, ~true & ~predicted)
        self.matrix += np.stack([cell.sum(0) for cell in each], axis=1)
        self.exact += int((true == predicted).all(1).sum())

    def report(self) -> dict[str, Any]:
        """The numbers, as plain JSON types, named as those of a Confusion.

        ``accuracy`` is the exact-match ratio: rows whose labels are all right. ``micro_*`` counts
        all decisions together, ``macro_*`` is the mean over labels that occur, true or predicted,
        ``weighted_*`` is by rows that have the label; a ratio without a denominator is 0.
        ``macro_f1_interval`` is wide enough however the labels go together.
        """
        hits, alarms, misses, _ = self.matrix.T.astype(np.float64)
        support, claimed = (hits + misses).astype(np.int64), (hits + alarms).astype(np.int64)
        scores = {
            "precision": _ratio(hits, claimed),
            "recall": _ratio(hits, support),
            "f1": _ratio(2 * hits, support + claimed),
        }
        totals = {
            "precision": _ratio(hits.sum(keepdims=True), claimed.sum(keepdims=True)),
            "recall": _ratio(hits.sum(keepdims=True), support.sum(keepdims=True)),
            "f1": _ratio(2 * hits.sum(keepdims=True), (support + claimed).sum(keepdims=True)),
        }
        occurs = (support + claimed) > 0
        rows = self.rows
        report: dict[str, Any] = {
            "rows": rows,
            "accuracy": self.exact / rows if rows else 0.0,
            "accuracy_interval": list(wilson_interval(self.exact, rows)),
        }
        report |= {f"micro_{name}": float(value[0]) for name, value in totals.items()}
        for name, values in scores.items():
            report[f"macro_{name}"] = float(values[occurs].mean()) if occurs.any() else 0.0
        for name, values in scores.items():
            report[f"weighted_{name}"] = float(values @ support) / max(1, int(support.sum()))
        # A label's own spread as for a Confusion; together at most their mean.
        f1, below = scores["f1"], support + claimed
        moves = hits * np.square(2 - 2 * f1) + (alarms + misses) * np.square(f1)
        spread_C = _ratio(np.sqrt(moves), below)
        spread = float(spread_C[occurs].mean()) if occurs.any() else math.inf
        report["macro_f1_interval"] = list(interval(report["macro_f1"], spread))
        report["per_class"] = {
            label: {name: float(values[i]) for name, values in scores.items()}
            | {"support": int(support[i]), "predicted": int(claimed[i])}
            for i, label in enumerate(self.labels)
        }
        report["labels"] = list(self.labels)
        return report


def _ratio(above: Floats, below: Counts) -> Floats:
    """``above / below``, 0 where ``below`` is."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def wilson_interval(right: int, rows: int, z: float = Z95) -> tuple[float, float]:
    """Interval of a proportion, ``right`` of ``rows``; (0, 1) without rows.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference". Unlike
    the usual +- z * sigma it stays inside [0, 1] and is not empty at 0 or all.
    """
    if not rows:
        return 0.0, 1.0
    share, spread = right / rows, z * z / rows
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / rows + spread / (4 * rows)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def interval(value: float, spread: float, z: float = Z95) -> tuple[float, float]:
    """Normal interval of a figure in [0, 1] with standard deviation ``spread``."""
    return max(0.0, value - z * spread), min(1.0, value + z * spread)
