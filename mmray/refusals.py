"""What S3 and file systems refuse, in our own words: bucket, key, operation, cause, and what to do.

Of S3's answer only its code is told, never what it quotes: that may be somebody's credentials.
"""

from __future__ import annotations

from typing import Any

from mmray import backoff
from mmray.errors import Conflict, NotFound, StorageError

S3 = "s3://"
LIST = "ListObjectsV2"
#: What an operation needs to be allowed; all others write.
PERMISSIONS = {
    LIST: "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "DeleteObject": "s3:DeleteObject",
}


def is_s3(uri: str) -> bool:
    return uri.startswith(S3)


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
        return _refusal(error, uri)
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


def _refusal(error: Any, uri: str) -> StorageError:
    """A botocore ClientError in our words."""
    code, status, operation = code_of(error.response), status_of(error), error.operation_name
    if code in ("404", "NoSuchKey", "NoSuchBucket") or status == 404:
        what = "no such bucket" if code == "NoSuchBucket" else "no such object"
        return NotFound(f"{uri}: {what}")
    if status == 412 and operation == "GetObject":
        return Conflict(f"{uri}: changed while it was read (HTTP 412)")
    if status == 412:
        return Conflict(f"{uri}: already there, written by another process (HTTP 412)")
    cause, asked = backoff.cause(code, status), attempts_of(error)
    if cause == backoff.EXPIRED:
        advice = "; renew the credentials"
    elif cause is not None:
        advice = "; try again later"
    elif code in ("AccessDenied", "403"):
        advice = f"; these credentials need {PERMISSIONS.get(operation, 's3:PutObject')}"
    elif status == 403:
        advice = "; check the credentials"
    else:
        advice = ""
    often = f", asked {asked} times" if asked > 1 else ""
    return StorageError(f"{uri}: S3 refused {operation}: {code} (HTTP {status}{often}){advice}")


def status_of(error: Any) -> int | None:
    status: int | None = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def attempts_of(error: Any) -> int:
    """How many attempts the request took."""
    return 1 + int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0))


def code_of(answer: dict[str, Any]) -> str:
    """``SlowDown``, ``AccessDenied``...; of an answer without a body its status; or nothing."""
    return str(answer.get("Error", {}).get("Code", ""))
