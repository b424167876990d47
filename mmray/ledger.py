"""What is done of a scoring run, and what is left. No Ray: files are the whole truth.

OUT/scores/<shard>.parquet      a finished shard; that it exists is the commit record
OUT/_run/parts/<shard>/<a>-<b>.parquet   scored rows [a, b) of a shard still in work
OUT/_run/retry/<id>/            the same of a retry; no other command takes it up
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmray import storage
from mmray.archive import rows
from mmray.errors import NotFound, StorageError
from mmray.scoring_run import Run
from mmray.targets import Target, batched, strings

READERS, WINDOW = 16, 4096  # threads over many small files, and how many of these are asked for
TAIL_BYTES = 1 << 16  # read at once of a score file: its footer, and all of a small one
SCORES, PARTS = "scores", "_run/parts"
SUMMARY, REPORT = "_run/summary.json", "_run/report.html"
METADATA_KEY = b"mmray"
S = TypeVar("S")
T = TypeVar("T")
Interval = tuple[int, int]


# --- what is done --------------------------------------------------------------------------------


def scores_uri(out: str, shard: str) -> str:
    return storage.join(out, SCORES, shard + ".parquet")


def done_shards(out: str) -> pa.ChunkedArray:
    """Paths of the shards whose scores are committed: one listing, nothing opened."""
    return strings(
        item.path.removesuffix(".parquet")
        for item in _listing(storage.join(out, SCORES))
        if item.path.endswith(".parquet")
    )


def covered(out: str) -> dict[str, list[Interval]]:
    """Row intervals of the parts that lie in OUT, by shard, in order."""
    found: dict[str, list[Interval]] = {}
    for item in _listing(storage.join(out, PARTS)):
        shard, _, name = item.path.rpartition("/")
        start, _, stop = name.removesuffix(".parquet").partition("-")
        found.setdefault(shard, []).append((int(start), int(stop)))
    return {shard: sorted(intervals) for shard, intervals in found.items()}


def gaps(intervals: Iterable[Interval], start: int, stop: int) -> list[Interval]:
    """What of ``[start, stop)`` the sorted ``intervals`` leave out."""
    missing = []
    for a, b in intervals:
        if a > start:
            missing.append((start, min(a, stop)))
        start = max(start, b)
        if start >= stop:
            return missing
    return [*missing, (start, stop)] if start < stop else missing


def joined(intervals: Iterable[Interval]) -> list[Interval]:
    """The same rows in as few sorted intervals as there can be."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _listing(root: str) -> Iterable[storage.Object]:
    try:
        yield from storage.list_objects(root)
    except NotFound:
        return


# --- parts and the commit ------------------------------------------------------------------------


def part_uri(out: str, shard: str, start: int, stop: int) -> str:
    return storage.join(out, PARTS, shard, f"{start:012d}-{stop:012d}.parquet")


def write_part(out: str, shard: str, start: int, stop: int, scores: pa.Table) -> None:
    """Keep the scores of rows ``[start, stop)``; written again, it is the same file."""
    storage.write_bytes(part_uri(out, shard, start, stop), _to_bytes(scores))


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """The metadata of one score file: what came in, what went out, and by whom."""

    shard: str
    rows: int
    scored: int
    set_aside: int
    reasons: Mapping[str, int]
    labels: Mapping[str, int]
    problem: str | None
    input_size: int
    input_etag: str
    fingerprint: str
    run_id: str


def commit(out: str, run: Run, target: Target, total: int, problem: str | None) -> ShardRecord:
    """Merge a shard's parts into its score file, one atomic put, then drop the parts.

    Called again for a shard whose committer died after the put, it drops what is left of them.
    Raises AssertionError when the parts do not cover rows ``[0, total)``: the caller's bug.
    """
    path = target.shard.path
    uri, intervals = scores_uri(out, path), covered_shard(out, path)
    if gaps(intervals, 0, total) and storage.exists(uri):
        record = read_record(uri)
    else:
        merged = _merge(out, path, intervals, total, run.schema())
        record = put_scores(out, run, target, merged, problem)
    drop_parts(out, path)
    return record


def put_scores(
    out: str, run: Run, target: Target, scores: pa.Table, problem: str | None
) -> ShardRecord:
    """Write a shard's score file and its record, counted from ``scores``, in one atomic put."""
    record = _record(run, target, scores, problem)
    metadata = {METADATA_KEY: json.dumps(asdict(record), ensure_ascii=False).encode()}
    data = _to_bytes(scores.replace_schema_metadata(metadata))
    storage.write_bytes(scores_uri(out, target.shard.path), data)
    return record


def covered_shard(out: str, shard: str) -> list[Interval]:
    """Row intervals of one shard's parts, in order."""
    listed = _listing(storage.join(out, PARTS, shard))
    names = [item.path.removesuffix(".parquet").partition("-") for item in listed]
    return sorted((int(start), int(stop)) for start, _, stop in names)


def drop_parts(out: str, shard: str) -> None:
    storage.delete_all(storage.join(out, PARTS, shard))


def _merge(
    out: str, shard: str, intervals: Sequence[Interval], total: int, schema: pa.Schema
) -> pa.Table:
    """Rows [0, total) in order, each once: where parts overlap, the earlier one's row counts."""
    tables, position = [], 0
    for start, stop in intervals:
        if stop <= position or start >= total:
            continue
        if start > position:
            break
        part = read_scores(part_uri(out, shard, start, stop))
        tables.append(part.slice(position - start, min(stop, total) - position))
        position = min(stop, total)
    if position != total:
        raise AssertionError(f"{shard}: parts cover rows up to {position}, not {total}")
    merged = pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()
    if merged.column(rows.ROW).to_pylist() != list(range(total)):
        raise AssertionError(f"{shard}: parts do not hold the rows their names say")
    return merged


def _record(run: Run, target: Target, scores: pa.Table, problem: str | None) -> ShardRecord:
    errors = scores.column(rows.ERROR).drop_null().to_pylist()
    labels = pc.value_counts(scores.column(rows.LABEL).drop_null()).to_pylist()
    return ShardRecord(
        shard=target.shard.path,
        rows=scores.num_rows,
        scored=scores.num_rows - len(errors),
        set_aside=len(errors),
        reasons=dict(Counter(rows.reason(error) for error in errors).most_common()),
        labels={item["values"]: item["counts"] for item in labels},
        problem=problem,
        input_size=target.shard.size,
        input_etag=target.shard.etag,
        fingerprint=run.fingerprint,
        run_id=run.run_id,
    )


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    others = [name for name in table.column_names if name != rows.ROW]
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=others,
        column_encoding={rows.ROW: "DELTA_BINARY_PACKED"},  # a few bytes, as verify reads them
    )
    return bytes(sink.getvalue())


# --- reading back --------------------------------------------------------------------------------


def read_scores(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A score file or part. Raises StorageError when it is no whole Parquet file."""
    with storage.open_read(uri) as stream:
        try:
            return pq.ParquetFile(stream).read(columns=columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise StorageError(f"{uri}: not a whole Parquet file: {error}") from None


def counted(uri: str) -> tuple[int, int]:
    """How many rows a score file or part holds, and how many of them were set aside."""
    errors = read_scores(uri, [rows.ERROR]).column(rows.ERROR)
    return len(errors), len(errors) - errors.null_count


def each(do: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """``do`` of every one, in order, many at once: for what mostly waits for storage."""
    with ThreadPoolExecutor(READERS) as pool:
        for window in batched(items, WINDOW):
            yield from pool.map(do, window)


def read_record(uri: str) -> ShardRecord:
    """A score file's own record; nothing else is read."""
    with opened(uri) as file:
        return record_of(file)


@contextmanager
def opened(uri: str) -> Iterator[pq.ParquetFile]:
    """A score file, open. Raises StorageError for what turns out, while it is, not to be one."""
    with storage.open_read(uri, tail=TAIL_BYTES) as stream:
        try:
            yield pq.ParquetFile(stream)
        except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{uri}: not a whole score file: {error!r}") from None


def record_of(file: pq.ParquetFile) -> ShardRecord:
    return ShardRecord(**json.loads((file.schema_arrow.metadata or {})[METADATA_KEY]))


def committed(
    out: str, run: Run, look: Callable[[ShardRecord], T]
) -> Iterator[tuple[int, Target, T]]:
    """Every committed shard of the run in order: its place in the listing, and what ``look`` makes
    of its record, which is read from its footer; many at once."""
    done = run.targets.among(done_shards(out))
    places = np.flatnonzero(done).tolist()

    def found(target: Target) -> tuple[Target, T]:
        return target, look(read_record(scores_uri(out, target.shard.path)))

    for place, (target, seen) in zip(places, each(found, run.targets.take(done)), strict=True):
        yield place, target, seen
