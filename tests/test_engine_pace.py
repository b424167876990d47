"""On a real Ray: SlowDown met by one process of a job slows the others, and costs no run."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import ray
from ray import cloudpickle

from mmray import throttle
from mmray.engine import pace
from mmray.throttle import Unreachable

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module


class Process:
    """A process of the job that makes requests."""

    def __init__(self) -> None:
        throttle.CHECK_S = 0.2
        pace.share()

    def ask(self) -> None:
        throttle.LIMITER.wait()

    def meet_slow_down(self) -> None:
        throttle.LIMITER.refused()

    def rate(self) -> float | None:
        return throttle.LIMITER.rate()


@pytest.mark.usefixtures("ray_cluster")
def test_all_processes_of_a_job_slow_down_together_and_outlive_what_they_share() -> None:
    one, other = (ray.remote(num_cpus=0)(Process).remote() for _ in range(2))
    ray.get([one.ask.remote(), other.ask.remote()])
    with pytest.raises(ValueError):
        ray.get_actor(pace.NAME)  # nothing was refused, so there is none
    ray.get(one.meet_slow_down.remote())
    assert ray.get(one.rate.remote()) is not None

    def until_limited(process: Any) -> bool:
        for _ in range(100):
            ray.get(process.ask.remote())
            if ray.get(process.rate.remote()) is not None:
                return True
            time.sleep(0.1)
        return False

    assert until_limited(other)
    ray.kill(ray.get_actor(pace.NAME))
    late = ray.remote(num_cpus=0)(Process).remote()
    ray.get([process.meet_slow_down.remote() for process in (one, other, late)])
    ray.get([process.ask.remote() for process in (one, other, late)])
    assert ray.get(late.rate.remote()) is not None


def test_without_a_cluster_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert pace.Shared()(refused=True) is None


def test_an_actor_that_does_not_answer_is_no_error_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hang(*_: object, **__: object) -> None:
        raise ray.exceptions.GetTimeoutError("too slow")

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(pace, "_created", lambda: _Actor())
    monkeypatch.setattr(ray, "get", hang)
    with pytest.raises(Unreachable, match="too slow"):
        pace.Shared()(refused=True)


class _Actor:
    class hear:  # noqa: N801
        remote = staticmethod(lambda refused: None)
