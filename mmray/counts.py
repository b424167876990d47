"""All that is counted of a model's answers: decisions, ranks and confidence, for any task.

Shapes: N rows, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmray.config import Task
from mmray.curves import Calibration, ScoreBins
from mmray.metrics import Confusion, LabelCounts

#: From this probability on a label of ``multilabel`` is given.
THRESHOLD = 0.5

Ints = npt.NDArray[np.int64]


class AnswerCounts:
    """Counts over some rows; those of parts merge into those of the whole, whatever the parts."""

    def __init__(self, labels: Sequence[str], task: Task = "classify") -> None:
        self.labels, self.task = tuple(labels), task
        several = task == "multilabel"
        self.decisions: Confusion | LabelCounts = (LabelCounts if several else Confusion)(labels)
        self.scores = ScoreBins(len(labels))
        self.calibration = Calibration()

    @property
    def rows(self) -> int:
        """Rows counted."""
        return self.decisions.rows

    def add(self, true: npt.NDArray[Any], probabilities: npt.NDArray[Any]) -> None:
        """Count rows.

        ``true``: class indices [N], or for multilabel bool [N, C]; ``probabilities``: [N, C].
        """
        if isinstance(self.decisions, LabelCounts):
            has_NC = np.asarray(true, bool)
            given_NC = probabilities >= THRESHOLD
            self.decisions.add(has_NC, given_NC)
            sure_NC = np.where(given_NC, probabilities, 1 - probabilities)
            self.calibration.add(sure_NC.reshape(-1), (has_NC == given_NC).reshape(-1))
        else:
            best_N = probabilities.argmax(1)
            self.decisions.add(true, best_N)
            self.calibration.add(probabilities.max(1, initial=0.0), true == best_N)
            has_NC = true[:, None] == np.arange(len(self.labels))
        self.scores.add(has_NC, probabilities)

    def merge(self, other: AnswerCounts) -> None:
        """Add the counts of ``other``, which must be over the same labels and of the same task."""
        if (other.labels, other.task) != (self.labels, self.task):
            raise ValueError(f"labels or tasks differ: {self.labels} and {other.labels}")
        self.load(self.vector() + other.vector())

    # --- as numbers to sum -----------------------------------------------------------------------

    def vector(self) -> Ints:
        """All counts, int64 [size]: the sum of parts' vectors is the vector of the whole."""
        exact = self.decisions.exact if isinstance(self.decisions, LabelCounts) else 0
        parts = (self.decisions.matrix, self.scores.counts, self.calibration.counts)
        return np.concatenate([[exact], *(part.reshape(-1) for part in parts)])

    def load(self, vector: Ints) -> None:
        """Take the counts of ``vector`` in place of these."""
        parts = (self.decisions.matrix, self.scores.counts, self.calibration.counts)
        if isinstance(self.decisions, LabelCounts):
            self.decisions.exact = int(vector[0])
        start = 1
        for part in parts:
            part[...] = vector[start : start + part.size].reshape(part.shape)
            start += part.size
        assert start == len(vector), "a vector of other labels"

    # --- as figures ------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """The report of the decisions, and ``task``; ``auroc``, of two classes that of the second
        with its ``auroc_interval``, else the mean of each label against the rest, null where none
        has one; ``ece``, the expected calibration error; each label's ``auroc`` and
        ``average_precision`` among its own figures."""
        report = {"task": self.task} | self.decisions.report()
        each = [self.scores.auroc(i) for i in range(len(self.labels))]
        known = [value for value in each if value is not None]
        if self.task != "multilabel" and len(self.labels) == 2:
            report["auroc"] = each[1]
            report["auroc_interval"] = list(self.scores.auroc_interval(1))
        else:
            report["auroc"] = float(np.mean(known)) if known else None
        report["ece"] = self.calibration.error()
        for i, label in enumerate(self.labels):
            report["per_class"][label] |= {
                "auroc": each[i],
                "average_precision": self.scores.average_precision(i),
            }
        return report


def quality(report: dict[str, Any]) -> float:
    """By what one model of a task is better than another: macro-F1, and AUROC for ``match``, whose
    users choose their own threshold."""
    if report.get("task") == "match":
        return float(report["auroc"] or 0.0)
    return float(report["macro_f1"])
