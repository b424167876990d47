"""Small archives with real bytes, for the tests that read them."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmray.archive.rows import Sample, ShardEnd
from mmray.archive.shards import Shard, list_shards, read_shard

BLOCK = 512


def noise(seed: object, size: int) -> bytes:
    """``size`` bytes that look like nothing, the same for the same seed."""
    return hashlib.shake_128(repr(seed).encode()).digest(size)


def tar_bytes(
    members: Iterable[tuple[str, bytes]], *, kind: int = tarfile.USTAR_FORMAT, end: bool = True
) -> bytes:
    """A tar of regular files; without ``end``, it lacks the end-of-archive marker."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        length = out.tell()
    return out.getvalue() if end else out.getvalue()[:length]


def pairs(count: int, size: int = 700) -> Iterator[tuple[str, bytes]]:
    """Members of ``count`` samples: image, caption, json."""
    for number in range(count):
        yield f"{number:04d}.jpg", noise(number, size + number)
        yield f"{number:04d}.txt", f"caption {number} ü".encode()
        yield f"{number:04d}.json", b'{"label": "l%d", "n": %d}' % (number % 3, number)


def read(root: Path | str, **options: Any) -> tuple[list[Sample], list[ShardEnd]]:
    """All samples and shard ends of an archive."""
    samples: list[Sample] = []
    ends: list[ShardEnd] = []
    for shard in list_shards(str(root)):
        found, end = read_one(root, shard, **options)
        samples += found
        ends.append(end)
    return samples, ends


def read_one(root: Path | str, shard: Shard, **options: Any) -> tuple[list[Sample], ShardEnd]:
    *samples, end = read_shard(str(root), shard, **options)
    assert isinstance(end, ShardEnd)
    assert all(isinstance(sample, Sample) for sample in samples)
    return samples, end  # type: ignore[return-value]


def read_bytes(
    folder: Path, data: bytes, name: str = "x.tar", **options: Any
) -> tuple[list[Sample], ShardEnd]:
    """What a shard of these bytes reads as."""
    (folder / name).write_bytes(data)
    samples, ends = read(folder / name, **options)
    return samples, ends[0]


def brief(samples: Iterable[Sample]) -> list[tuple[int, str, str | None]]:
    """(row, key, reason) of each sample."""
    return [(s.row, s.key, s.error and s.error.partition(":")[0]) for s in samples]
