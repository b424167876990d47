"""An ``mmray`` command as a process of its own, whose lines are passed on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from mmray.errors import RunError

STOP_S = 15.0  # seconds a command gets to end after Ctrl-C


class Child:
    """``mmray <arguments>`` in the background; leaving the ``with`` block ends it for certain.

    It has a session of its own: Ctrl-C in the terminal reaches the parent only.
    """

    def __init__(self, arguments: Sequence[str], say: Callable[[str], None]) -> None:
        self._name, self._say = arguments[0], say
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mmray", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running():
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join(STOP_S)

    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """As ``kill -9`` does it: the process, and nobody else, without a word."""
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def check(self) -> None:
        """Wait for its end; raises RunError unless that was a good one."""
        code = self._process.wait()
        if code:
            raise RunError(f"mmray {self._name}: ended with exit code {code}; see its lines above")

    def _pass_on(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip():
                self._say(line.rstrip())
