"""S3 over HTTP: the one client, a stream that survives its connection, errors in our own words.

The only owner of boto3; ``storage`` is the door to it. botocore sends a request once; ``backoff``
says whether to ask again, ``throttle`` how fast.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import threading
import time
from pathlib import Path
from typing import Any

from mmray import backoff
from mmray.errors import Conflict, StorageError
from mmray.refusals import LIST, S3, Translated, attempts_of, code_of, status_of, translate
from mmray.throttle import LIMITER

SKIP_BYTES = 1 << 20  # a seek forward this short is read through; a longer one asks again
PIECE_BYTES = 1 << 16  # read at once from a connection: what a drop can cost


def client() -> Any:
    """This process's S3 client, made once for each endpoint (boto3 clients may be shared)."""
    with _client_lock:
        return _client(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))


_client_lock = threading.Lock()


@functools.lru_cache(maxsize=4)
def _client(endpoint: str | None) -> Any:
    import boto3
    from botocore.config import Config

    # Trailing checksums, the SDK's default since 2025, are refused by several S3 clones (411).
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path"} if endpoint else {},
        max_pool_connections=32,
        connect_timeout=10,
        read_timeout=60,
    )
    made = boto3.session.Session().client("s3", config=config)
    made.meta.events.register("before-send.s3", _before_send)
    made.meta.events.register("needs-retry.s3", _needs_retry)
    return made


def _before_send(**_: Any) -> None:
    """botocore calls this before every attempt, from the thread that makes it."""
    LIMITER.wait()


def _needs_retry(
    *,
    response: tuple[Any, dict[str, Any]] | None,
    operation: Any,
    attempts: int,
    caught_exception: Exception | None,
    request_dict: dict[str, Any],
    **_: Any,
) -> float | None:
    """botocore asks this after every attempt: in how many seconds to make another, if at all."""
    if response is None:
        cause = _broken(caught_exception)
    else:
        http, parsed = response
        cause = backoff.cause(code_of(parsed), http.status_code)
        # botocore takes an answer whose body was lost for an empty one.
        if cause is None and operation.name == LIST and http.status_code == 200:
            cause = None if "IsTruncated" in parsed else backoff.SHORT
    if cause is None:
        return None
    context = request_dict["context"]
    if cause == backoff.SLOW_DOWN:
        LIMITER.refused()
    if cause == backoff.EXPIRED:
        context.setdefault("signing", {})["request_credentials"] = _renewed_credentials()
    failed = context.setdefault("mmray_failed", time.monotonic())
    return backoff.delay(cause, attempts, failed)


def _renewed_credentials() -> Any:
    """As the AWS chain has them now: their file may have been rewritten since, their role's keys
    replaced. Requests to come find them too; botocore itself renews what it knows to expire."""
    import boto3

    _client.cache_clear()
    return boto3.session.Session().get_credentials()


def _broken(error: Exception | None) -> str | None:
    """The cause when no answer came, or not all of it; None for what no other attempt cures."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    if isinstance(error, IncompleteReadError):
        return backoff.SHORT
    if isinstance(error, (HTTPClientError, HTTPError, OSError)):
        return backoff.TIMEOUT if "Timeout" in type(error).__name__ else backoff.LOST
    return None


def split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri[len(S3) :].partition("/")
    if not bucket:
        raise StorageError(f"{uri}: not of the form s3://bucket/path")
    return bucket, key


def list_page(root: str, request: dict[str, str]) -> dict[str, Any]:
    """One LIST answer, whole: an empty one would end the listing early and in silence."""
    with Translated(root):
        page: dict[str, Any] = client().list_objects_v2(**request)
    if "IsTruncated" not in page:
        raise StorageError(f"{root}: S3 answers LIST requests with empty bodies; try again later")
    return page


def head(uri: str) -> tuple[int, str]:
    """Size in bytes and ETag of an object. Raises NotFound."""
    from botocore.exceptions import ClientError

    bucket, key = split(uri)
    with Translated(uri):
        try:
            found = client().head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if status_of(error) not in (400, 403):
                raise
            # An answer to HEAD cannot say what is wrong; one to GET does, and is asked again where
            # that may help.
            found = client().get_object(Bucket=bucket, Key=key)
            found["Body"].close()
    return found["ContentLength"], found["ETag"].strip('"')


def put(uri: str, data: bytes, *, if_absent: bool) -> None:
    """Write an object whole; with ``if_absent``, raise Conflict if somebody else wrote it."""
    from botocore.exceptions import ClientError

    bucket, key = split(uri)
    extra = {"IfNoneMatch": "*"} if if_absent else {}
    with Translated(uri):
        try:
            client().put_object(Bucket=bucket, Key=key, Body=data, **extra)
        except ClientError as error:
            # The answer to a put that succeeded may be lost; asked again, S3 finds our own object.
            if status_of(error) != 412 or attempts_of(error) == 1:
                raise
            with Stream(uri, None) as there:
                if there.readall() != data:
                    raise


def upload(uri: str, source: Path) -> None:
    """Write a file as an object, in several parts where it is large."""
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import ClientError

    bucket, key = split(uri)
    for last in (False, True):
        with Translated(uri):
            try:
                client().upload_file(str(source), bucket, key)
                return
            except S3UploadFailedError as error:
                # An upload whose completion was not answered is unknown when asked again.
                why = error.__context__
                unknown = isinstance(why, ClientError) and code_of(why.response) == "NoSuchUpload"
                if last or not unknown:
                    raise


class Stream(io.RawIOBase):
    """Bytes of an S3 object that survive the connection they come over."""

    def __init__(self, uri: str, etag: str | None, tail: int = 0) -> None:
        """With ``tail``, its last so many bytes come with the first answer, which is then all that
        a small object takes."""
        self._uri = uri
        self._bucket, self._key = split(uri)
        self._tail = b""
        self._size, self._etag = self._read_tail(tail) if tail else head(uri)
        if etag is not None and self._etag != etag:
            raise Conflict(
                f"{uri}: changed since it was listed (its ETag was {etag}, now it is {self._etag})"
            )
        self._position = 0
        self._body: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        target = base + offset
        ahead = target - self._position
        if self._body is not None and 0 < ahead <= SKIP_BYTES:
            while self._position < target and self.read(target - self._position):
                pass
        elif ahead:
            self._drop()
        self._position = target
        return target

    def readinto(self, buffer: Any) -> int:
        want = min(len(buffer), self._size - self._position)
        if want <= 0:
            return 0
        left = self._size - self._position
        if left <= len(self._tail):
            begin = len(self._tail) - left
            data = self._tail[begin : begin + want]
        else:
            data = self._read(min(want, PIECE_BYTES))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read_tail(self, size: int) -> tuple[int, str]:
        """The object's size and ETag; where its end does not come at once, by themselves."""
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        with Translated(self._uri):
            try:
                answer = client().get_object(
                    Bucket=self._bucket, Key=self._key, Range=f"bytes=-{size}"
                )
                with contextlib.closing(answer["Body"]) as body:
                    self._tail = body.read()
                whole = answer.get("ContentRange", "").rpartition("/")[2]
                if whole.isdecimal() and len(self._tail) == min(size, int(whole)):
                    return int(whole), answer["ETag"].strip('"')
            except ClientError as error:
                if status_of(error) != 416:  # an empty object has no end
                    raise
            except (BotoCoreError, HTTPError, OSError):
                pass  # a body that broke: what reads on asks again
        self._tail = b""
        return head(self._uri)

    def _read(self, size: int) -> bytes:
        """Some bytes from here on; where the connection breaks, from another one."""
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        attempt, failed = 0, 0.0
        while True:
            with Translated(self._uri):
                body = self._open_body()
            try:
                data: bytes = body.read(size)
                if data:
                    return data
                raise ConnectionError(f"body ended at byte {self._position} of {self._size}")
            except (BotoCoreError, HTTPError, OSError) as error:
                self._drop()
                attempt += 1
                failed = failed or time.monotonic()
                cause = _broken(error)
                wait = None if cause is None else backoff.delay(cause, attempt, failed)
                if wait is None:
                    raise translate(error, self._uri) from error
            time.sleep(wait)

    def close(self) -> None:
        self._drop()
        super().close()

    def _open_body(self) -> Any:
        if self._body is None:
            answer = client().get_object(
                Bucket=self._bucket,
                Key=self._key,
                Range=f"bytes={self._position}-",
                IfMatch=self._etag,
            )
            if self._position and "ContentRange" not in answer:
                raise StorageError(f"{self._uri}: the server ignores the range it was asked for")
            self._body = answer["Body"]
        return self._body

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None
