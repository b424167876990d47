"""Actors that know others: what keeps them alive, and what Ray says of those that begin again."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import pytest
import ray
from ray import cloudpickle

from mmray.engine.quiet import acquaintance

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module


class Known:
    def pid(self) -> int:
        return os.getpid()


class Knows:
    def __init__(self, known: Any) -> None:
        self.known = known

    def pids(self) -> tuple[int, int]:
        return os.getpid(), ray.get(self.known.pid.remote())


def test_an_acquaintance_answers_who_begins_again_and_is_not_kept_alive(
    ray_cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    known: Any = ray.remote(num_cpus=0)(Known).remote()
    kind: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Knows)
    knows = kind.remote(acquaintance(known))
    first, answered = ray.get(knows.pids.remote())
    os.kill(first, signal.SIGKILL)
    second, again = ray.get(knows.pids.remote())
    assert second != first and again == answered == ray.get(known.pid.remote())
    assert "53727" not in capfd.readouterr().err, "Ray says that it may not begin again"

    del known
    deadline = time.monotonic() + 60
    with pytest.raises(ray.exceptions.RayActorError):
        while time.monotonic() < deadline:
            ray.get(knows.pids.remote())
            time.sleep(0.1)
