"""Which objects of an archive are shards, and the one door to read any of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq

from mmray import storage
from mmray.archive.columns import GUESSED, none_found, require
from mmray.archive.parquet import UNREADABLE, read_parquet
from mmray.archive.rows import MAX_IMAGE_BYTES, Sample, ShardEnd
from mmray.archive.tar import read_tar
from mmray.archive.want import Want
from mmray.config import Columns
from mmray.errors import ConfigError

Kind = Literal["tar", "parquet"]

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PARQUET_SUFFIX = ".parquet"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of pairs: ``path`` below the archive's root, ``size`` in bytes as stored."""

    path: str
    size: int
    etag: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Ignored:
    """An object that holds no pairs: something else, or img2dataset's table beside a tar."""

    path: str
    size: int
    sidecar: bool


def kind_of(path: str) -> Kind | None:
    """What a shard of this name is; None for what is no shard."""
    name = path.lower()
    if name.endswith(TAR_SUFFIXES):
        return "tar"
    return "parquet" if name.endswith(PARQUET_SUFFIX) else None


def list_shards(root: str) -> Iterator[Shard]:
    """The shards below ``root`` in key order, streamed; ``root`` may also be one shard itself.

    Raises NotFound when there is no such place.
    """
    return (item for item in list_archive(root) if isinstance(item, Shard))


def list_archive(root: str) -> Iterator[Shard | Ignored]:
    """``list_shards``, with what is passed over."""
    if _is_single(root):
        found = storage.stat(root)
        kind = kind_of(root)
        assert kind is not None
        return iter([Shard(root.rpartition("/")[2], found.size, found.etag, kind)])
    return _without_sidecars(storage.list_objects(root))


def read_shard(
    root: str,
    shard: Shard,
    *,
    columns: Columns = GUESSED,
    fields: Sequence[str] = (),
    images: bool = True,
    start: int = 0,
    stop: int | None = None,
    skip: Callable[[int], bool] | None = None,
    byte: int = 0,
    max_image_bytes: int = MAX_IMAGE_BYTES,
) -> Iterator[Sample | ShardEnd]:
    """Every sample of a shard in order, then one ShardEnd with how many there were.

    ``start`` <= row < ``stop`` come out, without those for which ``skip(row)`` is true; the end
    counts all rows up to ``stop``. ``byte`` is where ``start`` begins, see ``cuts``. ``fields``
    names further columns (``want.ALL_FIELDS``: all); those that are not there are left out.
    ``images=False`` leaves out the pictures: ``b""`` stands for one that is there. Whatever is
    wrong with the shard's content comes as ``Sample.error`` or ``ShardEnd.problem``; only
    StorageError is raised.
    """
    want = Want(
        fields=fields,
        images=images,
        start=start,
        stop=stop,
        skip=skip,
        byte=byte,
        max_image_bytes=max_image_bytes,
    )
    with storage.open_read(uri_of(root, shard), etag=shard.etag) as stream:
        if shard.kind == "tar":
            yield from read_tar(stream, shard.path, want, columns.caption)
        else:
            yield from read_parquet(stream, shard.path, columns, want)


def check_columns(
    root: str,
    shard: Shard,
    columns: Columns = GUESSED,
    *,
    fields: Sequence[str] = (),
    image: bool = True,
    caption: bool = True,
) -> None:
    """Refuse a Parquet archive early, by its first shard's footer, instead of row by row.

    Raises ConfigError, naming the columns there are, when the ``image`` or ``caption`` column (if
    needed) or one of ``fields`` is not there, or cannot be told. A tar, or a shard whose footer is
    damaged, has nothing to check.
    """
    if shard.kind == "tar":
        return
    with storage.open_read(uri_of(root, shard), etag=shard.etag) as stream:
        try:
            schema = pq.ParquetFile(stream).schema_arrow
        except UNREADABLE:
            return  # the shard is reported when it is read
    found = require(schema, columns, fields, shard.path)
    for needed, name, what in ((image, found.image, "image"), (caption, found.caption, "caption")):
        if needed and name is None:
            raise ConfigError(f"{shard.path}: {none_found(schema, what)}")


def uri_of(root: str, shard: Shard) -> str:
    """Where a shard of the archive at ``root`` is."""
    same_name = root.rstrip("/").rpartition("/")[2] == shard.path
    return root if same_name and _is_single(root) else storage.join(root, shard.path)


def _is_single(root: str) -> bool:
    """Whether ``root`` is one shard rather than a place that holds shards."""
    if kind_of(root) is None:
        return False
    return storage.exists(root) if storage.is_s3(root) else Path(root).is_file()


def _without_sidecars(objects: Iterable[storage.Object]) -> Iterator[Shard | Ignored]:
    """img2dataset writes ``00000.parquet`` (urls, captions, no images) beside ``00000.tar``.

    The table comes first in key order, so a table waits until no tar of its name can come.
    """
    waiting: deque[Shard] = deque()
    tars: set[str] = set()  # stems, of tars that came while something waits
    for item in objects:
        kind = kind_of(item.path)
        if kind is None:
            yield Ignored(item.path, item.size, sidecar=False)
            continue
        shard = Shard(item.path, item.size, item.etag, kind)
        yield from _release(waiting, tars, item.path)
        if not waiting:
            tars.clear()
        if kind == "tar":
            tars.add(_stem(item.path))
        if kind == "parquet" or waiting:
            waiting.append(shard)
        else:
            yield shard
    yield from _release(waiting, tars, None)


def _release(
    waiting: deque[Shard], tars: set[str], reached: str | None
) -> Iterator[Shard | Ignored]:
    """What need wait no longer, once the listing has reached a path (None: its end)."""
    while waiting:
        first = waiting[0]
        stem = _stem(first.path)
        if first.kind == "parquet" and stem in tars:
            yield Ignored(first.path, first.size, sidecar=True)
        elif first.kind == "tar" or reached is None or reached > stem + max(TAR_SUFFIXES):
            yield first
        else:
            return
        waiting.popleft()


def _stem(path: str) -> str:
    """``a/00000.tar.gz`` -> ``a/00000``."""
    suffixes = (*TAR_SUFFIXES, PARQUET_SUFFIX)
    longest = max((s for s in suffixes if path.lower().endswith(s)), key=len)
    return path[: -len(longest)]
