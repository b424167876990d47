"""THE ROW: names, dtypes and shapes of a pair, of a chunk of pairs, and of a score.

Written down here and nowhere else. Identity of a pair is (shard, row): ``shard`` is the shard's
path relative to the archive root, ``row`` the 0-based ordinal of the sample inside the shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SHARD, ROW, KEY = "shard", "row", "key"
IMAGE, CAPTION, FIELDS = "image", "caption", "fields"
LABEL, SCORE, EMBEDDING = "label", "score", "embedding"
ERROR, ERROR_STAGE = "error", "error_stage"
PROBABILITY = "p_"

#: Where a row can fail: while its shard is read, its image or caption prepared, or it is scored.
STAGES = ("read", "image", "caption", "predict")

#: Reasons of rows that end, hold or fill the process that works on them: none prepares such a row
#: again but a scoring run, which has others to spare.
CRASHED, TOO_LONG = "decode crashed", "decode took too long"
TOO_MUCH_MEMORY, WORKER_DIED = "decode took too much memory", "worker died"
HARMFUL = frozenset({CRASHED, TOO_LONG, TOO_MUCH_MEMORY, WORKER_DIED})

#: Default cap on the encoded bytes of one image; larger ones are set aside unread.
MAX_IMAGE_BYTES = 64 * 1024 * 1024

FIRST_ROWS = 32  # of a shard's first chunk, at most


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair as its archive holds it.

    ``image`` and ``caption`` are None when the archive has none. ``fields`` are the further
    columns that were asked for (JSON scalars, or lists of them). ``error`` is None, or why the pair
    cannot be used, as ``reason`` or ``reason: detail``; ``error_stage`` is then one of ``STAGES``.
    ``byte`` is where it begins in its tar, 0 where a reader cannot begin there; it is in no table.
    """

    shard: str
    row: int
    key: str
    image: bytes | None = None
    caption: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    error_stage: str | None = None
    byte: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class ShardEnd:
    """Closes every shard's stream of samples: how many there were, and what is wrong with it."""

    shard: str
    rows: int
    problem: str | None = None


def reason(error: str) -> str:
    """The stable part of an ``error`` text, by which reports count."""
    return error.split(":", 1)[0]


CHUNK_SCHEMA = pa.schema(
    [
        (SHARD, pa.string()),
        (ROW, pa.int64()),
        (KEY, pa.string()),
        (IMAGE, pa.large_binary()),
        (CAPTION, pa.large_string()),
        (FIELDS, pa.string()),
        (ERROR, pa.string()),
        (ERROR_STAGE, pa.string()),
    ]
)


def to_table(samples: Sequence[Sample]) -> pa.Table:
    """Samples as an Arrow table of ``CHUNK_SCHEMA``; ``fields`` as JSON text."""
    columns: list[list[Any]] = [
        [s.shard for s in samples],
        [s.row for s in samples],
        [s.key for s in samples],
        [s.image for s in samples],
        [s.caption for s in samples],
        [json.dumps(dict(s.fields), ensure_ascii=False) if s.fields else None for s in samples],
        [s.error for s in samples],
        [s.error_stage for s in samples],
    ]
    arrays = [
        _one_buffer(column) if field.name == IMAGE else pa.array(column, type=field.type)
        for column, field in zip(columns, CHUNK_SCHEMA, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=CHUNK_SCHEMA)


def _one_buffer(values: Sequence[bytes | None]) -> pa.Array:
    """``pa.array(values, pa.large_binary())``, which takes four times as long for pictures, as it
    moves what it has to ever larger memory."""
    there = np.array([value is not None for value in values], bool)
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(value or b"") for value in values], out=offsets[1:])
    buffers = [
        None if there.all() else pa.py_buffer(np.packbits(there, bitorder="little")),
        pa.py_buffer(offsets),
        pa.py_buffer(b"".join(value or b"" for value in values)),
    ]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(values), buffers)


def from_table(table: pa.Table) -> list[Sample]:
    """The samples of a table made by ``to_table``."""
    columns = [table.column(name).to_pylist() for name in CHUNK_SCHEMA.names]
    return [
        Sample(shard, row, key, image, caption, json.loads(extra) if extra else {}, error, stage)
        for shard, row, key, image, caption, extra, error, stage in zip(*columns, strict=True)
    ]


def chunks(
    stream: Iterable[Sample | ShardEnd], max_rows: int, max_bytes: int, *, scattered: bool = False
) -> Iterator[list[Sample] | ShardEnd]:
    """Group a shard's samples into chunks: consecutive rows, at most ``max_rows`` of them, closed
    early once they hold ``max_bytes`` of image data or the next row does not follow. Chunks of
    ``scattered`` rows go on where others are left out.

    The first chunk of a shard has at most ``FIRST_ROWS``, so that something is done soon. From
    there on all that are not scattered end every ``max_rows``, wherever reading began: a shard of
    which some rows are done already is cut alike elsewhere.
    """
    held: list[Sample] = []
    size = 0

    def joins(row: int) -> bool:
        return row == held[-1].row + 1 and not begins_chunk(row, max_rows)

    for item in stream:
        full = len(held) >= max_rows or size >= max_bytes
        if held and (full or isinstance(item, ShardEnd) or not (scattered or joins(item.row))):
            yield held
            held, size = [], 0
        if isinstance(item, ShardEnd):
            yield item
        else:
            held.append(item)
            size += len(item.image or b"")
    if held:
        raise AssertionError("a shard's stream must be closed by a ShardEnd")


def begins_chunk(row: int, max_rows: int) -> bool:
    """Whether chunks end before this row in every reading of its shard."""
    return row % max_rows == FIRST_ROWS % max_rows


def probability_columns(labels: Sequence[str]) -> list[str]:
    """Names of the probability columns, in the order of ``labels``."""
    return [PROBABILITY + label for label in labels]


def probabilities(scores: pa.Table, labels: Sequence[str]) -> npt.NDArray[np.float32]:
    """Those of a table of scores, float32 [rows, labels]; NaN for rows that have none."""
    return np.stack([scores[name].to_numpy() for name in probability_columns(labels)], axis=1)


def scores_schema(labels: Sequence[str], embedding_dim: int | None = None) -> pa.Schema:
    """Schema of a score file for a classifier over ``labels``.

    ``label`` is the most probable label, or, where a row may have several, all that are probable
    joined by a separator, "" for none; ``p_<label>`` float32 probabilities in [0, 1]; all null
    where ``error`` is set. With ``embedding_dim``, ``embedding`` is float16 of that length.
    """
    columns: list[tuple[str, pa.DataType]] = [
        (SHARD, pa.string()),
        (ROW, pa.int64()),
        (KEY, pa.string()),
        (LABEL, pa.string()),
    ]
    columns += [(name, pa.float32()) for name in probability_columns(labels)]
    columns += [(ERROR, pa.string()), (ERROR_STAGE, pa.string())]
    if embedding_dim is not None:
        columns.append((EMBEDDING, pa.list_(pa.float16(), embedding_dim)))
    return pa.schema(columns)
