"""Which rows of an archive an evaluation counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmray import splits
from mmray.archive import rows
from mmray.archive.shards import Shard
from mmray.bundle import Manifest
from mmray.config import Data
from mmray.engine.rundir import archive_digest
from mmray.engine.scan import by_shard, field_names
from mmray.errors import ConfigError
from mmray.labels import label_text

AUTO, ALL = "auto", "all"


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which rows count: those whose ``column`` has ``value``, or that are marked in ``marks`` (bool
    by row, by shard), or all. ``side``: "train" or "dev", where ``marks`` are still to be found."""

    text: str
    column: str | None = None
    value: str | None = None
    side: str | None = None
    marks: Mapping[str, npt.NDArray[np.bool_]] | None = None

    def takes(self, sample: rows.Sample) -> bool:
        if self.marks is not None:
            return bool(self.marks[sample.shard][sample.row])
        if self.column is not None:
            return label_text(sample.fields.get(self.column)) == self.value
        return True

    def mask(self, found: pa.Table) -> npt.NDArray[np.bool_]:
        """bool [rows]: which of the rows of a scan, in order of (shard, row), it takes."""
        if self.marks is not None:
            names = found[rows.SHARD].unique().to_pylist()
            return np.concatenate([np.zeros(0, dtype=bool), *(self.marks[n] for n in names)])
        if self.column is not None:
            mine = pc.fill_null(pc.equal(found[splits.SPLIT], self.value), False)
            return np.asarray(mine.to_numpy(), dtype=bool)
        return np.ones(found.num_rows, dtype=bool)


def choose_rows(
    manifest: Manifest,
    archive: str,
    shards: Sequence[Shard],
    samples: Sequence[rows.Sample],
    split: str,
) -> Chosen:
    """What ``split`` means for this archive. Raises ConfigError when it means nothing."""
    data = manifest.training.data
    if split == ALL:
        return Chosen("all labelled rows")
    column = data.split
    there = column is not None and any(
        label_text(sample.fields.get(column)) is not None for sample in samples
    )
    if there:
        value = data.dev if split == AUTO else split
        return Chosen(f"rows with {column} = {value}", column=column, value=value)
    known = manifest.training.split.get("archive_digest") == archive_digest(shards)
    trained_here = known or data.archive == archive  # a copy of the archive is the archive
    if split == AUTO and not trained_here:
        return Chosen("all labelled rows (another archive than the training's, with no split)")
    sides = {AUTO: splits.DEV, data.dev: splits.DEV, data.train: splits.TRAIN}
    if not trained_here or split not in sides:
        names = ", ".join(field_names(samples)) or "none"
        raise ConfigError(
            f"--split: got {split!r}; the archive has no field {column!r} with values (there are: "
            f"{names}); allowed: auto, all"
        )
    if not known:
        raise ConfigError(
            f"--split: {archive} has changed since the bundle was trained, so the rows that were "
            "held out by seed are not known any more; use --split all, or an archive of other rows"
        )
    return Chosen(f"{sides[split]} rows of the seeded split", side=sides[split])


def split_data(manifest: Manifest) -> Data:
    """By what training split its rows."""
    data = manifest.training.data
    if "near" not in data.model_fields_set:  # a bundle of before: only identical pictures counted
        return data.model_copy(update={"near": 0})
    return data


def held_out(chosen: Chosen, manifest: Manifest, found: pa.Table) -> Chosen:
    """``chosen`` with the rows of its side, decided anew as training did; ``found``: a scan of the
    archive for ``split_data``."""
    data, seed = split_data(manifest), manifest.training.seed
    sides = splits.assign(found, data=data, seed=seed, task=manifest.task).sides
    mine = pc.fill_null(pc.equal(sides, chosen.side), False).to_numpy(zero_copy_only=False)
    return Chosen(chosen.text, marks=by_shard(found, mine))
