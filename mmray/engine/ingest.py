"""Archive pieces -> a ``ray.data.Dataset`` of chunks.

One row of the dataset is one whole chunk of samples. Ray may cut and join blocks as it likes; it
can not cut inside a chunk, so a chunk is scored as the same batch in every run. Few long read tasks
each walk a strip of pieces: a task a shard costs 15 ms of the driver, which a million shards cannot
afford. A strip always yields the same chunks in the same order, as Ray assumes when it runs a read
task again.
"""

from __future__ import annotations

import functools
import gc
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from mmray.archive import rows
from mmray.archive.shards import read_shard
from mmray.backoff import COUNTS
from mmray.config import Columns
from mmray.engine import pace, readahead
from mmray.engine.pieces import Piece, Plan, Strip
from mmray.errors import Conflict, StorageError
from mmray.memory import keep_freed_memory, settle

CHUNK_ROWS = 256
CHUNK_BYTES = 64 << 20  # a chunk of large images is closed early
FORGET_AFTER = 100  # blocks
READ_CPUS = 0.1  # reading waits for bytes; ten readers share a core

RETRIES = pa.map_(pa.string(), pa.int64())  # cause -> S3 requests asked again, see ``counted``

#: One chunk (``samples`` set, of ``bytes`` in memory; it begins at ``byte`` of its tar, 0 where it
#: cannot be entered there), the end of a shard (``total`` set) or a failed read (``failure``).
CHUNKS_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("index", pa.int64()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("byte", pa.int64()),
        ("samples", pa.large_list(pa.struct(list(rows.CHUNK_SCHEMA)))),
        ("total", pa.int64()),
        ("problem", pa.string()),
        ("failure", pa.string()),
        ("bytes", pa.int64()),
        ("read_s", pa.float64()),
        ("retries", RETRIES),
    ]
)


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How pieces are read: same for every piece of a dataset."""

    columns: Columns = Columns()
    fields: tuple[str, ...] = ()
    images: bool = True
    chunk_rows: int = CHUNK_ROWS
    chunk_bytes: int = CHUNK_BYTES
    scattered: bool = False  # chunks go on over rows that are left out
    max_image_bytes: int = rows.MAX_IMAGE_BYTES


def chunks_dataset(
    root: str,
    plan: Plan,
    options: ReadOptions = ReadOptions(),
    *,
    readers: int = 2,
    cpus: float = READ_CPUS,
) -> ray.data.Dataset:
    """A dataset of ``CHUNKS_SCHEMA`` over the ``plan``ned pieces of the archive at ``root``.

    ``readers`` is about how many read tasks will run at once; it sets how finely the plan is cut
    into strips. ``cpus`` is what each of them takes: as much as a ``map_batches`` over whole blocks
    that follows takes, and Ray runs both in one task. A storage failure travels as a row
    (``failure``), for the consumer to raise.
    """
    strips = plan.strips(readers)
    dataset: ray.data.Dataset = ray.data.read_datasource(
        _Pieces(root, strips, options),
        override_num_blocks=len(strips),
        num_cpus=cpus,
        concurrency=min(readers, len(strips)),
    )
    dataset.context.target_max_block_size = 1  # every chunk leaves as soon as it is read
    readahead.bound(dataset, readers)
    return dataset


@contextmanager
def running(dataset: ray.data.Dataset) -> Iterator[Iterator[pa.Table]]:
    """The dataset's blocks as they come; leaving ends its tasks and actors, however far it came."""
    blocks = _forgetting(
        dataset,
        dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0),
    )
    try:
        yield blocks
    finally:
        blocks.close()  # while Ray is there; an error's traceback would keep it beyond that
        if dataset._current_executor is not None:
            dataset._current_executor.shutdown(force=True)
        gc.collect()  # a pool's actors hold their CPUs until the last handle is gone


def _forgetting(
    dataset: ray.data.Dataset, batches: Iterable[pa.Table]
) -> Generator[pa.Table, None, None]:
    """``batches``. Ray Data keeps figures of every block for a report of its own, a kilobyte each:
    over a long run's millions they are dropped."""
    for number, batch in enumerate(batches, 1):
        yield batch
        executor = dataset._current_executor
        if number % FORGET_AFTER == 0 and executor is not None:
            for operator in getattr(executor, "_topology", None) or ():
                getattr(operator, "_output_blocks_stats", []).clear()


def chunks_of(batch: pa.Table) -> Iterator[tuple[dict[str, Any], list[rows.Sample] | None]]:
    """Every row of a batch of the dataset: its other values, and its samples, None for what is no
    chunk."""
    column = batch.column("samples")
    for record, chunk in zip(batch.drop_columns(["samples"]).to_pylist(), column, strict=True):
        samples = None
        if chunk.is_valid:
            samples = rows.from_table(pa.Table.from_struct_array(chunk.values))
        yield record, samples


def samples_of(batch: pa.Table) -> Iterator[list[rows.Sample]]:
    """The chunks of a batch of the dataset; raises StorageError for a failed read."""
    for record, samples in chunks_of(batch):
        if record["failure"] is not None:
            raise StorageError(record["failure"])
        if samples is not None:
            yield samples


class _Pieces(Datasource):
    """Read tasks over strips of pieces, one task a strip."""

    def __init__(self, root: str, strips: Sequence[Strip], options: ReadOptions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._root, self._strips, self._options = root, strips, options

    def get_name(self) -> str:
        return "Pieces"

    def estimate_inmemory_data_size(self) -> int:
        return sum(strip.bytes for strip in self._strips)

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: ray.data.DataContext | None = None,
    ) -> list[ReadTask]:
        return [
            ReadTask(
                functools.partial(_read_strip, self._root, strip, self._options),
                BlockMetadata(None, strip.bytes, None, None),
                schema=CHUNKS_SCHEMA,
            )
            for strip in self._strips
        ]


def _read_strip(root: str, strip: Strip, options: ReadOptions) -> Iterator[pa.Table]:
    keep_freed_memory()
    settle()
    pace.share()
    for piece in strip:
        try:
            yield from _read_piece(root, piece, options)
        except Conflict as error:
            advice = (
                "put the listed version back, or take another output for the archive as it is now"
            )
            yield _row(piece, failure=f"{error}; {advice}")
        except StorageError as error:
            yield _row(piece, failure=str(error))


def _read_piece(root: str, piece: Piece, options: ReadOptions) -> Iterator[pa.Table]:
    stream = read_shard(
        root,
        piece.shard,
        columns=options.columns,
        fields=options.fields,
        images=options.images,
        start=piece.start,
        stop=piece.stop,
        skip=piece.skips if piece.covered else None,
        byte=piece.byte,
        max_image_bytes=options.max_image_bytes,
    )
    began = time.perf_counter()
    chunk_rows = piece.chunk_rows or options.chunk_rows
    for chunk in rows.chunks(stream, chunk_rows, options.chunk_bytes, scattered=options.scattered):
        if isinstance(chunk, rows.ShardEnd):
            if piece.whole:
                yield _row(piece, chunk.rows, total=chunk.rows, problem=chunk.problem)
            return
        table = rows.to_table(chunk)
        seconds = time.perf_counter() - began
        first, last = chunk[0].row, chunk[-1].row
        yield _row(piece, first, last + 1, chunk[0].byte, samples=table, read_s=seconds)
        began = time.perf_counter()


def _row(
    piece: Piece,
    start: int = 0,
    stop: int | None = None,
    byte: int = 0,
    *,
    samples: pa.Table | None = None,
    total: int | None = None,
    problem: str | None = None,
    failure: str | None = None,
    read_s: float = 0.0,
) -> pa.Table:
    begins, ends = start, start if stop is None else stop
    size = 0 if samples is None else samples.nbytes
    where = [piece.shard.path, piece.index, begins, ends, byte]
    values = [*where, None, total, problem, failure, size, read_s, counted()]
    arrays = [pa.array([v], type=f.type) for v, f in zip(values, CHUNKS_SCHEMA, strict=True)]
    if samples is not None:
        at = CHUNKS_SCHEMA.get_field_index("samples")
        arrays[at] = one_list(*samples.to_struct_array().chunks)
    return pa.Table.from_arrays(arrays, schema=CHUNKS_SCHEMA)


def counted(before: Iterable[tuple[str, int]] | None = None) -> list[tuple[str, int]]:
    """This process's retries since they were last counted, added to what a row carries of them."""
    counts = Counter(dict(before or ()))
    counts.update(COUNTS.take())
    return list(counts.items())


def one_list(values: pa.Array) -> pa.Array:
    """All ``values`` as one value of a column."""
    return pa.LargeListArray.from_arrays([0, len(values)], values)
