"""Which rows' labels a lower precision may have wrong: those it can hardly decide.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

#: A limit is the most that the precision does to the log odds of the rows it is measured by, or so
#: many standard deviations where that is more. Four alone left 2 labels of 7,666 products changed
#: in 8 bits, which are far off in a few rows; the most alone says little where rows are few.
DEVIATIONS = 4.0
#: No limit is above what this share of rows is below, so that deciding them costs no more.
SHARE = 0.05
_LEAST = 1e-7  # a probability, as its logarithm is taken


def closeness(probabilities_NC: Floats, *, several: bool) -> Floats:
    """How near each row is to another label, float32 [N]: the log odds of its best label beside the
    second; where it may have ``several``, those of the one nearest to being as likely as not. NaN
    for a row that has none."""
    if several:
        return np.asarray(np.abs(_log_odds(probabilities_NC)).min(axis=1))
    return _lead(probabilities_NC, np.argsort(probabilities_NC, axis=1)[:, -2:])


def limit(exact_NC: Floats, rough_NC: Floats, *, several: bool) -> float:
    """The ``closeness`` below which a label that ``rough`` gives is in doubt: after what ``rough``
    makes of the log odds of ``exact``, the same rows in float32. 0 without rows."""
    scored = np.isfinite(exact_NC).all(axis=1) & np.isfinite(rough_NC).all(axis=1)
    exact_NC, rough_NC = exact_NC[scored], rough_NC[scored]
    if not len(exact_NC):
        return 0.0
    if several:
        off = _log_odds(rough_NC) - _log_odds(exact_NC)
    else:
        best_N2 = np.argsort(exact_NC, axis=1)[:, -2:]
        off = _lead(rough_NC, best_N2) - _lead(exact_NC, best_N2)
    affordable = np.quantile(closeness(rough_NC, several=several), SHARE)
    return float(min(max(DEVIATIONS * off.std(), np.abs(off).max()), affordable))


def _lead(probabilities_NC: Floats, two_N2: npt.NDArray[np.intp]) -> Floats:
    """The log odds of the second of ``two`` classes beside the first."""
    p_N2 = np.take_along_axis(probabilities_NC, two_N2, axis=1).clip(_LEAST)
    return np.asarray(np.log(p_N2[:, 1]) - np.log(p_N2[:, 0]))


def _log_odds(probabilities_NC: Floats) -> Floats:
    p_NC = probabilities_NC.clip(_LEAST, 1 - _LEAST)
    return np.asarray(np.log(p_NC) - np.log1p(-p_NC))
