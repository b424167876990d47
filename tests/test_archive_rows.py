"""A user would see other scores after a restart if a shard were cut into other chunks."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pytest

from mmray.archive import rows
from mmray.archive.rows import Sample, ShardEnd


def stream(start: int, stop: int, image: bytes = b"x") -> Iterator[Sample | ShardEnd]:
    yield from (Sample("s", row, str(row), image) for row in range(start, stop))
    yield ShardEnd("s", stop)


def cuts(start: int, stop: int, max_rows: int = 256, image: bytes = b"x") -> list[tuple[int, int]]:
    found = rows.chunks(stream(start, stop, image), max_rows, 1000)
    return [(c[0].row, c[-1].row + 1) for c in found if isinstance(c, list)]


def test_the_first_chunk_is_small_so_that_something_is_done_soon() -> None:
    assert cuts(0, 600) == [(0, 32), (32, 288), (288, 544), (544, 600)]
    assert cuts(0, 10) == [(0, 10)]
    assert cuts(0, 20, max_rows=8) == [(0, 8), (8, 16), (16, 20)]


def test_a_shard_that_is_read_again_from_anywhere_is_cut_alike() -> None:
    """A driver that is killed may leave parts of any rows; the batches after them are the same."""
    assert cuts(32, 600) == cuts(0, 600)[1:]
    assert cuts(288, 600) == cuts(0, 600)[2:]
    assert cuts(5, 600) == [(5, 32), *cuts(0, 600)[1:]]
    assert cuts(100, 600) == [(100, 288), *cuts(0, 600)[2:]]
    assert cuts(40, 60, max_rows=15) == [(40, 47), (47, 60)]
    again, first = (cuts(start, 600, image=bytes(400)) for start in (33, 0))  # three fill a chunk
    assert [cut for cut in again if cut[0] >= 288] == [cut for cut in first if cut[0] >= 288]


def test_scattered_rows_fill_chunks() -> None:
    some = [sample for sample in stream(0, 600) if isinstance(sample, ShardEnd) or sample.row % 2]
    found = rows.chunks(some, 256, 1000, scattered=True)
    assert [len(chunk) for chunk in found if isinstance(chunk, list)] == [256, 44]


def test_large_pictures_close_a_chunk_early() -> None:
    assert cuts(0, 7, image=bytes(400)) == [(0, 3), (3, 6), (6, 7)]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 33])
def test_what_goes_into_a_table_comes_out(count: int) -> None:
    images = [None if i % 3 == 1 else b"" if i % 3 == 2 else bytes([i]) * i for i in range(count)]
    samples = [
        Sample("s", i, str(i), image, None if i % 2 else "é", {"n": [i]} if i % 4 else {})
        for i, image in enumerate(images)
    ]
    table = rows.to_table(samples)
    table.validate(full=True)
    assert table.schema == rows.CHUNK_SCHEMA
    assert table[rows.IMAGE].combine_chunks() == pa.array(images, pa.large_binary())
    assert rows.from_table(table) == samples
    assert rows.from_table(table.slice(count // 2)) == samples[count // 2 :]
