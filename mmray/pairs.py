"""``match``: which other row's caption is shown with a picture, so that a model learns which pairs
belong together. Arrays only, for millions of rows.

N rows. A negative is never a true pair: rows with the same normalised caption or the same picture
are no partners of each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmray.archive.rows import ERROR
from mmray.config import Data
from mmray.duplicates import CAPTION, IMAGE, NEAR, ties
from mmray.groups import Ints, Mask, codes, components, to_numpy
from mmray.splits import WITHIN

NEGATIVE_SHARE = 0.5  # of the rows of an epoch that have a partner
#: Partners are drawn until one is allowed; rows that had no luck so often are looked through.
DRAWS = 32


@dataclass(frozen=True, slots=True)
class Kinship:
    """What may not be a negative: int64 [N] each. Rows with an equal ``caption`` or ``picture``
    code are the same; partners must have the same ``pool`` code, and -1 has none."""

    caption: Ints
    picture: Ints
    pool: Ints

    def __len__(self) -> int:
        return len(self.pool)

    def take(self, at: Ints | Mask) -> Kinship:
        return Kinship(self.caption[at], self.picture[at], self.pool[at])

    def have_partners(self) -> Mask:
        """bool [N]: whether there is any negative for each row."""
        alike = _sizes(self.pool, self.caption) + _sizes(self.pool, self.picture)
        alike -= _sizes(self.pool, self.caption, self.picture)
        some: Mask = (self.pool >= 0) & (_sizes(self.pool) > alike)
        return some


def kinship(rows: pa.Table, data: Data) -> Kinship:
    """Of the rows of a ``splits.IDENTITY_SCHEMA`` table; pictures that are nearly the same count as
    the same. Rows without a picture or a caption, and those without a value in the column
    ``data.negatives_within``, are nobody's partners."""
    tied = ties(rows, data)
    caption, image = tied[CAPTION], tied[IMAGE]
    picture = components(image, tied.get(NEAR, image))
    pool = np.zeros(len(image), np.int64) if data.negatives_within is None else codes(rows[WITHIN])
    usable = (caption >= 0) & (image >= 0) & to_numpy(pc.is_null(rows[ERROR]))
    return Kinship(caption, picture, np.where(usable, pool, -1))


def shown_captions(kin: Kinship, *, epoch: int, seed: int, steps: Ints | None = None) -> Ints:
    """int64 [N]: the row whose caption is shown with each picture in an epoch, its own for
    positives. It depends on nothing but the arguments, so every worker finds the same.

    ``steps``: int64 [N], the step that takes each row, where partners must be of the same step.
    """
    rng = np.random.default_rng([seed, epoch, 0])
    negative = rng.random(len(kin)) < NEGATIVE_SHARE
    if steps is not None:
        pool = np.where(kin.pool >= 0, kin.pool * (int(steps.max(initial=0)) + 1) + steps, -1)
        kin = Kinship(kin.caption, kin.picture, pool)
    partners = draw_partners(kin, rng, negative)
    return np.where(partners >= 0, partners, np.arange(len(kin)))


def fixed_partners(kin: Kinship, seed: int) -> Ints:
    """int64 [N]: one negative for every row, -1 where there is none; for evaluation."""
    return draw_partners(kin, np.random.default_rng([seed, 1]), np.ones(len(kin), dtype=bool))


def draw_partners(kin: Kinship, rng: np.random.Generator, wanted: Mask) -> Ints:
    """int64 [N]: for each ``wanted`` row another of its pool with neither its caption nor its
    picture, all such rows equally likely; -1 for the others and where there is none."""
    partners = np.full(len(kin), -1, dtype=np.int64)
    members = np.argsort(kin.pool, kind="stable")  # of one pool after the other
    first, size = _starts(kin.pool[members], kin.pool), _sizes(kin.pool)
    left = np.flatnonzero(wanted & kin.have_partners())
    for _ in range(DRAWS):
        if not len(left):
            return partners
        drawn = members[first[left] + rng.integers(0, size[left])]
        other = (kin.caption[drawn] != kin.caption[left]) & (
            kin.picture[drawn] != kin.picture[left]
        )
        partners[left[other]] = drawn[other]
        left = left[~other]
    for i in left.tolist():
        pool = members[first[i] : first[i] + size[i]]
        other = (kin.caption[pool] != kin.caption[i]) & (kin.picture[pool] != kin.picture[i])
        partners[i] = rng.choice(pool[other])
    return partners


def _sizes(*columns: Ints) -> Ints:
    """int64 [N]: how many rows agree with each in all ``columns``."""
    index = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        _, code = np.unique(column, return_inverse=True)
        _, index = np.unique(index * (int(code.max(initial=0)) + 1) + code, return_inverse=True)
    sizes: Ints = np.bincount(index)[index] if len(index) else index
    return sizes


def _starts(sorted_pools: Ints, pools: Ints) -> Ints:
    """int64 [N]: where the pool of each row begins among sorted ones."""
    starts: npt.NDArray[np.int64] = np.searchsorted(sorted_pools, pools)
    return starts
