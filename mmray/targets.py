"""The shards of a scoring run, as columns: a million of them stay within some tens of megabytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmray.archive.shards import Shard, kind_of

BATCH = 16_384
OUTSIZED = 4  # times the usual size
PART_BYTES = 16 << 20  # smaller shards are usual, too
MOST_OUTSIZED, MOST_PARTS = 8, 64
T = TypeVar("T")

SCHEMA = pa.schema(
    [("path", pa.string()), ("size", pa.int64()), ("etag", pa.string()), ("stop", pa.int64())]
)


@dataclass(frozen=True, slots=True)
class Target:
    """One shard to score: all of it, or its first ``stop`` rows in a trial."""

    shard: Shard
    stop: int | None = None


class Targets(Sequence[Target]):
    """Targets in order, held as a table of ``SCHEMA``; a Target is made when it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.cast(SCHEMA)

    @classmethod
    def of(cls, targets: Iterable[Target]) -> Targets:
        batches = []
        for batch in batched(targets, BATCH):
            columns: list[list[object]] = [
                [target.shard.path for target in batch],
                [target.shard.size for target in batch],
                [target.shard.etag for target in batch],
                [target.stop for target in batch],
            ]
            arrays = [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
            batches.append(pa.record_batch(arrays, schema=SCHEMA))
        return cls(pa.Table.from_batches(batches, schema=SCHEMA))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[Target]:
        for batch in self.table.to_batches(max_chunksize=BATCH):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield _target(*values)

    @overload
    def __getitem__(self, index: int) -> Target: ...
    @overload
    def __getitem__(self, index: slice) -> Targets: ...
    def __getitem__(self, index: int | slice) -> Target | Targets:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self.take(np.arange(start, stop, step))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        (values,) = self.table.slice(index % len(self), 1).to_pylist()
        return _target(**values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Targets) and self.table.equals(other.table)

    def __hash__(self) -> int:
        return hash((len(self), self.size))

    @property
    def paths(self) -> pa.ChunkedArray:
        return self.table.column("path")

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return pc.sum(self.table.column("size")).as_py() or 0

    def outsized(self) -> dict[int, int]:
        """The places of the few shards so large beside the others that readers should share them,
        and into how many parts of about the usual size each may be cut."""
        sizes = self.table.column("size").to_numpy()
        usual = max(float(sizes.mean()), PART_BYTES) if len(sizes) else PART_BYTES
        largest = np.argsort(-sizes, kind="stable")[:MOST_OUTSIZED].tolist()
        return {
            at: min(MOST_PARTS, int(sizes[at] / usual))
            for at in largest
            if sizes[at] > OUTSIZED * usual
        }

    def take(self, which: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Targets:
        """Those at these places, or those where a mask is true."""
        if which.dtype == np.bool_:
            return Targets(self.table.filter(pa.array(which)))
        return Targets(self.table.take(pa.array(which)))

    def among(self, paths: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        """Which of the targets have one of ``paths``."""
        mask: npt.NDArray[np.bool_] = pc.is_in(self.paths, value_set=paths).to_numpy()
        return mask

    def changed(self, now: Targets) -> list[str]:
        """Paths of shards that have another size or ETag in ``now``."""
        there = self.take(self.among(now.paths))
        others = now.table.take(pc.index_in(there.paths, value_set=now.paths))
        same = pc.and_(
            pc.equal(there.table.column("size"), others.column("size")),
            pc.equal(there.table.column("etag"), others.column("etag")),
        )
        paths: list[str] = there.paths.filter(pc.invert(same)).to_pylist()
        return paths

    def joined(self, others: Targets) -> Targets:
        """Both, sorted by path."""
        return Targets(pa.concat_tables([self.table, others.table]).sort_by("path"))


def strings(values: Iterable[str]) -> pa.ChunkedArray:
    """A column of text, taken in as it streams."""
    batches = [pa.array(batch, pa.string()) for batch in batched(values, BATCH)]
    return pa.chunked_array(batches, pa.string())


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    stream = iter(items)
    while batch := list(itertools.islice(stream, size)):
        yield batch


def _target(path: str, size: int, etag: str, stop: int | None) -> Target:
    kind = kind_of(path)
    assert kind is not None, f"{path} is no shard"
    return Target(Shard(path, size, etag, kind), stop)
