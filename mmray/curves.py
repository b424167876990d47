"""Mergeable counts of scores -> AUROC, average precision and calibration. numpy only.

Shapes: N rows, C labels. Scores are counted in bins, so that parts add up to the whole exactly and
nothing has to be sorted in one place.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mmray.metrics import Counts, Floats, Mask, interval

#: Bins are equally wide in log-odds, up to LIMIT either way: probabilities near 0 and 1, where most
#: of a sure model's lie, are told apart as well as those in the middle.
BINS, LIMIT = 2048, 16.0
CONFIDENCE_BINS = 15  # as Guo et al. 2017 have it
UNIT = 1 << 20  # confidences are summed as whole numbers: sums of parts are then exact


class ScoreBins:
    """How often each score was given to rows with and without each label.

    ``counts``: int64 [C, 2, BINS]; axis 1: without the label, with it.
    """

    def __init__(self, labels: int) -> None:
        self.counts: Counts = np.zeros((labels, 2, BINS), np.int64)

    def add(self, true: Mask, probabilities: npt.NDArray[Any]) -> None:
        """Count rows: bool [N, C] and probabilities [N, C] in [0, 1]; NaN counts as 0."""
        at_NC = _bins(probabilities)
        for label, counts in enumerate(self.counts):
            flat = np.bincount(true[:, label] * BINS + at_NC[:, label], minlength=2 * BINS)
            counts += flat.reshape(2, BINS)

    def auroc(self, label: int) -> float | None:
        """Area under the ROC curve of one label against the rest; None where either is missing.

        The probability that a row with the label has a higher score than one without, rows of one
        bin counting half (Mann & Whitney 1947; Hanley & McNeil 1982).
        """
        without, having = self.counts[label].astype(np.float64)
        if not (without.any() and having.any()):
            return None
        return float((having * _below(without)).sum() / (having.sum() * without.sum()))

    def auroc_interval(self, label: int) -> tuple[float, float]:
        """95 % interval of ``auroc`` (DeLong et al. 1988); (0, 1) where there is none."""
        without, having = self.counts[label].astype(np.float64)
        value = self.auroc(label)
        if value is None:
            return 0.0, 1.0
        wins = _below(without) / without.sum()  # of a row with the label in each bin
        losses = 1 - _below(having) / having.sum()  # of a row without it
        spread = _variance(wins, having, value) + _variance(losses, without, value)
        return interval(value, math.sqrt(spread))

    def average_precision(self, label: int) -> float | None:
        """Mean of the precision at every row with the label, from the highest score down (as in
        scikit-learn, without interpolation); None where no row has the label."""
        without, having = self.counts[label, :, ::-1].astype(np.float64)
        if not having.any():
            return None
        hits = having.cumsum()
        precision = hits / np.maximum(1, hits + without.cumsum())
        return float((having * precision).sum() / having.sum())


def _bins(probabilities: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    p = np.nan_to_num(np.asarray(probabilities, np.float64)).clip(1e-12, 1 - 1e-12)
    odds = np.log(p) - np.log1p(-p)
    at = np.floor((odds + LIMIT) * (BINS / (2 * LIMIT))).astype(np.int64)
    clipped: npt.NDArray[np.int64] = at.clip(0, BINS - 1)
    return clipped


def _below(counts: Floats) -> Floats:
    """For each bin how many of ``counts`` lie below it, those in it by half."""
    return counts.cumsum() - counts / 2


def _variance(values: Floats, weights: Floats, mean: float) -> float:
    """Of the mean of ``values``, which occur ``weights`` times."""
    rows = weights.sum()
    return float((weights * np.square(values - mean)).sum() / (rows * max(1.0, rows - 1)))


class Calibration:
    """Whether answers given with some confidence are right that often.

    ``counts``: int64 [CONFIDENCE_BINS, 3]: answers, right ones, summed confidence in 1 / UNIT.
    """

    def __init__(self) -> None:
        self.counts: Counts = np.zeros((CONFIDENCE_BINS, 3), np.int64)

    def add(self, confidence: npt.NDArray[Any], right: Mask) -> None:
        """Count answers: their confidence [N] in [0, 1], and whether they were right, bool [N]."""
        units = np.rint(np.nan_to_num(np.asarray(confidence, np.float64)) * UNIT).astype(np.int64)
        # (low, high] as in the paper
        at = np.ceil(units * (CONFIDENCE_BINS / UNIT)).astype(np.int64) - 1
        np.add.at(
            self.counts,
            at.clip(0, CONFIDENCE_BINS - 1),
            np.stack([np.ones_like(units), right.astype(np.int64), units], axis=1),
        )

    def error(self) -> float:
        """Expected calibration error: the mean distance of confidence and share of right answers
        over equally wide bins (Guo et al. 2017, arXiv:1706.04599, equation 3); 0 without rows."""
        answers, right, units = self.counts.T
        return float(np.abs(right - units / UNIT).sum() / max(1, int(answers.sum())))
