"""A user would lose objects, or read mixed ones, if storage listed, wrote or read them wrongly."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mmray import backoff, storage
from mmray.errors import Conflict, NotFound, StorageError

AWKWARD_NAMES = [
    "a.tar", "a/b.tar", "a/b/c.tar", "a-b.tar", "a.d/x.tar", "a0.tar", "B.tar", "ä/ö.tar",
    "z z.tar", "a b/c+d.tar", "x%20y.tar", "\U0001f600.tar", "\uffee.tar",
]  # fmt: skip


ENDPOINTS = {"s3": "s3_endpoint", "ceph": "real_s3"}


@pytest.fixture(params=["local", "s3", pytest.param("ceph", marks=pytest.mark.real_s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "root")
    endpoint = request.getfixturevalue(ENDPOINTS[request.param])
    return str(endpoint.bucket()) + "/some/prefix"


def listed(root: str) -> list[str]:
    return [item.path for item in storage.list_objects(root)]


def test_both_kinds_of_root_list_the_same_objects_in_the_same_order(root: str) -> None:
    for name in AWKWARD_NAMES:
        storage.write_bytes(storage.join(root, name), name.encode())
    assert listed(root) == sorted(AWKWARD_NAMES, key=str.encode)
    sizes = {item.path: item.size for item in storage.list_objects(root)}
    assert sizes == {name: len(name.encode()) for name in AWKWARD_NAMES}
    for name in AWKWARD_NAMES:
        assert storage.read_bytes(storage.join(root, name)) == name.encode()


def test_s3_lists_past_the_first_page(s3_endpoint: Any) -> None:
    root = s3_endpoint.bucket()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: storage.write_bytes(f"{root}/p/{n:05d}", b""), range(1001)))
    storage.write_bytes(f"{root}/pq", b"not below p")
    assert listed(f"{root}/p") == [f"{number:05d}" for number in range(1001)]


def test_a_listing_agrees_with_stat_and_etags_follow_the_content(root: str) -> None:
    uri = storage.join(root, "x")
    storage.write_bytes(uri, b"one")
    (item,) = storage.list_objects(root)
    found = storage.stat(uri)
    assert (found.size, found.etag) == (item.size, item.etag) == (3, item.etag)
    storage.write_bytes(uri, b"two")
    assert storage.stat(uri).etag != item.etag


def test_what_is_not_there_is_said_to_be_so(root: str) -> None:
    missing = storage.join(root, "no/such")
    for ask in (storage.stat, storage.open_read, storage.read_bytes):
        with pytest.raises(NotFound, match="no/such: no such"):
            ask(missing)
    assert not storage.exists(missing)
    storage.delete(missing)


def test_missing_roots(tmp_path: Path, s3_endpoint: Any) -> None:
    with pytest.raises(NotFound, match="nowhere: no such directory"):
        listed(str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(NotFound, match="file: is a file"):
        listed(str(tmp_path / "file"))
    with pytest.raises(NotFound, match="s3://no-such-bucket/x: no such bucket"):
        listed("s3://no-such-bucket/x")
    assert listed(s3_endpoint.bucket() + "/nothing/here") == []


def test_the_second_writer_of_an_absent_object_loses(root: str) -> None:
    uri = storage.join(root, "once")
    storage.write_bytes(uri, b"first", if_absent=True)
    with pytest.raises(Conflict, match="once"):
        storage.write_bytes(uri, b"second", if_absent=True)
    assert storage.read_bytes(uri) == b"first"
    storage.write_bytes(uri, b"third")
    assert storage.read_bytes(uri) == b"third"


def test_write_file_copies_whole_files(root: str, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(9_000_000)  # several parts on S3
    (tmp_path / "source").write_bytes(data)
    uri = storage.join(root, "deep/er/copy")
    storage.write_file(uri, tmp_path / "source")
    assert storage.read_bytes(uri) == data
    assert listed(root) == ["deep/er/copy"]


@pytest.mark.parametrize("how", ["bytes", "file", "absent"])
def test_a_failed_write_leaves_nothing_behind(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "source").write_bytes(b"new")
    target = tmp_path / "out" / "object"
    target.parent.mkdir()
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    write: dict[str, Callable[[], None]] = {
        "bytes": lambda: storage.write_bytes(str(target), b"new"),
        "file": lambda: storage.write_file(str(target), tmp_path / "source"),
        "absent": lambda: storage.write_bytes(str(target) + "2", b"new", if_absent=True),
    }
    with pytest.raises(StorageError, match="No space left"):
        write[how]()
    assert [path.name for path in target.parent.iterdir()] == ["object"]
    assert target.read_bytes() == b"old"


def test_half_written_and_hidden_files_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".x.tar.abc").write_bytes(b"half")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "y.tar").touch()
    (tmp_path / "x.tar").touch()
    assert listed(str(tmp_path)) == ["x.tar"]


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "ours"), b"")
    (tmp_path / "plain").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_seeking_reads_the_right_bytes(root: str) -> None:
    rng = random.Random(2)
    data = rng.randbytes(5_000_000)
    uri = storage.join(root, "data")
    storage.write_bytes(uri, data)
    with storage.open_read(uri, storage.stat(uri).etag) as stream:
        for _ in range(60):
            at = rng.choice([0, len(data), rng.randrange(len(data)), len(data) + 7])
            near = min(stream.tell() + rng.randrange(2_000_000), len(data))
            whence = rng.choice([0, 1, 2, 3])
            if whence == 0:
                assert stream.seek(at) == at
            elif whence == 1:
                assert stream.seek(near - stream.tell(), 1) == near
            elif whence == 2:
                assert stream.seek(at - len(data), 2) == at
            start, count = stream.tell(), rng.choice([0, 1, 511, 512, 70_000, 1_500_000])
            assert stream.read(count) == data[start : start + count]


def test_an_empty_object_reads_as_empty(root: str) -> None:
    storage.write_bytes(storage.join(root, "empty"), b"")
    assert storage.read_bytes(storage.join(root, "empty")) == b""


def test_an_object_that_changed_since_it_was_listed_is_refused(root: str) -> None:
    uri = storage.join(root, "x.tar")
    storage.write_bytes(uri, b"one")
    (item,) = storage.list_objects(root)
    storage.write_bytes(uri, b"another")
    with pytest.raises(Conflict, match="changed since it was listed"):
        storage.open_read(uri, item.etag)


def test_s3_bytes_of_two_versions_are_never_mixed(s3_endpoint: Any) -> None:
    uri = s3_endpoint.bucket() + "/x"
    storage.write_bytes(uri, b"1" * 4_000_000)
    with storage.open_read(uri) as stream:
        assert stream.read(10) == b"1" * 10
        storage.write_bytes(uri, b"2" * 4_000_000)
        stream.seek(3_000_000)
        with pytest.raises(Conflict, match="changed"):
            stream.read(10)


def test_deleting_everything_below_a_root(root: str) -> None:
    for name in ("a", "b/c", "b/d/e"):
        storage.write_bytes(storage.join(root, name), b"x")
    beside = root + "-2"
    storage.write_bytes(storage.join(beside, "kept"), b"x")
    storage.delete_all(root)
    assert not storage.exists(storage.join(root, "a"))
    assert listed(beside) == ["kept"]
    if not storage.is_s3(root):
        assert not Path(root).exists()
    storage.delete_all(root)


def test_what_is_written_while_all_is_deleted_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scorer that lingers may write a part while its shard's parts are dropped."""
    late, remove = tmp_path / "parts" / "a.tar" / "late.parquet", os.rmdir

    def write_then_remove(folder: str) -> None:
        if folder == str(late.parent):
            late.write_bytes(b"x")
        remove(folder)

    (tmp_path / "parts" / "b.tar").mkdir(parents=True)
    storage.write_bytes(str(late.with_name("early.parquet")), b"x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", write_then_remove)
        storage.delete_all(str(tmp_path / "parts"))
    assert listed(str(tmp_path / "parts")) == ["a.tar/late.parquet"]
    storage.delete_all(str(tmp_path / "parts"))
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("call", ["rmdir", "scandir"])
def test_what_cannot_be_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(folder: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", folder)

    (tmp_path / "parts").mkdir()
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StorageError, match=r"parts: Permission denied"):
        storage.delete_all(str(tmp_path / "parts"))


def test_local_trouble_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "link.tar").symlink_to(tmp_path / "gone")
    with pytest.raises(StorageError, match=r"link\.tar"):
        listed(str(tmp_path))
    with pytest.raises(StorageError, match="directory"):
        storage.open_read(str(tmp_path))


def test_a_disk_that_fails_while_reading_is_a_storage_error(tmp_path: Path) -> None:
    """A format reader takes OSError for damaged bytes, and would blame the shard."""
    with storage.open_read("/proc/self/mem") as stream, pytest.raises(StorageError, match="mem"):
        stream.read(10)


def test_s3_trouble_is_a_storage_error(
    s3_endpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"x")
    for write in (
        lambda: storage.write_bytes("s3://no-such-bucket/x", b"x"),
        lambda: storage.write_file("s3://no-such-bucket/x", tmp_path / "x"),
    ):
        with pytest.raises(NotFound, match="s3://no-such-bucket/x: no such bucket"):
            write()
    with pytest.raises(StorageError, match="not of the form"):
        storage.stat("s3://")
    monkeypatch.setattr(backoff, "ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(StorageError, match=r"s3://b/x: .*127\.0\.0\.1:9"):
        storage.stat("s3://b/x")
