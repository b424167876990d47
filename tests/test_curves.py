"""Without these a user would publish an AUROC or a calibration error that no other tool finds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mmray.curves import Calibration, ScoreBins


def scored(true: np.ndarray, probabilities: np.ndarray) -> ScoreBins:
    bins = ScoreBins(true.shape[1])
    bins.add(true, probabilities)
    return bins


def drawn(rows: int, seed: int, sharp: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Three labels, scores that tell something about them; float32 as models give them."""
    rng = np.random.default_rng(seed)
    true = rng.random((rows, 3)) < [0.5, 0.2, 0.05]
    odds = sharp * (rng.normal(size=true.shape) + true)
    return true, (1 / (1 + np.exp(-odds))).astype(np.float32)


@pytest.mark.parametrize("sharp", [0.05, 2.0, 6.0])
def test_equal_to_scikit_learn_within_a_bin(sharp: float) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    true, p = drawn(3000, 1, sharp)
    bins = scored(true, p)
    for label in range(3):
        want = sklearn.roc_auc_score(true[:, label], p[:, label])
        # scores that differ by less than a bin in log-odds, 1 / 64, count as equal
        assert bins.auroc(label) == pytest.approx(want, abs=2e-2 if sharp < 0.1 else 1e-3)
        want = sklearn.average_precision_score(true[:, label], p[:, label])
        assert bins.average_precision(label) == pytest.approx(
            want, abs=4e-2 if sharp < 0.1 else 6e-3
        )


def test_scores_near_0_and_1_are_told_apart() -> None:
    """Most scores of a sure model lie there."""
    p = np.array([[0.9999], [0.99995], [0.99999], [1e-6], [1e-5]], np.float32)
    true = np.array([[False], [True], [True], [False], [True]])
    # of the six pairs only (1e-5, 0.9999) is the wrong way round
    assert scored(true, p).auroc(0) == pytest.approx(5 / 6)


def test_parts_merge_into_the_whole_however_they_are_cut() -> None:
    true, p = drawn(101, 2)
    whole, sure = scored(true, p), p.max(1)
    calibration = Calibration()
    calibration.add(sure, true[:, 0])
    parts, together = ScoreBins(3), Calibration()
    for start, stop in ((0, 1), (1, 60), (60, 60), (60, 101)):
        parts.add(true[start:stop], p[start:stop])
        one = Calibration()
        one.add(sure[start:stop], true[start:stop, 0])
        together.counts += one.counts
    assert np.array_equal(whole.counts, parts.counts)
    assert np.array_equal(calibration.counts, together.counts)
    assert calibration.error() == together.error()


def test_what_there_is_no_curve_of() -> None:
    true, p = np.array([[True], [True]]), np.array([[0.2], [math.nan]], np.float32)
    bins = scored(true, p)
    assert bins.auroc(0) is None and bins.auroc_interval(0) == (0.0, 1.0)
    assert bins.average_precision(0) == 1.0
    assert ScoreBins(1).average_precision(0) is None
    assert Calibration().error() == 0.0


def test_the_interval_of_auroc_covers() -> None:
    """About 95 % of intervals hold the AUROC that very many rows have."""
    true, p = drawn(200_000, 9, 1.0)
    limit = scored(true, p).auroc(1)
    assert limit is not None
    inside, widths = 0, []
    for seed in range(200):
        bins = scored(*drawn(150, seed, 1.0))
        low, high = bins.auroc_interval(1)
        inside += low <= limit <= high
        widths.append(high - low)
    assert 0.90 <= inside / 200 <= 0.99
    assert 0.1 < np.mean(widths) < 0.3


def test_calibration_error_is_guos() -> None:
    rng = np.random.default_rng(3)
    sure = rng.uniform(0.3, 1.0, 5000)
    sure[:3] = [1.0, 0.2, 1 / 3]
    right = rng.random(5000) < sure**2
    found = Calibration()
    found.add(sure.astype(np.float32), right)
    want, edges = 0.0, np.linspace(0, 1, 16)
    for low, high in itertools.pairwise(edges):
        here = (sure > low) & (sure <= high)
        if here.any():
            want += here.mean() * abs(right[here].mean() - sure[here].mean())
    assert found.error() == pytest.approx(want, abs=1e-3)
    assert found.error() > 0.1
    calibrated = Calibration()
    calibrated.add(sure, rng.random(5000) < sure)
    assert calibrated.error() < 0.03
