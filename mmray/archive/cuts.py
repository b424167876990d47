"""Where a large shard can be cut, so that several readers share it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow.parquet as pq

from mmray import storage
from mmray.archive.members import Members
from mmray.archive.parquet import UNREADABLE
from mmray.archive.rows import FIRST_ROWS, begins_chunk
from mmray.archive.shards import Shard, uri_of
from mmray.archive.tar import split_name

HEADER_BYTES = 4096  # read at a member's header; the bytes between are passed over


@dataclass(frozen=True, slots=True)
class Cut:
    """A row where a shard can be entered: in a tar, its first header is at ``byte``."""

    row: int
    byte: int = 0


def find_cuts(root: str, shard: Shard, parts: int, chunk_rows: int) -> list[Cut]:
    """At most ``parts - 1`` cuts, about evenly far apart in bytes, in order.

    Only where a chunk of ``chunk_rows`` begins anyway, so that cutting changes no batch. A tar's
    are found by walking its headers, a Parquet file's in its footer. There are none in a tar on S3,
    where asking for a header takes longer than reading what lies before it, in a packed or damaged
    shard, or where a key comes back. Raises StorageError.
    """
    if parts < 2 or (shard.kind == "tar" and storage.is_s3(root)):
        return []
    buffer = HEADER_BYTES if shard.kind == "tar" else storage.BUFFER_BYTES
    with storage.open_read(uri_of(root, shard), shard.etag, buffer) as stream:
        starts = _samples(stream) if shard.kind == "tar" else _groups(stream, chunk_rows)
        found: list[Cut] = []
        try:
            for row, byte in starts:
                enough = byte * parts >= shard.size * (len(found) + 1)
                if enough and begins_chunk(row, chunk_rows) and row >= FIRST_ROWS:
                    found.append(Cut(row, byte))
        except _WholeError:
            return []
    if shard.kind == "parquet":  # a row is found by its number there
        found = [Cut(cut.row) for cut in found]
    return found[: parts - 1]


class _WholeError(Exception):
    """The shard cannot be entered in its middle."""


def _samples(stream: BinaryIO) -> Iterator[tuple[int, int]]:
    """Row and byte of every sample's first header."""
    members, ended, current, row = Members(stream), set[str](), None, -1
    for member in members:
        name = split_name(member.name)
        if name is None or name[0] == current:
            continue
        current, row = name[0], row + 1
        if current in ended:
            raise _WholeError
        ended.add(current)
        yield row, member.begin
    if members.problem or not members.enterable:
        raise _WholeError


def _groups(stream: BinaryIO, chunk_rows: int) -> Iterator[tuple[int, int]]:
    """The first row of each row group at which a chunk begins, and the bytes before the group."""
    try:
        metadata = pq.ParquetFile(stream).metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        sizes = [
            sum(g.column(c).total_compressed_size for c in range(g.num_columns)) for g in groups
        ]
        counts = [group.num_rows for group in groups]
    except UNREADABLE:
        raise _WholeError from None
    first = FIRST_ROWS % chunk_rows
    row = byte = 0
    for count, size in zip(counts, sizes, strict=True):
        chunk = row + (first - row) % chunk_rows
        if chunk < row + count:
            yield chunk, byte
        row, byte = row + count, byte + size
