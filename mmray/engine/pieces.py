"""What is to be read of an archive: pieces of shards, dealt into strips, one a read task.

Held as columns, so that a plan of a million shards stays within some tens of megabytes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from mmray.archive.cuts import Cut, find_cuts
from mmray.archive.shards import Shard, kind_of
from mmray.ledger import Interval, gaps
from mmray.targets import BATCH, Targets, batched

STRIP_PIECES = 64

_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("index", pa.int64()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("covered", pa.list_(pa.int64())),
        ("whole", pa.bool_()),
        ("chunk_rows", pa.int64()),
        ("byte", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``[start, stop)`` of a shard (None: to its end), less the intervals already covered,
    which are sorted and apart.

    ``index`` is the caller's number for the shard; every chunk of it carries it. A ``whole`` piece
    reports the shard's total when it ends; a part of one does not know it. ``chunk_rows`` is for
    this piece alone; None: as all others. ``byte`` is where ``start`` begins, 0 if not known.
    """

    shard: Shard
    index: int = 0
    start: int = 0
    stop: int | None = None
    covered: tuple[tuple[int, int], ...] = ()
    whole: bool = True
    chunk_rows: int | None = None
    byte: int = 0

    def skips(self, row: int) -> bool:
        at = bisect_right(self.covered, row, key=lambda interval: interval[0])
        return at > 0 and row < self.covered[at - 1][1]

    def only(self, rows: Sequence[Interval], chunk_rows: int | None = None) -> Piece:
        """These rows of the shard and no other, given as sorted intervals."""
        start, stop = rows[0][0], rows[-1][1]
        others = tuple(gaps(rows, start, stop))
        return replace(
            self, start=start, stop=stop, covered=others, whole=False, chunk_rows=chunk_rows
        )

    def cut(self, cuts: Sequence[Cut]) -> Iterator[Piece]:
        """A whole piece as several; the last tells the total. What is covered is left out."""
        begins = [Cut(self.start, self.byte), *cuts]
        for begin, end in zip(begins, [*cuts, None], strict=True):
            part = replace(self, start=begin.row, byte=begin.byte)
            if end is None:
                yield part
            elif not any(a <= begin.row and end.row <= b for a, b in self.covered):
                yield replace(part, stop=end.row, whole=False)


class Plan:
    """Pieces in any number, taken in as they stream."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        batches = [_columns(batch) for batch in batched(pieces, BATCH)]
        self._table = pa.Table.from_batches(batches, schema=_SCHEMA)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def strips(self, readers: int) -> list[Strip]:
        """The pieces dealt, largest shard first, into strips: as few as there are readers, as Ray
        ends a worker that waits for its next task, and starting another takes seconds of a core;
        but small ones, as a reader that dies reads its strip again from the beginning."""
        count = max(math.ceil(len(self) / STRIP_PIECES), min(len(self), readers))
        largest_first = np.argsort(-self._table.column("size").to_numpy(), kind="stable")
        return [Strip(self._table.take(largest_first[first::count])) for first in range(count)]


def shared(
    pieces: Iterable[Piece], root: str, targets: Targets, chunk_rows: int
) -> Iterator[Piece]:
    """``pieces`` of the archive at ``root``; those of shards far larger than others in parts."""
    outsized = targets.outsized()
    for piece in pieces:
        if piece.index in outsized and piece.stop is None:
            yield from piece.cut(find_cuts(root, piece.shard, outsized[piece.index], chunk_rows))
        else:
            yield piece


@dataclass(frozen=True, slots=True)
class Strip:
    """The pieces of one read task, in the order they are read."""

    table: pa.Table

    @property
    def bytes(self) -> int:
        return int(self.table.column("size").to_numpy().sum())

    def __iter__(self) -> Iterator[Piece]:
        for record in self.table.to_pylist():
            path = record.pop("path")
            kind = kind_of(path)
            assert kind is not None, f"{path} is no shard"
            flat = record.pop("covered")
            yield Piece(
                Shard(path, record.pop("size"), record.pop("etag"), kind),
                covered=tuple(zip(flat[::2], flat[1::2], strict=True)),
                **record,
            )


def _columns(pieces: list[Piece]) -> pa.RecordBatch:
    columns: list[list[object]] = [
        [piece.shard.path for piece in pieces],
        [piece.shard.size for piece in pieces],
        [piece.shard.etag for piece in pieces],
        [piece.index for piece in pieces],
        [piece.start for piece in pieces],
        [piece.stop for piece in pieces],
        [[row for interval in piece.covered for row in interval] for piece in pieces],
        [piece.whole for piece in pieces],
        [piece.chunk_rows for piece in pieces],
        [piece.byte for piece in pieces],
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=_SCHEMA)
