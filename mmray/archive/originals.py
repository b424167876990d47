"""The bytes of pairs as their shard holds them, whether they can be used or not."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmray import storage
from mmray.archive.columns import GUESSED, Found, find_columns
from mmray.archive.members import Members
from mmray.archive.parquet import BATCH_BYTES, BATCH_ROWS, READ_BYTES, UNREADABLE
from mmray.archive.shards import Shard, uri_of
from mmray.archive.tar import IMAGE_EXTENSIONS, TEXT_EXTENSIONS, split_name
from mmray.archive.writers import image_extension
from mmray.config import Columns
from mmray.errors import ConfigError

MOST_BYTES = 1 << 30  # of one file; larger ones are left out


@dataclass(frozen=True, slots=True)
class Original:
    """One file of a pair: an image, a caption, or a tar's ``.json`` or ``.cls``, as it is stored.

    ``extension`` is one of those that readers of tars know, in lower case and without a dot; no
    other part of a member's name comes along. Parquet's images have that of their content.
    """

    row: int
    extension: str
    data: bytes


def originals(
    root: str, shard: Shard, wanted: Set[int], columns: Columns = GUESSED
) -> Iterator[Original]:
    """The files of the ``wanted`` rows in the order of the shard, one in memory at a time.

    Rows that cannot be got at (in a damaged row group, behind a tar's damage) give none. Raises
    StorageError.
    """
    if not wanted:
        return
    with storage.open_read(uri_of(root, shard), etag=shard.etag) as stream:
        read = _tar(stream, wanted) if shard.kind == "tar" else _parquet(stream, wanted, columns)
        yield from read


def _tar(stream: BinaryIO, wanted: Set[int]) -> Iterator[Original]:
    members, last = Members(stream), max(wanted)
    named = ((name, member) for member in members if (name := split_name(member.name)) is not None)
    for row, (_, group) in enumerate(groupby(named, key=lambda item: item[0][0])):
        if row > last:
            return
        for (_, extension), member in group if row in wanted else ():
            suffix = _known(extension)
            if suffix is not None and member.size <= MOST_BYTES:
                yield Original(row, suffix, members.payload())


def _known(extension: str) -> str | None:
    """``seg.jpg`` -> ``jpg``; None for a member that readers pass over."""
    last = extension.rpartition(".")[2]
    if last in IMAGE_EXTENSIONS:
        return last
    return extension if extension in TEXT_EXTENSIONS else None


def _parquet(stream: BinaryIO, wanted: Set[int], columns: Columns) -> Iterator[Original]:
    try:
        file = pq.ParquetFile(stream, buffer_size=READ_BYTES, pre_buffer=False)
        found = find_columns(file.schema_arrow, columns)
    except (*UNREADABLE, ConfigError):
        return  # all rows of the shard were set aside for it
    ordinals, first = sorted(wanted), 0
    for group in range(file.num_row_groups):
        stop = first + file.metadata.row_group(group).num_rows
        here = ordinals[bisect_left(ordinals, first) : bisect_left(ordinals, stop)]
        if here:
            yield from _group(file, found, group, first, frozenset(here))
        first = stop


def _group(
    file: pq.ParquetFile, found: Found, group: int, first: int, wanted: Set[int]
) -> Iterator[Original]:
    """The wanted rows of one row group, as far as it can be read."""
    metadata = file.metadata.row_group(group)
    average = metadata.total_byte_size // max(1, metadata.num_rows)
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, average)))
    names = [name for name in (found.image_path, found.caption) if name is not None]
    batches = file.iter_batches(
        batch_size=rows, row_groups=[group], columns=names, use_threads=False
    )
    while True:
        try:
            batch = next(batches, None)
        except UNREADABLE:
            return  # its rows were set aside for it
        if batch is None:
            return
        for index in range(batch.num_rows):
            if first + index in wanted:
                yield from _row(batch, found, index, first + index)
        first += batch.num_rows


def _row(batch: pa.RecordBatch, found: Found, index: int, row: int) -> Iterator[Original]:
    image = _value(batch, found.image, index)
    if image is not None:
        yield Original(row, image_extension("", image), image)
    caption = _value(batch, found.caption, index)
    if caption is not None:
        yield Original(row, "txt", caption)


def _value(batch: pa.RecordBatch, name: str | None, index: int) -> bytes | None:
    """One value's bytes; a text that is not UTF-8 too."""
    if name is None:
        return None
    array: Any = batch.column(batch.schema.get_field_index(name)).slice(index, 1)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_struct(array.type):
        array = pc.struct_field(array, "bytes")
    value: bytes | None = array.cast(pa.large_binary())[0].as_py()
    return value
