"""Those that serve_load.py compares, all up at once, each with its turns.

Whoever's turn it is not is stopped (SIGSTOP), so that it takes nothing from the others. Turns of
different ones are then seconds apart: minutes apart, the machine's own speed changes by more than
what there is to see.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from _load import apart

from mmray.memory import HEAP

CALLERS, WARM_S = 64, 5.0
START_S = 240.0
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server, or the bare Predictor (``port`` 0), and all processes that are its own."""

    arm: str
    process: psutil.Process
    port: int
    told: subprocess.Popen[str] | None = None  # the Predictor, by its input

    def asked(self, bodies: Path) -> dict[str, Any]:
        """What every load on it is asked."""
        where = {"host": "127.0.0.1", "port": self.port, "path": "/v1/score"}
        return where | {"bodies": str(bodies)}

    def full(self, bodies: Path, seconds: float) -> dict[str, Any]:
        """A turn at saturation: what ``_load`` reports, of the Predictor its rate alone."""
        if self.told is not None:
            return {"goodput": self.answer(str(seconds))}
        return apart({**self.asked(bodies), "in_flight": CALLERS, "seconds": seconds})

    def answer(self, line: str) -> Any:
        """What the Predictor says to ``line``."""
        assert self.told is not None and self.told.stdin and self.told.stdout
        print(line, file=self.told.stdin, flush=True)
        return json.loads(self.told.stdout.readline())

    @contextmanager
    def on(self) -> Iterator[None]:
        """Meanwhile it runs; then it is stopped again."""
        self.resume()
        try:
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        for each in self._all():
            each.suspend()

    def resume(self) -> None:
        for each in self._all():
            each.resume()

    def _all(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]


@contextmanager
def contestant(arm: str, bundle: Path, bodies: Path, replicas: int) -> Iterator[Contestant]:
    """One that has started, is warm, and is stopped."""
    with predictor(bundle, bodies) if arm == "predictor" else server(arm, bundle, replicas) as one:
        one.full(bodies, WARM_S)
        one.stop()
        try:
            yield one
        finally:
            one.resume()


@contextmanager
def predictor(bundle: Path, bodies: Path) -> Iterator[Contestant]:
    command = [sys.executable, HERE / "_servers.py", "predictor", bundle, bodies]
    held = os.environ | HEAP  # as mmray's own processes hold their memory
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=held) as told:
        yield Contestant("predictor", psutil.Process(told.pid), 0, told)


@contextmanager
def server(arm: str, bundle: Path, replicas: int) -> Iterator[Contestant]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command: list[Any] = [sys.executable, HERE / "_servers.py", arm, bundle, str(port)]
    path = "/docs"
    if arm == "mmray":
        command = [sys.executable, "-m", "mmray", "serve", bundle, "--port", str(port)]
        command += ["--replicas", str(replicas)]
        path = "/readyz"
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}{path}", said)
            yield Contestant(arm, psutil.Process(process.pid), port)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, said: Any) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:  # our own server's
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    said.seek(0)
    raise SystemExit(f"no server at {url}:\n{said.read()[-3000:]}")
