"""Mergeable counts -> accuracy, precision, recall, F1 and an interval. numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
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
        ``macro_*`` and ``weighted_*`` of precision, recall and f1; ``per_class`` {label:
        {precision, recall, f1, support}}; ``confusion`` (rows: true) and ``labels``.

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
        report["per_class"] = {
            label: {name: float(values[i]) for name, values in scores.items()}
            | {"support": int(support[i])}
            for i, label in enumerate(self.labels)
        }
        report["confusion"] = self.matrix.tolist()
        report["labels"] = list(self.labels)
        return report


def _ratio(above: npt.NDArray[np.float64], below: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
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
