"""A first look at an archive, and a pass over all of it: which rows there are, with which label.

``peek`` needs no Ray and reads a few rows; ``scan`` reads every row once, pictures too, because
equal pictures must be seen to be equal.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmray import splits
from mmray.archive import rows
from mmray.archive.shards import Shard, list_shards, read_shard
from mmray.archive.want import ALL_FIELDS
from mmray.config import Columns, Data, Task
from mmray.engine.careful import Careful
from mmray.engine.ingest import ReadOptions, chunks_dataset, chunks_of, running
from mmray.engine.pieces import Piece, Plan
from mmray.errors import BadRow, ConfigError, MmrayError, RunError

PEEK_SHARDS, PEEK_ROWS = 8, 64

#: What a pass gives for each chunk: packed Arrow IPC, as the chunks themselves.
SCAN_SCHEMA = pa.schema(
    [
        (rows.SHARD, pa.string()),
        ("total", pa.int64()),
        ("problem", pa.string()),
        ("failure", pa.string()),
        ("payload", pa.large_binary()),
    ]
)
SCANNED_SCHEMA = splits.IDENTITY_SCHEMA.append(pa.field(rows.CAPTION, pa.large_string()))


@dataclass(frozen=True, slots=True)
class Scan:
    """Every row of an archive: ``rows`` of ``SCANNED_SCHEMA``, in order of (shard, row), and what
    is wrong with whole shards."""

    rows: pa.Table
    problems: dict[str, str]


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """Scanned rows, and which of them train and which are held out."""

    rows: pa.Table  # SCANNED_SCHEMA, in order of (shard, row)
    split: splits.Split

    @property
    def labels(self) -> tuple[str, ...]:
        return self.split.labels.names

    def side(self, name: str) -> npt.NDArray[np.bool_]:
        """bool [rows]: those of side "train" or "dev"."""
        mine: npt.NDArray[np.bool_] = pc.fill_null(
            pc.equal(self.split.sides, name), False
        ).to_numpy(zero_copy_only=False)
        return mine

    def captions(self) -> list[str]:
        """Those to train a tokenizer on."""
        training = self.rows[rows.CAPTION].filter(pa.array(self.side(splits.TRAIN)))
        captions: list[str] = training.drop_null().to_pylist()
        return captions


def archive_shards(root: str) -> list[Shard]:
    """The shards of an archive in key order. Raises ConfigError when there are none."""
    shards = list(list_shards(root))
    if not shards:
        raise ConfigError(f"{root}: no .tar, .tar.gz, .tgz or .parquet shards")
    return shards


def peek(root: str, shards: Sequence[Shard], columns: Columns) -> list[rows.Sample]:
    """Some rows from all over the archive, without their pictures, with every field there is."""
    step = max(1, len(shards) // PEEK_SHARDS)
    found: list[rows.Sample] = []
    for shard in itertools.islice(shards, 0, None, step):
        stream = read_shard(
            root, shard, columns=columns, fields=ALL_FIELDS, images=False, stop=PEEK_ROWS
        )
        found += [item for item in stream if isinstance(item, rows.Sample)]
    return found


def field_names(samples: Sequence[rows.Sample]) -> list[str]:
    """The names of all fields of some samples, sorted."""
    return sorted({name for sample in samples for name in sample.fields})


def check_field(samples: Sequence[rows.Sample], name: str, key: str) -> None:
    """Raise ConfigError when no sample has the field ``name``; ``key`` is what named it."""
    names = field_names(samples)
    if name not in names and any(sample.error is None for sample in samples):
        there = ", ".join(names) or "none"
        raise ConfigError(f"{key}: got {name!r}; the archive has no such field, only: {there}")


def scan(
    root: str,
    shards: Sequence[Shard],
    *,
    data: Data,
    task: Task,
    captions: bool,
    readers: int,
) -> Scan:
    """What a split needs to know of every row and, with ``captions``, its text.

    Raises MmrayError when storage refuses, RunError when rows were lost.
    """
    fields = splits.identity_fields(data, task)
    dataset = chunks_dataset(
        root,
        Plan(Piece(shard) for shard in shards),
        ReadOptions(columns=data.columns, fields=fields),
        readers=readers,
        cpus=1,
    ).map_batches(
        functools.partial(
            _identify,
            data=data,
            task=task,
            captions=captions,
            hashes=Hashes(),
            careful=Careful(),
        ),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
    )
    tables = [SCANNED_SCHEMA.empty_table()]
    problems: dict[str, str] = {}
    totals: dict[str, int] = {}
    for record in records(dataset):
        if record["total"] is not None:
            totals[record[rows.SHARD]] = record["total"]
        if record["problem"] is not None:
            problems[record[rows.SHARD]] = record["problem"]
        if record["payload"] is not None:
            tables.append(unpack_table(record["payload"]))
    together = pa.concat_tables(tables)
    check_complete(together, totals, shards)
    order = [(rows.SHARD, "ascending"), (rows.ROW, "ascending")]
    return Scan(together.sort_by(order).combine_chunks(), problems)


def check_complete(found: pa.Table, totals: Mapping[str, int], shards: Sequence[Shard]) -> None:
    """Raise RunError unless every shard's end was seen and ``found`` has each of its rows once."""
    counts = dict.fromkeys(totals, 0)
    for item in pc.value_counts(found[rows.SHARD]).to_pylist():
        counts[item["values"]] = item["counts"]
    for shard in shards:
        expected, got = totals.get(shard.path), counts.get(shard.path, 0)
        if expected != got:
            raise RunError(
                f"{shard.path}: {got} rows came through of {expected}; run the same command again"
            )


def records(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a dataset of ours; raises MmrayError for one that says so."""
    with running(dataset) as batches:
        for batch in batches:
            for record in batch.to_pylist():
                if record["failure"] is not None:
                    raise MmrayError(record["failure"])
                yield record


@dataclass(frozen=True, slots=True)
class Hashes:
    """Gives a sample's perceptual hash."""

    def prepare(self, sample: rows.Sample) -> bytes | None:
        return splits.picture_hash(sample)


def _identify(
    batch: pa.Table,
    *,
    data: Data,
    task: Task,
    captions: bool,
    hashes: Hashes,
    careful: Careful,
) -> pa.Table:
    """Chunks -> ``SCAN_SCHEMA``, a row a row."""

    def identified(samples: list[rows.Sample]) -> pa.Buffer:
        # A picture that crashes its decoder has no hash, like any broken one.
        made = careful.outcomes(hashes, samples) if data.near else [None] * len(samples)
        pictures = [None if isinstance(one, BadRow) else one for one in made]
        found = splits.identify(samples, data, task, pictures)
        column = SCANNED_SCHEMA.field(rows.CAPTION)
        texts = pa.array([sample.caption if captions else None for sample in samples], column.type)
        return pack_table(found.append_column(column, texts))

    return map_chunks(batch, lambda _, samples: {"payload": identified(samples)}, SCAN_SCHEMA)


def map_chunks(
    batch: pa.Table,
    work: Callable[[str, list[rows.Sample]], dict[str, Any]],
    schema: pa.Schema,
) -> pa.Table:
    """Each chunk of ``batch`` as a row of ``schema``: what ``work(shard, samples)`` makes of it.

    What the chunk's record has of ``schema`` is kept. An error of ours becomes a
    ``failure``, for the driver to raise: as an exception it would arrive as one of Ray's.
    """
    made = []
    for record, samples in chunks_of(batch):
        values: dict[str, Any] = dict.fromkeys(schema.names)
        values |= {name: record[name] for name in schema.names if name in record}
        if samples is not None:
            try:
                values |= work(values["shard"], samples)
            except MmrayError as error:
                values["failure"] = str(error)
        made.append(one_row(values, schema))
    return pa.concat_tables(made) if made else schema.empty_table()


def by_shard(found: pa.Table, marks: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """``marks`` [rows of found], cut up by shard; ``found`` is in order of (shard, row)."""
    column = found[rows.SHARD].to_numpy()
    starts = np.flatnonzero(column[1:] != column[:-1]) + 1
    firsts = [0, *starts.tolist()] if len(column) else []
    parts = np.split(marks, starts)
    return {column[first]: part for first, part in zip(firsts, parts, strict=True)}


# --- tables as one value -------------------------------------------------------------------------


def pack_table(table: pa.Table) -> pa.Buffer:
    """``table`` as Arrow IPC bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def unpack_table(payload: bytes | pa.Buffer) -> pa.Table:
    """What ``pack_table`` packed; of a Buffer, without a copy."""
    return pa.ipc.open_stream(payload).read_all()


def one_row(values: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """A table of one row; a Buffer becomes a large_binary value without a copy."""
    columns = []
    for field in schema:
        value = values[field.name]
        if isinstance(value, pa.Buffer):
            ends = pa.array([0, value.size], pa.int64()).buffers()[1]
            columns.append(pa.LargeBinaryArray.from_buffers(field.type, 1, [None, ends, value]))
        else:
            columns.append(pa.array([value], field.type))
    return pa.Table.from_arrays(columns, schema=schema)
