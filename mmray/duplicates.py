"""What ties rows together, and what of it crosses from held-out rows to training.

A tie is an int64 [N] array of codes, equal where rows are the same in that respect, -1 where a row
has nothing to compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mmray.archive.rows import LABEL, ROW, SHARD
from mmray.config import Data
from mmray.groups import Ints, Mask, codes
from mmray.near import near_codes

IMAGE_DIGEST, CAPTION_DIGEST = "image_digest", "caption_digest"
PICTURE_HASH, GROUP_DIGEST = "picture_hash", "group_digest"

#: Respects in which rows can be the same, as reports name them. Near-identical pictures include
#: the identical ones; counts of what crosses name those apart.
IMAGE, NEAR, CAPTION, GROUP = "image", "near-identical image", "caption", "group"
EXAMPLES = 3  # of conflicting labels, that are named


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Sets of two rows and more that are the same in one respect; ``conflicting`` are those whose
    labels differ, ``examples`` two rows of some of them, for a person."""

    sets: int
    rows: int
    conflicting: int
    conflicting_rows: int
    examples: tuple[str, ...]


def ties(rows: pa.Table, data: Data) -> dict[str, Ints]:
    """By respect, the codes of ``IDENTITY_SCHEMA`` rows."""
    found = {IMAGE: codes(rows[IMAGE_DIGEST])}
    if data.near:
        found[NEAR] = near_codes(rows[PICTURE_HASH], data.near)
    found[CAPTION] = codes(rows[CAPTION_DIGEST])
    if data.group is not None:
        found[GROUP] = codes(rows[GROUP_DIGEST])
    return found


def binding(tied: Mapping[str, Ints], data: Data) -> dict[str, Ints]:
    """Those that keep rows on one side: a group always, the others by ``data.duplicates``."""
    every = data.duplicates == "one_side"
    return {respect: code for respect, code in tied.items() if every or respect == GROUP}


def crossing(tied: Mapping[str, Ints], rows: Mask, others: Mask) -> dict[str, Mask]:
    """bool [N] by respect: those of ``rows`` that are the same as one of ``others``; a row under
    "near-identical image" has no identical one there."""
    found = {}
    for respect, code in tied.items():
        found[respect] = rows & (code >= 0) & np.isin(code, code[others])
        if respect == NEAR:
            found[respect] &= ~found[IMAGE]
    return found


def conflicts(rows: pa.Table, tied: Mapping[str, Ints], used: Mask) -> dict[str, Duplicates]:
    """The duplicates among the rows that are ``used``, all of them labelled, by respect."""
    labels = codes(rows[LABEL])
    return {
        respect: _duplicates(rows, np.flatnonzero(used & (code >= 0)), code, labels)
        for respect, code in tied.items()
        if respect != GROUP
    }


def _duplicates(rows: pa.Table, at: Ints, code: Ints, labels: Ints) -> Duplicates:
    at = at[np.lexsort((at, labels[at], code[at]))]  # set after set, in it label after label
    starts = np.flatnonzero(np.diff(code[at], prepend=-1))
    ends = np.append(starts[1:], len(at))
    several = ends - starts > 1
    starts, ends = starts[several], ends[several]
    differ = labels[at[starts]] != labels[at[ends - 1]]
    pairs = zip(at[starts[differ]][:EXAMPLES], at[ends[differ] - 1][:EXAMPLES], strict=True)
    return Duplicates(
        sets=len(starts),
        rows=int((ends - starts).sum()),
        conflicting=int(differ.sum()),
        conflicting_rows=int((ends - starts)[differ].sum()),
        examples=tuple(f"{_row(rows, one)} and {_row(rows, other)}" for one, other in pairs),
    )


def _row(rows: pa.Table, at: int) -> str:
    return f"{rows[SHARD][at]}[{rows[ROW][at]}] {rows[LABEL][at]}"
