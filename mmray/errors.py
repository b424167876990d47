"""Every error mmray raises on purpose.

    MmrayError                 exit code 2
    ├── ConfigError            a key, flag or argument is wrong
    ├── StorageError           an object cannot be listed, read or written
    │   ├── NotFound           it is not there
    │   └── Conflict           somebody else wrote it first, or it changed while being read
    ├── ShardError             the shard's bytes are no tar or Parquet: data, not an outage
    ├── BadRow                 one pair cannot be used: becomes a row with a reason
    ├── BundleError            a model bundle is broken, or gives other scores than its golden ones
    └── RunError               the job says no: verify failed, budget passed   exit code 1

Everything else that escapes is a bug in mmray and shows its traceback.
"""

from __future__ import annotations


class MmrayError(Exception):
    """Base of the errors a user can do something about; the text is one line."""

    exit_code = 2


class ConfigError(MmrayError):
    """A configuration key, flag or argument is wrong; nothing has been started."""


class StorageError(MmrayError):
    """An object could not be listed, read or written; names the object and the cause."""


class NotFound(StorageError):
    """The object or prefix does not exist."""


class Conflict(StorageError):
    """A conditional write lost, or an object changed while it was being read."""


class ShardError(MmrayError):
    """A shard's bytes are not what its name says; reported on the shard, never fatal to a job."""


class BadRow(MmrayError):
    """One pair cannot be used.

    ``stage`` is where it failed (see ``archive.rows.STAGES``); ``reason`` a short stable phrase
    that reports count by; ``detail`` what was found.
    """

    def __init__(self, stage: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.stage = stage
        self.reason = reason
        self.detail = detail

    @classmethod
    def surprise(cls, stage: str, error: Exception) -> BadRow:
        """For an error that nobody foresaw: one row's must not cost its chunk."""
        what = " ".join(str(error).split())[:300]
        return cls(stage, "unexpected error", f"{type(error).__name__}: {what}")

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str, str]]:
        return (BadRow, (self.stage, self.reason, self.detail))


class BundleError(MmrayError):
    """A bundle is incomplete, of another format version, or fails its golden check."""


class RunError(MmrayError):
    """The job ran and says no: verification failed, or the error budget was passed."""

    exit_code = 1


def one_line(said: object) -> str:
    """Its text without line breaks, 500 characters at most, for a message that quotes it."""
    return " ".join(str(said).split())[:500]
