"""S3 over HTTP: the one client, a stream that survives its connection, errors in our own words.

The only owner of boto3; ``storage`` is the door to it.
"""

from __future__ import annotations

import functools
import io
import os
import threading
import time
from typing import Any

from mmray.errors import Conflict, NotFound, StorageError

S3 = "s3://"
ATTEMPTS = 8
SKIP_BYTES = 1 << 20  # a seek forward this short is read through; a longer one asks again
PIECE_BYTES = 1 << 16  # read at once from a connection: what a drop can cost


def is_s3(uri: str) -> bool:
    return uri.startswith(S3)


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
        retries={"mode": "standard", "max_attempts": ATTEMPTS},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path"} if endpoint else {},
        max_pool_connections=32,
        connect_timeout=10,
        read_timeout=60,
    )
    return boto3.session.Session().client("s3", config=config)


def split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri[len(S3) :].partition("/")
    if not bucket:
        raise StorageError(f"{uri}: not of the form s3://bucket/path")
    return bucket, key


def list_page(root: str, request: dict[str, str]) -> dict[str, Any]:
    """One LIST answer, whole: botocore takes an answer whose body was lost for an empty one, which
    would end the listing early and in silence."""
    for attempt in range(1, ATTEMPTS + 1):
        with Translated(root):
            page: dict[str, Any] = client().list_objects_v2(**request)
        if "IsTruncated" in page:
            return page
        time.sleep(min(0.1 * 2**attempt, 10))
    raise StorageError(f"{root}: S3 answers LIST requests with empty bodies")


def head(uri: str) -> tuple[int, str]:
    """Size in bytes and ETag of an object. Raises NotFound."""
    bucket, key = split(uri)
    with Translated(uri):
        found = client().head_object(Bucket=bucket, Key=key)
    return found["ContentLength"], found["ETag"].strip('"')


class Stream(io.RawIOBase):
    """Bytes of an S3 object that survive the connection they come over."""

    def __init__(self, uri: str, etag: str | None) -> None:
        self._uri = uri
        self._bucket, self._key = split(uri)
        self._size, self._etag = head(uri)
        if etag is not None and self._etag != etag:
            raise Conflict(f"{uri}: changed since it was listed; list the archive again")
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
        for attempt in range(1, ATTEMPTS + 1):
            try:
                data = self._open_body().read(min(want, PIECE_BYTES))
                if not data:
                    raise ConnectionError(f"body ended at byte {self._position} of {self._size}")
                break
            except Exception as error:
                self._drop()
                if attempt == ATTEMPTS or not _worth_retrying(error):
                    raise translate(error, self._uri) from error
                time.sleep(min(0.1 * 2**attempt, 10))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

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


def _worth_retrying(error: Exception) -> bool:
    """Connections break; an answer that says no stays no (boto3 has retried 5xx by itself)."""
    from botocore.exceptions import ClientError, NoCredentialsError

    return not isinstance(error, (ClientError, NoCredentialsError, StorageError))


class Translated:
    """Foreign errors, a file system's too, leave ``storage`` as ours, naming the object."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, StorageError):
            translated = translate(error, self._uri)
            if translated is not error:
                raise translated from error


def translate(error: Exception, uri: str) -> Exception:
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{uri}: no such file")
    if isinstance(error, OSError) and not is_s3(uri):
        return StorageError(f"{uri}: {error.strerror or error}")
    if not is_s3(uri) or isinstance(error, StorageError):
        return error
    from boto3.exceptions import Boto3Error, S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if code in ("404", "NoSuchKey", "NoSuchBucket") or status == 404:
            what = "no such bucket" if code == "NoSuchBucket" else "no such object"
            return NotFound(f"{uri}: {what}")
        if status == 412:
            return Conflict(f"{uri}: changed, or written by another process (HTTP 412)")
        return StorageError(f"{uri}: S3 refused {error.operation_name}: {code} (HTTP {status})")
    if isinstance(error, NoCredentialsError):
        return StorageError(
            f"{uri}: no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or give the machine a role"
        )
    if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, ClientError):
        return translate(error.__context__, uri)
    if isinstance(error, (Boto3Error, BotoCoreError, OSError)) or type(error).__module__.startswith(
        "urllib3"
    ):
        return StorageError(f"{uri}: {type(error).__name__}: {error}")
    return error
