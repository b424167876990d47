"""Scores and refusals -> what a caller gets: encode, without a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import pyarrow as pa

from mmray.archive import rows
from mmray.errors import BadRow, MmrayError
from mmray.preprocess.image import TOO_LARGE, UNSUPPORTED

PROBLEM = "application/problem+json"
#: Where a reason has a status of its own; every other pair that cannot be used is 422.
STATUS = {TOO_LARGE: 413, UNSUPPORTED: 415}
SHORT = 12  # characters of a fingerprint, as everywhere


class Refused(MmrayError):
    """A request, or one pair of it, gets no score; what the caller is told, as a problem.

    ``reason`` is a stable phrase, for a picture or caption the one of batch scoring; ``detail``
    may quote the request, and is for its sender alone.
    """

    def __init__(
        self, status: int, reason: str, detail: str = "", stage: str | None = None, **headers: str
    ) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.status, self.reason, self.detail, self.stage = status, reason, detail, stage
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @classmethod
    def of_row(cls, bad: BadRow) -> Refused:
        return cls(STATUS.get(bad.reason, 422), bad.reason, bad.detail, bad.stage)

    def problem(self, request_id: str | None = None) -> dict[str, Any]:
        """As RFC 9457 has it, with ``reason``, ``stage`` and ``request_id`` added."""
        found = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "reason": self.reason,
            "detail": self.detail or None,
            "stage": self.stage,
            "request_id": request_id,
        }
        return {name: value for name, value in found.items() if value is not None}


class Busy(MmrayError):
    """Queues are full; nothing of the request was begun."""


@dataclass(frozen=True, slots=True)
class Result:
    """One scored pair: a row of a score table, which bundle scored it, for how many seconds its
    batch was in the model, and how many its decoding took."""

    columns: Mapping[str, Any]
    fingerprint: str
    model_s: float
    decode_s: float = 0.0

    def encode(self) -> dict[str, Any]:
        """For the caller: ``label``, ``scores`` by label, what else its table has, ``model``."""
        prefix = rows.PROBABILITY
        scores = {
            n.removeprefix(prefix): v for n, v in self.columns.items() if n.startswith(prefix)
        }
        rest = {n: v for n, v in self.columns.items() if not n.startswith(prefix)}
        return {**rest, "scores": scores, "model": self.fingerprint[:SHORT]}


#: Columns of a score table that say which row it is and what is wrong with it, not its scores.
_ABOUT = (rows.SHARD, rows.ROW, rows.KEY, rows.ERROR, rows.ERROR_STAGE)

Outcome = Result | BadRow


def timed(outcome: Outcome, decode_s: float) -> Outcome:
    """The outcome of a pair whose decoding took so long."""
    return replace(outcome, decode_s=decode_s) if isinstance(outcome, Result) else outcome


def outcomes(table: pa.Table, fingerprint: str, seconds: float) -> list[Outcome]:
    """Of every row of a score table its scores, or the reason why it has none."""
    return [_outcome(row, fingerprint, seconds) for row in table.to_pylist()]


def _outcome(row: dict[str, Any], fingerprint: str, seconds: float) -> Outcome:
    if row[rows.ERROR] is not None:
        reason, _, detail = row[rows.ERROR].partition(": ")
        return BadRow(row[rows.ERROR_STAGE], reason, detail)
    scores = {name: v for name, v in row.items() if name not in _ABOUT}
    return Result(scores, fingerprint, seconds)
