"""Where remote work says how far it is, and the driver says stop.

A worker's prints reach the driver late, prefixed, or not at all; an actor reaches it always.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import ray

POLL_SECONDS = 0.5
COUNT_SECONDS = 10.0
T = TypeVar("T")


class _Board:
    """Lines to show, rows counted, and whether the driver wants an end."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._rows = 0
        self._stop = False

    def post(self, line: str | None = None) -> bool:
        """Add a line; whether to stop."""
        if line is not None:
            self._lines.append(line)
        return self._stop

    def add(self, rows: int) -> None:
        self._rows += rows

    def take(self) -> tuple[list[str], int]:
        """The lines since the last call, and all rows so far."""
        lines, self._lines = self._lines, []
        return lines, self._rows

    def stop(self) -> None:
        self._stop = True


class Board:
    """The driver's end of the board. ``actor`` is what workers are given; what ``watch`` raises
    ends the waiting for them."""

    def __init__(
        self, progress: Callable[[str], None], watch: Callable[[], None] = lambda: None
    ) -> None:
        self.actor: Any = ray.remote(num_cpus=0)(_Board).remote()
        self._progress, self._watch = progress, watch
        self._counted: Callable[[int], str] | None = None
        self._last = 0.0

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        ray.kill(self.actor)

    def attend(
        self,
        job: Callable[[], T],
        *,
        on_stop: str | None = None,
        counted: Callable[[int], str] | None = None,
    ) -> T:
        """Run ``job`` in a thread and show what is posted until it ends; ``counted`` words the
        number of rows so far, now and then.

        With ``on_stop``, Ctrl-C or SIGTERM says that line and asks the workers to stop: the job
        then ends by itself; a second one leaves it alone and goes. In a thread, because Ray Train
        takes SIGINT for itself in the main one and exits with code 0.
        """
        done: list[T] = []
        failed: list[BaseException] = []
        # Python 3.11 takes a thread for dead whose join() was interrupted (cpython#90882).
        ended = threading.Event()

        def run() -> None:
            try:
                done.append(job())
            except BaseException as error:  # noqa: BLE001  # raised again below, by the driver
                failed.append(error)
            finally:
                ended.set()

        threading.Thread(target=run, daemon=True).start()
        asked = False
        self._counted, self._last = counted, time.monotonic()
        with sigterm_as_ctrl_c() if on_stop else contextlib.nullcontext():
            while not ended.is_set():
                try:
                    ended.wait(POLL_SECONDS)
                    self._show()
                    self._watch()
                except KeyboardInterrupt:
                    if asked or on_stop is None:
                        raise
                    asked = True
                    self._progress(on_stop)
                    ray.get(self.actor.stop.remote())
        self._show()
        if failed:
            raise failed[0]
        return done[0]

    def _show(self) -> None:
        lines, rows = ray.get(self.actor.take.remote())
        for line in lines:
            self._progress(line)
        if self._counted is not None and time.monotonic() - self._last >= COUNT_SECONDS:
            self._last = time.monotonic()
            self._progress(self._counted(rows))


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM, by which `ray job stop` and a machine that is shut down end a command, raises
    KeyboardInterrupt. Python takes signals in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Voice:
    """A worker's end of the board: a line now and then, and whether to stop, without waiting."""

    def __init__(self, actor: Any, seconds: float) -> None:
        self._actor, self._seconds = actor, seconds
        self._last = time.monotonic()
        self._answers: list[Any] = []
        self._stop = False

    @property
    def due(self) -> bool:
        """Whether it is time for another line."""
        return time.monotonic() - self._last >= self._seconds

    def say(self, line: str | None = None) -> None:
        self._last = time.monotonic()
        self._answers.append(self._actor.post.remote(line))

    def stopped(self) -> bool:
        """Whether the driver wants an end, as far as it is known here; asks again."""
        ready, self._answers = ray.wait(
            self._answers or [self._actor.post.remote()], num_returns=1, timeout=0
        )
        self._stop = self._stop or any(ray.get(ready))
        return self._stop

    def flush(self) -> None:
        """Wait until everything said has arrived."""
        ray.get(self._answers)
        self._answers = []
