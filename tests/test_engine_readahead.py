"""Without these an archive larger than the memory would be read into it while nobody scores."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import tiny

from mmray.archive.shards import list_shards
from mmray.engine import readahead
from mmray.engine.ingest import ReadOptions, chunks_dataset, running
from mmray.engine.pieces import Piece, Plan

CHUNK_BYTES = 1 << 20
IN_BETWEEN = 8  # chunks that Ray has on their way, at most


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("chunks", "size"), [(3, 1 << 40), (1000, 3 * CHUNK_BYTES)])
def test_readers_wait_for_whoever_takes_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: int, size: int
) -> None:
    monkeypatch.setattr(readahead, "CHUNKS_A_READER", chunks)
    monkeypatch.setattr(readahead, "BYTES_A_READER", size)
    members = [
        member
        for i in range(60)
        for member in ((f"{i}.jpg", bytes(CHUNK_BYTES)), (f"{i}.txt", b"a sea"))
    ]
    tiny.write_tar(tmp_path / "0.tar", members)
    plan = Plan(Piece(shard) for shard in list_shards(str(tmp_path)))
    options = ReadOptions(chunk_rows=4, chunk_bytes=CHUNK_BYTES)
    dataset = chunks_dataset(str(tmp_path), plan, options, readers=1)

    def read() -> int:
        (reader,) = (op for op in dataset._current_executor._topology if "Read" in op.name)
        return int(reader.metrics.num_task_outputs_generated)

    with running(dataset) as blocks:
        next(blocks)
        deadline = time.monotonic() + 20
        while read() < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)
        assert 3 <= read() <= 3 + IN_BETWEEN
        rest = sum(1 for _ in blocks)
    assert rest >= 60, "every chunk comes, and the end of the shard"
