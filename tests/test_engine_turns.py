"""Processes of a server wait for their turn on a core."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from mmray.engine import turns

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux alone has it")

WAITING = """
import os, subprocess, sys, threading
from mmray.engine.turns import wait_for_turns

def policies():
    return {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}

def beside(what):
    ended = threading.Event()
    other = threading.Thread(target=ended.wait, daemon=True)  # a failure below ends the process
    other.start()
    what()
    ended.set()
    other.join()
    while str(other.native_id) in os.listdir("/proc/self/task"):  # join returns a moment before
        pass

def all_wait():
    assert policies() == {os.SCHED_BATCH}, policies()

assert policies() == {os.SCHED_OTHER}
beside(wait_for_turns)  # threads that were there before
beside(all_wait)  # and one that came after
child = "import os; print(os.sched_getscheduler(0))"
said = subprocess.run([sys.executable, "-c", child], stdout=subprocess.PIPE, check=True).stdout
assert int(said) == os.SCHED_BATCH
"""


def test_all_threads_and_children_wait_for_their_turn() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WAITING], stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_where_it_is_forbidden_the_process_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    with caplog.at_level(logging.INFO, turns.__name__):
        turns.wait_for_turns()
    assert "Operation not permitted" in caplog.text
