"""How fast a job asks S3: unlimited, until S3 says that it is too fast.

Additive increase, multiplicative decrease (Chiu and Jain 1989): a request refused with SlowDown
halves the rate of its process, which then grows by a constant until nothing has been refused for a
while. In a job of several processes a refusal anywhere halves the rate of all of them at the same
time: that is what makes such rates converge, and what ``share`` is for.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Protocol

DECREASE = 0.5
INCREASE = 0.05  # a second, of the rate that was refused: that is reached again after ten seconds
LOWEST = 5.0  # requests a second of one process: few enough, and a process that asks little goes on
CUT_S = 1.0  # what is refused within this time of a cut was asked before it
LIFT_S = 30.0  # without a refusal: no limit any more
LEASE_S = 1.0  # a limited process asks the job again after this time,
CHECK_S = 5.0  # and an unlimited one after this


class Unreachable(Exception):
    """The job's other processes cannot be heard now; the rate is this process's alone."""


class Job(Protocol):
    """What the processes of a job share."""

    def __call__(self, refused: bool) -> float | None:
        """Tell the job of a refusal here, if there was one; hear how many seconds ago a request was
        last refused anywhere in it, None for never. Raises Unreachable."""


class Limiter:
    """The rate of one process's requests; may be asked from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = _Rate()
        self._cut_at, self._low, self._step = -math.inf, 0.0, 0.0
        self._next = 0.0  # when the next request may go
        self._job: Job | None = None
        self._hear_at = math.inf

    @property
    def shared(self) -> bool:
        return self._job is not None

    def share(self, job: Job | None) -> None:
        with self._lock:
            self._job = job
            self._hear_at = math.inf if job is None else time.monotonic() + CHECK_S

    def rate(self) -> float | None:
        """Requests a second that are allowed now; None: as many as one likes."""
        with self._lock:
            return self._rate(time.monotonic())

    def wait(self) -> None:
        """Before every request."""
        now = time.monotonic()
        if now >= self._hear_at:
            self._hear(False)
            now = time.monotonic()
        with self._lock:
            self._asked.count(now)
            rate = self._rate(now)
            if rate is None:
                return
            begin = max(self._next, now)
            self._next = begin + 1 / rate
        time.sleep(begin - now)

    def refused(self) -> None:
        """After every request that was refused for coming too fast."""
        with self._lock:
            cut = self._cut(time.monotonic())
        if cut:
            self._hear(True)

    def _rate(self, now: float) -> float | None:
        since = now - self._cut_at
        return None if since > LIFT_S else self._low + self._step * since

    def _cut(self, now: float) -> bool:
        if now - self._cut_at < CUT_S:
            return False
        rate = self._rate(now)
        asked = min(self._asked.rate(now), math.inf if rate is None else rate)
        self._low = max(DECREASE * asked, LOWEST)
        self._step = INCREASE * self._low / DECREASE
        self._cut_at = now
        return True

    def _hear(self, refused: bool) -> None:
        """Tell the job, and cut when somebody else in it was refused since the last cut here."""
        with self._lock:
            job, self._hear_at = self._job, time.monotonic() + LEASE_S  # others need not ask now
        if job is None:
            return
        try:
            ago = job(refused)
        except Unreachable:
            ago = None
        with self._lock:
            now = time.monotonic()
            if ago is not None and ago < LIFT_S and now - ago > self._cut_at + CUT_S:
                self._cut(now)
            limited = self._rate(now) is not None
            self._hear_at = now + (LEASE_S if limited else CHECK_S)


class _Rate:
    """Events a second over the last one or two seconds."""

    def __init__(self) -> None:
        self._began, self._count, self._before = time.monotonic(), 0, 0.0

    def count(self, now: float) -> None:
        if now - self._began >= 1:
            self._before = self._count / (now - self._began)
            self._began, self._count = now, 0
        self._count += 1

    def rate(self, now: float) -> float:
        since = now - self._began
        return max(self._before, self._count) if since < 1 else self._count / since


LIMITER = Limiter()  # this process's
