"""Processes that go on hammering an S3 that says SlowDown would be refused for hours."""

from __future__ import annotations

import heapq
import random
from types import SimpleNamespace

import pytest

from mmray import throttle
from mmray.throttle import Limiter, Unreachable


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake = SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep)
    monkeypatch.setattr(throttle, "time", fake)
    return clock


class Job:
    """What an actor holds, in this process."""

    def __init__(self, clock: Clock) -> None:
        self.asked, self.reachable = 0, True
        self._clock, self._at = clock, -1.0

    def __call__(self, refused: bool) -> float | None:
        self.asked += 1
        if not self.reachable:
            raise Unreachable("gone")
        if refused:
            self._at = self._clock.now
        return None if self._at < 0 else self._clock.now - self._at


def ask(limiter: Limiter, clock: Clock, seconds: float, rate: float) -> int:
    """Requests as a process makes them that could make ``rate`` a second."""
    end, count = clock.now + seconds, 0
    while clock.now < end:
        limiter.wait()
        clock.now += 1 / rate
        count += 1
    return count


def test_where_nothing_is_refused_nothing_waits(clock: Clock) -> None:
    limiter, job = Limiter(), Job(clock)
    limiter.share(job)
    before = clock.now
    for _ in range(10_000):
        limiter.wait()
    assert clock.now == before and job.asked == 0
    ask(limiter, clock, 100, 500)
    assert job.asked <= 100 / throttle.CHECK_S + 1


def test_a_refusal_halves_the_rate_which_grows_until_it_is_lifted(clock: Clock) -> None:
    limiter = Limiter()
    ask(limiter, clock, 3, 100)
    limiter.refused()
    assert limiter.rate() == pytest.approx(50, rel=0.1)
    for _ in range(50):
        limiter.refused()  # the answers of requests already on their way
    assert limiter.rate() == pytest.approx(50, rel=0.1)
    assert ask(limiter, clock, 2, 1000) == pytest.approx(2 * 55, rel=0.1)
    clock.now += 8
    assert limiter.rate() == pytest.approx(100, rel=0.1)
    limiter.refused()
    clock.now += throttle.LIFT_S + 0.1
    assert limiter.rate() is None


def test_a_refusal_anywhere_in_the_job_halves_the_rate_of_all(clock: Clock) -> None:
    job, (one, other) = Job(clock), (Limiter(), Limiter())
    for limiter in (one, other):
        limiter.share(job)
        ask(limiter, clock, 2, 100)
    one.refused()
    heard_by = clock.now + throttle.CHECK_S + 0.1
    while other.rate() is None and clock.now < heard_by:
        ask(other, clock, 0.1, 100)
    assert other.rate() == pytest.approx(50, rel=0.1)
    clock.now += 5
    other.refused()
    was = one.rate()
    one.wait()
    assert was and one.rate() and one.rate() < 0.6 * was
    late = Limiter()
    late.share(job)
    clock.now += 3600
    late.wait()
    assert late.rate() is None  # what was refused an hour ago is no reason to be slow now


def test_a_job_that_cannot_be_reached_leaves_a_process_to_itself(clock: Clock) -> None:
    limiter, job = Limiter(), Job(clock)
    job.reachable = False
    limiter.share(job)
    ask(limiter, clock, 3, 100)
    limiter.refused()
    assert limiter.rate() == pytest.approx(50, rel=0.1)
    ask(limiter, clock, 20, 100)
    assert 20 <= job.asked <= 23


@pytest.mark.parametrize("shared", [True, False])
def test_processes_settle_at_what_s3_allows(clock: Clock, shared: bool) -> None:
    """Eight processes that could ask 800 times a second, and a bucket that takes 100."""
    chance, job = random.Random(5), Job(clock)
    arrivals: list[tuple[float, int]] = [(clock.now, number) for number in range(8)]
    limiters = [Limiter() for _ in arrivals]
    for limiter in limiters:
        limiter.share(job if shared else None)
    tokens, filled, begin = 0.0, clock.now, clock.now
    accepted = refused = 0
    while arrivals[0][0] < begin + 120:
        clock.now, number = heapq.heappop(arrivals)
        tokens, filled = min(tokens + 100 * (clock.now - filled), 25.0), clock.now
        settled = clock.now > begin + 20
        if tokens >= 1:
            tokens -= 1
            accepted += settled
        else:
            refused += settled
            limiters[number].refused()
        clock.now += chance.uniform(0.5, 1.5) / 100
        limiters[number].wait()
        heapq.heappush(arrivals, (clock.now, number))
    assert accepted > 0.6 * 100 * 100
    assert refused < 0.1 * accepted
