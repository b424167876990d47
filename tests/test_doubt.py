"""Without these rounding would give a row another label, or deciding such rows cost a run its
speed."""

from __future__ import annotations

import numpy as np
import pytest

from mmray import doubt


def some(rows: int, noise: float, *, several: bool = False, seed: int = 0) -> list[np.ndarray]:
    """Probabilities of float32, and of a precision that is off by ``noise`` log odds."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (rows, 4))
    both = logits, logits + rng.normal(0, noise, logits.shape)
    if several:
        return [(1 / (1 + np.exp(-x))).astype(np.float32) for x in both]
    return [(np.exp(x) / np.exp(x).sum(1, keepdims=True)).astype(np.float32) for x in both]


def given(probabilities: np.ndarray, *, several: bool) -> np.ndarray:
    return probabilities >= 0.5 if several else probabilities.argmax(1)[:, None]


@pytest.mark.parametrize("several", [False, True])
def test_labels_that_are_not_in_doubt_are_those_of_float32(several: bool) -> None:
    limit = doubt.limit(*some(200, 0.01, several=several), several=several)
    exact, rough = some(50_000, 0.01, several=several, seed=1)
    changed = (given(exact, several=several) != given(rough, several=several)).any(1)
    close = doubt.closeness(rough, several=several) < limit
    assert changed.sum() > 50 and not (changed & ~close).any()
    assert close.mean() < 0.07


def test_a_precision_that_does_nothing_leaves_nothing_in_doubt() -> None:
    exact, _ = some(100, 0.0)
    assert doubt.limit(exact, exact, several=False) == 0.0
    assert not (doubt.closeness(exact, several=False) < 0.0).any()


def test_few_rows_are_decided_however_rough_a_precision_is() -> None:
    exact, rough = some(1_000, 3.0)
    limit = doubt.limit(exact, rough, several=False)
    assert 0.03 < (doubt.closeness(rough, several=False) < limit).mean() <= doubt.SHARE


def test_rows_without_scores_say_nothing_and_are_in_no_doubt() -> None:
    exact, rough = some(100, 0.01)
    sound = doubt.limit(exact[1:], rough[1:], several=False)
    rough[0] = np.nan
    assert doubt.limit(exact, rough, several=False) == sound > 0
    assert not doubt.closeness(rough, several=False)[0] < sound
    assert doubt.limit(exact[:0], rough[:0], several=False) == 0.0


def test_answers_that_are_sure_stay_numbers() -> None:
    sure = np.array([[1, 0, 0], [0, 0, 1]], np.float32)
    for several in (False, True):
        assert np.isfinite(doubt.closeness(sure, several=several)).all()
