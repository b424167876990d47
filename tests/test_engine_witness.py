"""Actors that know others: what Ray says of those that begin again, and what keeps them alive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import ray

from mmray.engine import cluster
from mmray.engine.witness import acquaintance

PATIENCE_S = 60.0


class Known:
    def pid(self) -> int:
        return os.getpid()


class Knows:
    def __init__(self, known: Any) -> None:
        self.known = known

    def pids(self) -> tuple[int, int]:
        return os.getpid(), ray.get(self.known.pid.remote())


def told() -> None:
    """In a process of its own, as Ray says so once in each."""
    cluster.connect(num_cpus=1)
    kind: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Knows)
    for killed in (True, False):
        known: Any = ray.remote(num_cpus=0)(Known).remote()
        knows = kind.remote(acquaintance(known))
        first, answered = ray.get(knows.pids.remote())
        if killed:
            os.kill(first, signal.SIGKILL)
            second, again = ray.get(knows.pids.remote())
            assert second != first and again == answered == ray.get(known.pid.remote())
        else:
            del known
            ended(knows)
    cluster.disconnect()


def ended(knows: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            ray.get(knows.pids.remote())
        except ray.exceptions.RayActorError:
            return
        time.sleep(0.1)
    raise AssertionError("whoever is known lives on, though nobody owns it")


def test_an_acquaintance_answers_who_begins_again_and_is_not_kept_alive() -> None:
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "53727" not in done.stderr, "Ray says that one of them may not begin again"


def test_the_processes_of_small_actors_do_not_import_what_reads_datasets() -> None:
    modules = ", ".join(f"mmray.engine.{name}" for name in ("board", "careful", "losses", "pace"))
    code = f"import sys, {modules}; assert 'ray.data' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    told()
