"""An S3 that fails now and then must cost a user time, never an object, a byte or an answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
from hostile import HostileS3

from mmray import backoff, s3, storage, throttle
from mmray.errors import Conflict, NotFound, StorageError
from mmray.throttle import Limiter

DATA = random.Random(3).randbytes(100_000)
LARGE = random.Random(4).randbytes(9_000_000)  # uploaded in parts


@pytest.fixture
def root(s3_endpoint: Any) -> str:
    """A bucket with five objects, written undisturbed."""
    root = str(s3_endpoint.bucket())
    for number in range(5):
        storage.write_bytes(f"{root}/in/{number:02d}", DATA)
    return root


@pytest.fixture
def proxy(root: str, s3_endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileS3]:
    """All requests go through it; waits are short, and what it slows down is this test alone."""
    monkeypatch.setattr(backoff, "FIRST_S", {})
    monkeypatch.setattr(backoff, "SHORTEST_S", 0.001)
    monkeypatch.setattr(throttle, "LOWEST", 1000.0)
    monkeypatch.setattr(s3, "LIMITER", Limiter())
    with HostileS3(s3_endpoint.url) as faulty:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA0SECRET")
        s3._client.cache_clear()  # of an earlier test on the same port
        backoff.COUNTS.take()
        yield faulty


# --- every fault, at every operation -------------------------------------------------------------


def read(root: str, _folder: Path) -> None:
    with storage.open_read(f"{root}/in/00") as stream:
        assert stream.read() == DATA


def list_(root: str, _folder: Path) -> None:
    names = [item.path for item in storage.list_objects(f"{root}/in")]
    assert names == [f"{number:02d}" for number in range(5)]


def stat(root: str, _folder: Path) -> None:
    assert storage.stat(f"{root}/in/00").size == len(DATA)


def put(root: str, _folder: Path) -> None:
    storage.write_bytes(f"{root}/out", DATA)


def put_if_absent(root: str, _folder: Path) -> None:
    storage.write_bytes(f"{root}/out", DATA, if_absent=True)


def upload(root: str, folder: Path) -> None:
    (folder / "large").write_bytes(LARGE)
    storage.write_file(f"{root}/out", folder / "large")


def delete(root: str, _folder: Path) -> None:
    storage.delete(f"{root}/in/00")


USES: list[tuple[str, Callable[[str, Path], None]]] = [
    ("GET", read),
    ("LIST", list_),
    ("HEAD", stat),
    ("PUT", put_if_absent),
    ("POST", upload),
    ("DELETE", delete),
]


@pytest.mark.parametrize(
    ("operation", "use", "kind"),
    [(operation, use, kind) for operation, use in USES for kind in hostile.FAULTS[operation]],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_fault_costs_nothing_but_time(
    proxy: HostileS3, root: str, tmp_path: Path, s3_endpoint: Any, monkeypatch: pytest.MonkeyPatch,
    operation: str, use: Callable[[str, Path], None], kind: str,
) -> None:  # fmt: skip
    times = 1 if kind == "slow" or (operation, kind) == ("HEAD", "expired") else 2
    proxy.plan(kind, operation, times)
    use(root, tmp_path)
    assert proxy.injected == {kind: times}
    retries = backoff.COUNTS.take()
    if kind == "slow":
        assert not retries
    elif (operation, kind) != ("HEAD", "expired"):  # which is asked again as a GET
        assert sum(retries.values()) >= 2, retries
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint.url)
    if operation in ("PUT", "POST"):
        assert storage.read_bytes(f"{root}/out") == (LARGE if use is upload else DATA)
    assert storage.exists(f"{root}/in/00") == (operation != "DELETE")


def test_retries_are_counted_by_cause(proxy: HostileS3, root: str) -> None:
    for kind, times in {"SlowDown": 3, "500": 2, "reset": 1, "short": 1, "slow": 1}.items():
        proxy.plan(kind, "GET", times)
    assert storage.read_bytes(f"{root}/in/00") == DATA
    counts = backoff.COUNTS.take()
    assert counts == {"SlowDown": 3, "server error": 2, "connection lost": 1, "short body": 1}
    assert backoff.COUNTS.take() == {}
    assert backoff.said({"SlowDown": 1200, "reset": 34}) == (
        "S3: 1,234 requests asked again (SlowDown 1,200, reset 34)"
    )


@pytest.mark.parametrize("kind", [None, *hostile.FAULTS["GET"]])
def test_the_end_of_an_object_comes_with_the_first_answer(
    proxy: HostileS3, root: str, kind: str | None
) -> None:
    """Verifying a million score files would otherwise ask three times for each."""
    if kind is not None:
        proxy.plan(kind, "GET")
    with storage.open_read(f"{root}/in/00", tail=50_000) as stream:
        assert stream.seek(-10, 2) == len(DATA) - 10 and stream.read() == DATA[-10:]
        assert stream.seek(-40_000, 2) and stream.read(5) == DATA[-40_000:-39_995]
        if kind is None:
            assert proxy.requests == {"GET": 1}
        stream.seek(20_000)
        assert stream.read() == DATA[20_000:]
        stream.seek(0)
        assert stream.read() == DATA
    assert kind is None or proxy.injected == {kind: 1}


def test_an_end_where_there_is_none(proxy: HostileS3, root: str) -> None:
    storage.write_bytes(f"{root}/empty", b"")
    with storage.open_read(f"{root}/empty", tail=100) as stream:
        assert stream.read() == b""
    with storage.open_read(f"{root}/in/00", tail=1 << 20) as stream:
        assert stream.read() == DATA
    with pytest.raises(NotFound):
        storage.open_read(f"{root}/none", tail=100)


def test_five_per_cent_of_everything_changes_no_byte(proxy: HostileS3, root: str) -> None:
    proxy.share = 0.05
    for round_ in range(15):
        for number in range(5):
            assert storage.read_bytes(f"{root}/in/{number:02d}") == DATA
            storage.write_bytes(f"{root}/out/{number:02d}", DATA[number:], if_absent=round_ == 0)
        assert len(list(storage.list_objects(f"{root}/out"))) == 5
    for number in range(5):
        assert storage.read_bytes(f"{root}/out/{number:02d}") == DATA[number:]
    assert sum(proxy.injected.values()) > 3 and len(proxy.injected) >= 2, proxy.injected


# --- where it ends -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["500", "SlowDown", "reset"])
def test_attempts_are_bounded(proxy: HostileS3, root: str, kind: str) -> None:
    proxy.plan(kind, times=float("inf"))
    with pytest.raises(StorageError, match=f"{root}/out"):
        storage.write_bytes(f"{root}/out", DATA)
    assert proxy.requests == {"PUT": backoff.ATTEMPTS}
    assert sum(backoff.COUNTS.take().values()) == backoff.ATTEMPTS - 1


def test_time_is_bounded_too(proxy: HostileS3, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "SECONDS", -1.0)
    proxy.plan("500", times=float("inf"))
    with pytest.raises(StorageError, match="InternalError"):
        storage.write_bytes(f"{root}/out", DATA)
    assert proxy.requests == {"PUT": 1}


@pytest.mark.parametrize(
    ("operation", "use"), USES, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_refusal_ends_at_once_and_says_what_is_missing(
    proxy: HostileS3, root: str, tmp_path: Path, operation: str, use: Callable[[str, Path], None]
) -> None:
    proxy.plan("denied", operation, times=float("inf"))
    proxy.plan("denied", "GET", times=float("inf"))  # or it would excuse the HEAD
    with pytest.raises(StorageError, match=rf"{root}/.*AccessDenied \(HTTP 403\)") as caught:
        use(root, tmp_path)
    permission = {"GET": "GetObject", "HEAD": "GetObject", "LIST": "ListBucket"}
    wanted = permission.get(operation, "DeleteObject" if operation == "DELETE" else "PutObject")
    assert str(caught.value).endswith(f"these credentials need s3:{wanted}")
    assert "AKIA0SECRET" not in str(caught.value)
    assert proxy.injected["denied"] <= 2  # a HEAD and its GET, two parts


def test_expired_credentials_are_waited_for(
    proxy: HostileS3, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backoff, "ATTEMPTS", 4)
    proxy.plan("expired", times=3)
    read(root, Path())
    assert proxy.injected == {"expired": 3}
    proxy.plan("expired", times=float("inf"))
    with pytest.raises(StorageError, match=r"in/01: .*ExpiredToken.*4 times\); renew the cred"):
        storage.stat(f"{root}/in/01")


def test_credentials_renewed_in_their_file_are_taken_up(
    proxy: HostileS3, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "credentials"
    lines = "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    file.write_text(lines.format("FIRSTKEY", "a"))
    read(root, tmp_path)
    proxy.expired.add("FIRSTKEY")
    file.write_text(lines.format("SECONDKEY", "b"))
    put(root, tmp_path)
    assert proxy.injected == {"expired": 1}
    read(root, tmp_path)
    assert proxy.injected == {"expired": 1}


def test_a_missing_bucket_is_not_asked_for_twice(proxy: HostileS3) -> None:
    with pytest.raises(NotFound, match="s3://no-such-bucket/x: no such bucket"):
        storage.write_bytes("s3://no-such-bucket/x", DATA)
    assert proxy.requests == {"PUT": 1}


# --- conditional writes --------------------------------------------------------------------------


def test_the_winner_of_a_conditional_put_wins_without_an_answer(
    proxy: HostileS3, root: str
) -> None:
    proxy.plan("lost answer", "PUT")
    storage.write_bytes(f"{root}/once", b"ours", if_absent=True)
    assert proxy.injected == {"lost answer": 1} and proxy.requests["PUT"] == 2
    assert storage.read_bytes(f"{root}/once") == b"ours"


def test_the_loser_of_a_conditional_put_loses_also_when_asked_again(
    proxy: HostileS3, root: str
) -> None:
    storage.write_bytes(f"{root}/once", b"theirs")
    proxy.plan("500", "PUT")
    with pytest.raises(Conflict, match="once: already there"):
        storage.write_bytes(f"{root}/once", b"ours", if_absent=True)
    assert proxy.injected == {"500": 1}
    with pytest.raises(Conflict, match="once: already there"):  # not retried: theirs, even if equal
        storage.write_bytes(f"{root}/once", b"theirs", if_absent=True)
    assert storage.read_bytes(f"{root}/once") == b"theirs"


def test_an_upload_whose_completion_was_not_answered_is_there(
    proxy: HostileS3, root: str, tmp_path: Path
) -> None:
    proxy.plan("lost answer", "POST", path="uploadId=")
    upload(root, tmp_path)
    assert proxy.injected == {"lost answer": 1}
    assert storage.read_bytes(f"{root}/out") == LARGE


# --- the rate ------------------------------------------------------------------------------------


def test_refused_requests_slow_the_next_ones_down(proxy: HostileS3, root: str) -> None:
    assert s3.LIMITER.rate() is None
    stat(root, Path())
    assert s3.LIMITER.rate() is None
    proxy.plan("500", "HEAD")
    stat(root, Path())
    assert s3.LIMITER.rate() is None
    proxy.plan("SlowDown", "HEAD")
    stat(root, Path())
    assert s3.LIMITER.rate() is not None
