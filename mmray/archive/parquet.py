"""Parquet shards: one row is one sample; read a row group at a time, a few rows at once."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmray.archive.columns import Found, find_columns, is_text, none_found
from mmray.archive.rows import Sample, ShardEnd
from mmray.archive.want import Want, not_utf8, too_large
from mmray.config import Columns
from mmray.errors import ConfigError

BATCH_ROWS = 64
BATCH_BYTES = 32 << 20  # of images, by the row group's average
READ_BYTES = 4 << 20  # of one column at once, instead of its whole chunk
MAX_ROWS_A_BYTE = 64  # a footer that claims more is damaged

#: What pyarrow raises for bytes that are no (or damaged) Parquet. MemoryError: a damaged size.
UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)


def read_parquet(
    stream: BinaryIO, shard: str, columns: Columns, want: Want
) -> Iterator[Sample | ShardEnd]:
    """The wanted rows of a Parquet file in order, then one ShardEnd.

    A row group that cannot be read gives its rows with that error. A file whose columns do not
    fit ``columns`` gives all its rows with that error; one with neither an image nor a caption
    column is no archive of pairs and gives none. Errors of ``stream`` itself must not be OSError
    (those of mmray.storage are not) to come through.
    """
    try:
        file = pq.ParquetFile(stream, buffer_size=READ_BYTES, pre_buffer=False)
        schema, counts = file.schema_arrow, _row_counts(file, stream.seek(0, 2))
    except UNREADABLE as error:
        yield ShardEnd(shard, 0, f"not Parquet, or its footer is damaged: {_line(error)}")
        return
    try:
        found = find_columns(schema, columns)
    except ConfigError as error:
        problem = f"columns unclear: {error}"
        total = sum(counts) if want.stop is None else min(sum(counts), want.stop)
        yield from (_bad(shard, row, problem) for row in range(total) if want.row(row))
        yield ShardEnd(shard, total, problem)
        return
    if found.nothing:
        yield ShardEnd(shard, 0, none_found(schema, "image and no caption"))
        return
    yield from _Reader(file, shard, found, want, stream.seek(0, 2)).read(counts)


def _row_counts(file: pq.ParquetFile, size: int) -> list[int]:
    counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    total = file.metadata.num_rows
    if min(counts, default=0) < 0 or sum(counts) != total or total > MAX_ROWS_A_BYTE * size:
        raise ValueError(f"{total:,} rows in row groups of {counts[:8]}, file of {size:,} bytes")
    return counts


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some consecutive rows, decoded; ``images`` stay in Arrow until they are asked for."""

    first: int
    images: Any  # an Arrow binary array, or None where it was not read
    sizes: Sequence[int | None]  # of the encoded images; None: no image
    captions: Sequence[str | UnicodeDecodeError | None]
    keys: Sequence[str]
    fields: Sequence[dict[str, Any]]


class _Reader:
    """Reads one file, row group by row group."""

    def __init__(
        self, file: pq.ParquetFile, shard: str, found: Found, want: Want, size: int
    ) -> None:
        self._file = file
        self._shard = shard
        self._found = found
        self._want = want
        self._size = size  # of the file, in bytes
        self._problems: list[str] = []
        there = found.others if found.caption is None else (*found.others, found.caption)
        self._names = [n for n in (found.others if want.all_fields else want.fields) if n in there]

    def read(self, counts: Sequence[int]) -> Iterator[Sample | ShardEnd]:
        rows = 0
        for group, count in enumerate(counts):
            if self._want.past(rows):
                break
            given = yield from self._read_group(group, rows, count)
            rows += given
            if given < count:
                break
        if self._want.stop is not None:
            rows = min(rows, self._want.stop)
        yield ShardEnd(self._shard, rows, "; ".join(self._problems) or None)

    def _read_group(self, group: int, first: int, count: int) -> Generator[Sample, None, int]:
        """The wanted rows of one group. Returns how many rows there are: ``count``, or fewer
        when the footer cannot be believed."""
        wanted = [self._want.row(row) for row in range(first, first + count)]
        if not any(wanted):
            return count
        done = 0
        try:
            for batch in self._batches(group, first):
                if done + len(batch.keys) > count:
                    raise ValueError(f"more than the {count} rows its footer says")
                for index in range(len(batch.keys)):
                    if wanted[done]:
                        yield self._sample(batch, index)
                    done += 1
            if done < count:
                raise ValueError(f"{done} rows, its footer says {count}")
        except UNREADABLE as error:
            where = f"row group {group}, rows {first + done} to {first + count - 1}: {_line(error)}"
            self._problems.append(f"row group unreadable: {where}")
            if count - done > self._size:
                return done
            for index in range(done, count):
                if wanted[index]:
                    yield _bad(self._shard, first + index, f"row group unreadable: {where}")
        return count

    def _batches(self, group: int, first: int) -> Iterator[_Batch]:
        metadata = self._file.metadata.row_group(group)
        chunk = self._image_chunk(metadata)
        known = None if self._want.images or chunk is None else _presence(chunk, metadata.num_rows)
        read_image = self._found.image_path is not None and known is None
        rows = BATCH_ROWS
        if read_image and chunk is not None and metadata.num_rows:
            average = chunk.total_uncompressed_size // metadata.num_rows
            rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, average)))
        asked = [self._found.image_path if read_image else None, self._found.caption]
        names = dict.fromkeys(n for n in (*asked, self._found.key, *self._names) if n is not None)
        for batch in self._file.iter_batches(
            batch_size=rows, row_groups=[group], columns=list(names), use_threads=False
        ):
            yield self._decode(batch, first, read_image, known)
            first += batch.num_rows

    def _image_chunk(self, metadata: Any) -> Any:
        """The footer's record of the image column in one row group."""
        chunks = (metadata.column(index) for index in range(metadata.num_columns))
        return next((c for c in chunks if c.path_in_schema == self._found.image_path), None)

    def _decode(
        self, batch: pa.RecordBatch, first: int, read_image: bool, known: int | None
    ) -> _Batch:
        count = batch.num_rows
        images, sizes = None, [known] * count
        if read_image:
            images = batch.column(batch.schema.get_field_index(self._found.image))
            if pa.types.is_struct(images.type):
                images = pc.struct_field(images, "bytes")
            sizes = pc.binary_length(images).to_pylist()

        def column(name: str) -> Any:
            return batch.column(batch.schema.get_field_index(name))

        captions = _texts(column(self._found.caption)) if self._found.caption else [None] * count
        keys = _values(column(self._found.key)) if self._found.key else [None] * count
        values = {name: _values(column(name)) for name in self._names}
        return _Batch(
            first,
            images,
            sizes,
            captions,
            [str(first + i) if key is None else str(key) for i, key in enumerate(keys)],
            [{name: values[name][i] for name in self._names} for i in range(count)],
        )

    def _sample(self, batch: _Batch, index: int) -> Sample:
        error, image, size = None, None, batch.sizes[index]
        caption = batch.captions[index]
        if size is not None and size > self._want.max_image_bytes:
            error = too_large(size, self._want.max_image_bytes)
        elif isinstance(caption, UnicodeDecodeError):
            error = not_utf8(caption)
        elif size is not None:
            image = batch.images[index].as_py() if self._want.images else b""
        return Sample(
            shard=self._shard,
            row=batch.first + index,
            key=batch.keys[index],
            image=image,
            caption=None if isinstance(caption, UnicodeDecodeError) else caption,
            fields=self._want.pick(batch.fields[index]),
            error=error,
            error_stage=None if error is None else "read",
        )


def _presence(chunk: Any, rows: int) -> int | None:
    """Size 0 for "all rows have an image", told by the footer; None when it does not say."""
    statistics = chunk.statistics
    if statistics is not None and statistics.has_null_count and statistics.null_count == 0:
        return 0
    return None


def _texts(array: Any) -> list[str | UnicodeDecodeError | None]:
    """Each value decoded by itself, so that one that is not UTF-8 spoils no other."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return [None if data is None else _text(data) for data in _bytes(array).to_pylist()]


def _bytes(array: Any) -> Any:
    return array.cast(pa.large_binary()) if not pa.types.is_large_binary(array.type) else array


def _text(data: bytes) -> str | UnicodeDecodeError:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error


def _values(array: Any) -> list[Any]:
    """A column as what JSON can hold; dates as ISO 8601, decimals as text, bytes as nothing."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if is_text(array.type):
        return [
            value.object.decode("utf-8", "replace") if isinstance(value, UnicodeError) else value
            for value in _texts(array)
        ]
    return [_json(value) for value in array.to_pylist()]


def _json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(name): _json(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(inner) for inner in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, datetime.timedelta)):
        return str(value)
    return None


def _bad(shard: str, row: int, error: str) -> Sample:
    return Sample(shard, row, str(row), error=error, error_stage="read")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
