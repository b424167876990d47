"""A shard that several readers share must give the rows, and the chunks, that one reader gives."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import archives
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.archive import rows
from mmray.archive.cuts import find_cuts
from mmray.archive.shards import Shard, list_shards, read_shard
from mmray.engine.pieces import Piece, Plan

CHUNK = 8


def only(root: Path) -> Shard:
    (shard,) = list_shards(str(root))
    return shard


def write(root: Path, name: str, data: bytes) -> Shard:
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(data)
    return only(root)


def parquet(root: Path, counts: list[int]) -> Shard:
    schema = pa.schema([("image", pa.binary()), ("caption", pa.string())])
    sink, row = io.BytesIO(), 0
    with pq.ParquetWriter(sink, schema) as writer:
        for count in counts:
            images = [archives.noise(row + i, 400) for i in range(count)]
            captions = [f"caption {row + i}" for i in range(count)]
            writer.write_table(pa.table([images, captions], schema=schema))
            row += count
    return write(root, "a.parquet", sink.getvalue())


def chunks(root: Path, piece: Piece) -> tuple[list[list[rows.Sample]], rows.ShardEnd]:
    stream = read_shard(
        str(root), piece.shard, start=piece.start, stop=piece.stop, byte=piece.byte,
        skip=piece.skips,
    )  # fmt: skip
    *found, end = rows.chunks(stream, CHUNK, 1 << 30)
    assert isinstance(end, rows.ShardEnd)
    return [chunk for chunk in found if isinstance(chunk, list)], end


@pytest.mark.parametrize("kind", ["tar", "pax", "parquet"])
@pytest.mark.parametrize("parts", [2, 5, 100])
def test_the_parts_of_a_shard_give_its_chunks(tmp_path: Path, kind: str, parts: int) -> None:
    if kind == "parquet":
        shard = parquet(tmp_path, [40, 3, 0, 61, 10, 50])
    else:
        long = "é" * 120 if kind == "pax" else ""
        pairs = [(long + name, data) for name, data in archives.pairs(164)]
        form = tarfile.PAX_FORMAT if kind == "pax" else tarfile.USTAR_FORMAT
        shard = write(tmp_path, "a.tar", archives.tar_bytes(pairs, kind=form))
    whole, end = chunks(tmp_path, Piece(shard))
    cuts = find_cuts(str(tmp_path), shard, parts, CHUNK)
    assert 1 <= len(cuts) < parts
    pieces = list(Piece(shard).cut(cuts))
    found = [chunks(tmp_path, piece) for piece in pieces]
    assert [chunk for part, _ in found for chunk in part] == whole
    assert found[-1][1].rows == end.rows == 164
    assert [piece.whole for piece in pieces] == [False] * len(cuts) + [True]
    if parts < 10 and kind != "parquet":
        sizes = [sum(len(chunk) for chunk in part) for part, _ in found]
        assert max(sizes) <= 164 / parts + 2 * CHUNK


def test_what_is_covered_is_not_read_again(tmp_path: Path) -> None:
    shard = write(tmp_path, "a.tar", archives.tar_bytes(archives.pairs(164)))
    cuts = find_cuts(str(tmp_path), shard, 4, CHUNK)
    covered = ((0, cuts[0].row), (cuts[1].row + 1, cuts[1].row + 3))
    pieces = list(Piece(shard, covered=covered).cut(cuts))
    assert [piece.start for piece in pieces] == [cut.row for cut in cuts]
    found = [s.row for p in pieces for chunk in chunks(tmp_path, p)[0] for s in chunk]
    assert found == [r for r in range(164) if not any(a <= r < b for a, b in covered)]


def test_a_strip_carries_the_byte(tmp_path: Path) -> None:
    shard = write(tmp_path, "a.tar", archives.tar_bytes(archives.pairs(164)))
    pieces = list(Piece(shard).cut(find_cuts(str(tmp_path), shard, 4, CHUNK)))
    strips = Plan(pieces).strips(readers=4)
    found = [piece for strip in strips for piece in strip]
    assert sorted(found, key=lambda piece: piece.start) == pieces


def global_header() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", pax_headers={"comment": "for all"}):
        pass
    return sink.getvalue().rstrip(b"\0").ljust(1024, b"\0")


def test_what_cannot_be_entered_is_read_by_one(tmp_path: Path) -> None:
    pairs = list(archives.pairs(100))
    tar = archives.tar_bytes(pairs)
    for name, data in {
        "packed.tar.gz": gzip.compress(tar),
        "cut.tar": tar[: len(tar) // 2 + 7],
        "back.tar": archives.tar_bytes([*pairs, *pairs[:2]]),
        "global.tar": global_header() + tar,
        "none.parquet": b"PAR1 not at all",
        "small.tar": archives.tar_bytes(pairs[:4]),
    }.items():
        root = tmp_path / name.replace(".", "-")
        assert find_cuts(str(root), write(root, name, data), 4, CHUNK) == [], name
