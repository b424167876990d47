"""Which S3 answers are worth asking again, how long to wait before that, and how often it was done.

One rule for every request: exponential backoff with jitter, bounded in attempts and in time.
``s3`` asks it after every attempt; ``throttle`` sees to how fast requests follow each other.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Mapping

ATTEMPTS = 10  # of one request, the first included
SECONDS = 120.0  # from its first failure to the last new attempt
LONGEST_S = 10.0  # of one wait

#: Causes, as reports name them.
SLOW_DOWN = "SlowDown"
EXPIRED = "expired credentials"
SERVER = "server error"
CONFLICT = "write in flight"
LOST = "connection lost"
TIMEOUT = "timeout"
SHORT = "short body"

#: Seconds of the first wait; each further one is twice as long. What must pass over takes longer.
FIRST_S = {SLOW_DOWN: 1.0, EXPIRED: 1.0}
SHORTEST_S = 0.1

_BY_CODE = {
    "SlowDown": SLOW_DOWN,
    "TooManyRequests": SLOW_DOWN,
    "RequestLimitExceeded": SLOW_DOWN,
    "BandwidthLimitExceeded": SLOW_DOWN,
    "Throttling": SLOW_DOWN,
    "ThrottlingException": SLOW_DOWN,
    "ExpiredToken": EXPIRED,
    "InvalidToken": EXPIRED,
    "RequestExpired": EXPIRED,
    "RequestTimeTooSkewed": EXPIRED,
    "TokenRefreshRequired": EXPIRED,
    "ConditionalRequestConflict": CONFLICT,
    "OperationAborted": CONFLICT,
    "RequestTimeout": TIMEOUT,
}
_BY_STATUS = {429: SLOW_DOWN, 503: SLOW_DOWN, 500: SERVER, 502: SERVER, 504: SERVER}


def cause(code: str, status: int | None) -> str | None:
    """Why an answer with this error ``code`` is worth asking again; None: it is the last word."""
    return _BY_CODE.get(code) or _BY_STATUS.get(status or 0)


def delay(cause: str, attempt: int, failed: float) -> float | None:
    """Seconds to wait after so many attempts, counted as a retry; None: no other attempt.

    ``failed``: when the first attempt had failed, by ``time.monotonic``.
    """
    if attempt >= ATTEMPTS or time.monotonic() - failed > SECONDS:
        return None
    COUNTS.add(cause)
    longest = min(FIRST_S.get(cause, SHORTEST_S) * 2.0 ** (attempt - 1), LONGEST_S)
    return longest * (0.5 + random.random() / 2)


class Counts:
    """Requests asked again, by cause, since somebody last took the counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, cause: str) -> None:
        with self._lock:
            self._counts[cause] += 1

    def take(self) -> dict[str, int]:
        """The counts; they begin anew."""
        if not self._counts:
            return {}
        with self._lock:
            taken, self._counts = self._counts, Counter()
        return dict(taken)


COUNTS = Counts()  # this process's


def said(counts: Mapping[str, int]) -> str:
    """``S3: 1,234 requests asked again (SlowDown 1,200, connection lost 34)``"""
    causes = ", ".join(f"{name} {count:,}" for name, count in Counter(counts).most_common())
    return f"S3: {sum(counts.values()):,} requests asked again ({causes})"
