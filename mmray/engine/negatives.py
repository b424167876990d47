"""``match``: what training and evaluation need to know to show pictures with other rows' captions.

Evaluation draws partners among the rows that its side has, not among those that could be prepared:
so training's dev figures are those that ``mmray evaluate`` gives later.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmray import groups, splits
from mmray.archive import rows
from mmray.config import Data, TrainConfig
from mmray.engine.scan import LabelledRows
from mmray.groups import Ints
from mmray.pairs import Kinship, fixed_partners, kinship, shown_captions


@dataclass(frozen=True, slots=True)
class Negatives:
    """``train``: of the prepared training rows, in their order. ``dev``: int64 [N dev], for each
    prepared dev row the one whose caption makes its negative, -1 where there is none."""

    train: Kinship
    dev: Ints

    def shown(self, order: Ints, cfg: TrainConfig, epoch: int) -> Ints:
        """int64 [N]: the row whose caption each training row is shown with in an epoch that takes
        them in this ``order``."""
        steps = None
        if cfg.train.negatives == "batch":
            steps = np.empty(len(order), np.int64)
            steps[order] = np.arange(len(order)) // cfg.train.batch_size
        return shown_captions(self.train, epoch=epoch, seed=cfg.seed, steps=steps)

    def alone(self) -> dict[str, int]:
        """Rows of each side without any negative."""
        return {
            splits.TRAIN: int((~self.train.have_partners()).sum()),
            splits.DEV: int((self.dev < 0).sum()),
        }


def find_negatives(
    data: LabelledRows, aside: Collection[tuple[str, int]], cfg: TrainConfig
) -> Negatives:
    """For a ``match`` training; ``aside``: (shard, row) of what could not be prepared."""
    kin = kinship(data.rows, cfg.data)
    left_out = set(aside)
    names = zip(data.rows[rows.SHARD].to_pylist(), data.rows[rows.ROW].to_pylist(), strict=True)
    ready = np.array([name not in left_out for name in names], dtype=bool)
    train, dev = data.side(splits.TRAIN), data.side(splits.DEV)
    partners = fixed_partners(kin.take(dev), cfg.seed)
    kept = ready[dev]
    place = np.where(kept, kept.cumsum() - 1, -1)  # among prepared rows
    found = np.where(partners >= 0, place[partners], -1)[kept]
    return Negatives(kin.take(train & ready), found)


@dataclass(frozen=True, slots=True)
class Other:
    """Another row's caption, and which row that is."""

    caption: str
    shard: str
    row: int


def other_captions(
    found: pa.Table, chosen: npt.NDArray[np.bool_], *, data: Data, seed: int
) -> Mapping[str, Mapping[int, Other]]:
    """By shard and row, with which caption each chosen row makes a negative. ``found``: a scan with
    captions; ``chosen``: bool [rows]."""
    usable = chosen & groups.to_numpy(pc.is_null(found[rows.ERROR]))
    own = found.filter(pa.array(usable))
    partners = fixed_partners(kinship(found, data).take(usable), seed)
    at = np.flatnonzero(partners >= 0)
    shown = own.select([rows.CAPTION, rows.SHARD, rows.ROW]).take(pa.array(partners[at]))
    others: dict[str, dict[int, Other]] = {}
    places = own.select([rows.SHARD, rows.ROW]).take(pa.array(at)).to_pylist()
    for place, other in zip(places, shown.to_pylist(), strict=True):
        made = Other(other[rows.CAPTION], other[rows.SHARD], other[rows.ROW])
        others.setdefault(place[rows.SHARD], {})[place[rows.ROW]] = made
    return others
