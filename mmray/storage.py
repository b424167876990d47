"""Objects in a directory or under an ``s3://`` prefix: list, read in ranges, write atomically.

A *root* is a local directory or ``s3://bucket/prefix``; a *path* is what
stands below it, with ``/`` between its parts, on every system. Credentials, region and endpoint
come from the usual AWS chain (``AWS_ENDPOINT_URL`` included).
"""

from __future__ import annotations

import errno
import functools
import io
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmray import s3
from mmray.errors import Conflict, NotFound
from mmray.refusals import Translated, is_s3, translate
from mmray.s3 import client, split

__all__ = [
    "Object",
    "absolute",
    "client",
    "delete",
    "delete_all",
    "exists",
    "is_s3",
    "join",
    "list_objects",
    "open_read",
    "read_bytes",
    "stat",
    "write_bytes",
    "write_file",
]

BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Object:
    """One object below a root: ``size`` in bytes; ``etag`` changes when its content does."""

    path: str
    size: int
    etag: str


def join(root: str, *parts: str) -> str:
    """``root`` with ``parts`` below it, as one URI."""
    return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(uri: str) -> str:
    """The same place, named so that every process on this machine understands it."""
    return uri.rstrip("/") if is_s3(uri) else os.path.abspath(Path(uri).expanduser())


# --- listing -------------------------------------------------------------------------------------


def list_objects(root: str) -> Iterator[Object]:
    """Every object below ``root``, streamed: one LIST page per 1,000 on S3, in key order.

    Raises NotFound when a local root is no directory, or an S3 bucket does not exist. Names that
    begin with a dot are passed over on a file system, and so are half-written files.
    """
    if is_s3(root):
        yield from _list_s3(root)
    else:
        base = Path(root)
        if not base.is_dir():
            what = "is a file, not a directory" if base.exists() else "no such directory"
            raise NotFound(f"{root}: {what}")
        yield from _list_local(base, "")


def _list_local(base: Path, below: str) -> Iterator[Object]:
    with Translated(str(base / below)), os.scandir(base / below) as entries:
        found = sorted(entries, key=lambda e: e.name + "/" if e.is_dir() else e.name)
    for entry in found:
        if entry.name.startswith("."):
            continue
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir():
            yield from _list_local(base, path)
        else:
            with Translated(str(base / path)):
                result = entry.stat()
            yield Object(path, result.st_size, _local_etag(result))


def _list_s3(root: str) -> Iterator[Object]:
    bucket, prefix = split(root)
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    request = {"Bucket": bucket, "Prefix": prefix}
    while True:
        page = s3.list_page(root, request)
        for item in page.get("Contents", []):
            path = item["Key"][len(prefix) :]
            if path and not path.endswith("/"):
                yield Object(path, item["Size"], item["ETag"].strip('"'))
        if not page["IsTruncated"]:
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def stat(uri: str) -> Object:
    """Size and ETag of one object (its path is empty). Raises NotFound."""
    if is_s3(uri):
        return Object("", *s3.head(uri))
    with Translated(uri):
        result = os.stat(uri)
    return Object("", result.st_size, _local_etag(result))


def exists(uri: str) -> bool:
    try:
        stat(uri)
    except NotFound:
        return False
    return True


def _local_etag(result: os.stat_result) -> str:
    return f"{result.st_size:x}-{result.st_mtime_ns:x}"


# --- reading -------------------------------------------------------------------------------------


def open_read(
    uri: str, etag: str | None = None, buffer: int = BUFFER_BYTES, tail: int = 0
) -> io.BufferedReader:
    """A seekable binary stream of one object that reads ``buffer`` bytes at least.

    On S3 it reads in ranges: a dropped or short body is asked for again *from the byte where it
    stopped*. With ``etag``, an object that has changed since raises Conflict. With ``tail``, its
    last so many bytes are asked for first, without a question for its size. Raises NotFound.
    """
    if is_s3(uri):
        return io.BufferedReader(s3.Stream(uri, etag, tail), buffer)
    with Translated(uri):
        handle: io.BufferedReader = io.BufferedReader(_LocalStream(uri), buffer)
    now = _local_etag(os.fstat(handle.fileno()))
    if etag is not None and now != etag:
        handle.close()
        raise Conflict(f"{uri}: changed since it was listed (its ETag was {etag}, now it is {now})")
    return handle


def read_bytes(uri: str) -> bytes:
    with open_read(uri) as stream:
        return stream.read()


class _LocalStream(io.FileIO):
    """A file whose read errors are ours: readers of formats take OSError for damaged content."""

    def readinto(self, buffer: Any) -> int:
        with Translated(str(self.name)):
            return super().readinto(buffer) or 0

    def readall(self) -> bytes:
        with Translated(str(self.name)):
            return super().readall() or b""


# --- writing -------------------------------------------------------------------------------------


def write_bytes(uri: str, data: bytes, *, if_absent: bool = False) -> None:
    """Write one object whole or not at all; with ``if_absent``, raise Conflict if it is there."""
    if is_s3(uri):
        s3.put(uri, data, if_absent=if_absent)
        return
    with Translated(uri), _Aside(Path(uri)) as aside:
        aside.write_bytes(data)
        _publish(aside, Path(uri), if_absent)


def write_file(uri: str, source: Path) -> None:
    """Copy a local file to ``uri``, whole or not at all (multipart on S3 where it is large)."""
    if is_s3(uri):
        s3.upload(uri, source)
        return
    with Translated(uri), _Aside(Path(uri)) as aside:
        with open(source, "rb") as read, open(aside, "wb") as write:
            while block := read.read(BUFFER_BYTES):
                write.write(block)
        _publish(aside, Path(uri), if_absent=False)


class _Aside:
    """A temporary name beside ``target``, removed if it was not published."""

    def __init__(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        self._path = Path(name)
        self._path.chmod(0o666 & ~_umask())

    def __enter__(self) -> Path:
        return self._path

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _publish(aside: Path, target: Path, if_absent: bool) -> None:
    with open(aside, "rb") as handle:
        os.fsync(handle.fileno())
    if not if_absent:
        os.replace(aside, target)
        return
    try:
        os.link(aside, target)
    except FileExistsError as error:
        raise Conflict(f"{target}: already there") from error


def delete(uri: str) -> None:
    """Remove one object; it is no error if it is already gone."""
    if is_s3(uri):
        bucket, key = split(uri)
        with Translated(uri):
            client().delete_object(Bucket=bucket, Key=key)
        return
    with Translated(uri):
        Path(uri).unlink(missing_ok=True)


def delete_all(root: str) -> None:
    """Remove every object below ``root``, and on a file system the emptied directories too.

    What comes there meanwhile may stay, and its directory with it.
    """
    if is_s3(root):
        for item in list_objects(root):
            delete(join(root, item.path))
        return
    for folder, _, files in os.walk(root, topdown=False, onerror=_raise_unless_gone):
        for name in files:
            delete(os.path.join(folder, name))
        with Translated(folder):
            _remove_emptied(folder)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise translate(error, str(error.filename)) from error


def _remove_emptied(folder: str) -> None:
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return  # another's work
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
