"""What is read together when rows are prepared again: chunks, or what cannot be entered between."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmray.archive import rows
from mmray.archive.shards import kind_of
from mmray.engine.windows import Ints

if TYPE_CHECKING:
    from mmray.engine.prepared import Wanted


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows of one side that are prepared again together: in ``[start, stop)`` of a shard, which is
    entered at ``byte``; ``rows`` are those that can be used."""

    shard: str
    start: int
    stop: int
    byte: int
    rows: Ints


def units_of(
    chunks: Sequence[Mapping[str, Any]], wanted: Mapping[str, Wanted], *, dev: bool
) -> list[Unit]:
    """What to read for the rows of one side, in order of (shard, row)."""
    found: list[Unit] = []
    for chunk in chunks:
        shard, start, stop = chunk[rows.SHARD], chunk["start"], chunk["stop"]
        ours = wanted[shard]
        used = (ours.classes[start:stop] >= 0) & (ours.dev[start:stop] == dev)
        used[[row - start for row, _, _ in json.loads(chunk["aside"])]] = False
        if used.any():
            at = start + np.flatnonzero(used)
            found.append(Unit(shard, start, stop, chunk["byte"], at))
    units = []
    for group in together([(unit.shard, unit.start, unit.byte) for unit in found]):
        parts = [found[i] for i in group]
        at = np.concatenate([part.rows for part in parts])
        units.append(replace(parts[0], stop=parts[-1].stop, rows=at))
    return units


def together(chunks: Sequence[tuple[str, int, int]]) -> list[list[int]]:
    """Which chunks (shard, start, byte) make a unit, by their indices, in order of (shard, start):
    what can only be reached by reading what lies before it is read with that."""
    groups: list[list[int]] = []
    last = None
    for i in sorted(range(len(chunks)), key=lambda i: chunks[i][:2]):
        shard, _, byte = chunks[i]
        if shard == last and not byte and kind_of(shard) == "tar":
            groups[-1].append(i)
        else:
            groups.append([i])
        last = shard
    return groups
