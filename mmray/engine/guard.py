"""Preparing rows so that one that crashes, never ends or takes all memory costs itself alone.

Rows are prepared where they are scored, under an alarm: one that takes too long ends its process,
as a crash does. What that process held is run again ``guarded``: there each row is prepared in a
child process, which alone pays, and the row is set aside with what happened to it.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, Protocol

from ray import cloudpickle
from ray._common.utils import get_system_memory
from ray._private.utils import get_num_cpus

from mmray.archive.rows import CRASHED, TOO_LONG, TOO_MUCH_MEMORY, Sample
from mmray.errors import BadRow, RunError
from mmray.preprocess import Prepared, Preprocessor

ROW_SECONDS = 60.0
START_SECONDS = 300.0  # a child imports torch, on a machine that is busy
LEAST_BYTES = 6 << 30  # of a process that scores: the model is in it
CHILD_BYTES = 4 << 30
GiB = 1 << 30

Ready = tuple[list[Sample], list[Prepared | None]]


class Prepares(Protocol):
    """A Preprocessor, or what else may crash on a row. It travels to the child."""

    def prepare(self, sample: Any) -> Any:
        """Something of a Sample, or of what is sent in its place; raises BadRow."""


def limit_memory() -> None:
    """Let this process take no more than its core's share of the machine, so that a row which takes
    more fails here instead of taking others along."""
    share = int(0.8 * get_system_memory() / max(1, get_num_cpus()))
    _limit(max(LEAST_BYTES, share))


def _limit(most: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def prepare_alarmed(preprocessor: Preprocessor, samples: Sequence[Sample], seconds: float) -> Ready:
    """``Preprocessor.prepare_all``; a row that takes more than ``seconds`` ends this process."""

    def each() -> Iterator[Sample]:
        for sample in samples:
            # SIGALRM's default action needs no Python: a decoder may hold its lock for ever.
            signal.setitimer(signal.ITIMER_REAL, seconds)
            yield sample

    try:
        return preprocessor.prepare_all(each())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def alarmed(does: Prepares, sample: Sample, seconds: float) -> Any:
    """What ``does.prepare`` gives or the BadRow that it raises; one that takes more than
    ``seconds`` ends this process."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return does.prepare(sample)
    except BadRow as bad:
        return bad
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Guard:
    """``Preprocessor.prepare_all`` in a child process that may die."""

    def __init__(
        self, preprocessor: Prepares, seconds: float, memory_bytes: int = CHILD_BYTES
    ) -> None:
        self._preprocessor, self._seconds, self._memory = preprocessor, seconds, memory_bytes
        self._child: Any = None
        self._pipe: Connection | None = None

    @property
    def running(self) -> bool:
        """Whether there is a child: not before the first row, and not after one that ended it."""
        return self._child is not None

    def prepare_all(self, samples: Iterable[Sample]) -> Ready:
        left: list[Sample] = []
        prepared: list[Prepared | None] = []
        for sample in samples:
            outcome = self.prepare(sample)
            if isinstance(outcome, BadRow):
                left.append(replace(sample, error=str(outcome), error_stage=outcome.stage))
                prepared.append(None)
            else:
                left.append(sample)
                prepared.append(outcome)
        return left, prepared

    def prepare(self, sample: Sample) -> Any:
        """What is prepared of a sample, or the BadRow it is."""
        (outcome,) = self.outcomes([sample])
        return outcome

    def outcomes(self, samples: Sequence[Any]) -> list[Any]:
        """One a sample, in order, up to the first that ends the child, whose is the last: those
        after it were not tried. All go to the child in one message. Raises RunError where no child
        starts."""
        pipe = self.start()
        found: list[Any] = []
        try:
            pipe.send(samples)
            while len(found) < len(samples) and self.running:
                found.append(self._next(pipe))
        except (EOFError, OSError):
            found.append(BadRow("image", CRASHED, f"its process ended with {self._end()}"))
        return found

    def _next(self, pipe: Connection) -> Any:
        if not pipe.poll(self._seconds):
            self._end(0)
            return BadRow("image", TOO_LONG, f"more than {self._seconds:g} s")
        outcome = pipe.recv()
        if isinstance(outcome, MemoryError):
            self._end(0)  # it lives, and waits for the next
            return BadRow("image", TOO_MUCH_MEMORY, f"over {self._memory / GiB:g} GiB")
        return outcome

    def start(self) -> Connection:
        """Have a child, if there is none. Raises RunError where none comes to that."""
        return self._pipe or self._start()

    def _start(self) -> Connection:
        """A child that has said that it is there."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        asked = theirs, cloudpickle.dumps(self._preprocessor), self._memory  # type: ignore[no-untyped-call]
        self._child = context.Process(target=_serve, args=asked, daemon=True)
        self._child.start()
        theirs.close()
        try:
            if self._pipe.poll(START_SECONDS):
                self._pipe.recv()
                return self._pipe
            why = f"nothing heard of it in {START_SECONDS:.0f} s"
            self._end(0)
        except (EOFError, OSError):
            why = f"it ended with {self._end()}"
        raise RunError(f"a process to decode in did not start: {why}")

    def _end(self, wait_s: float = 1.0) -> str:
        """End the child; what it ended with by itself in ``wait_s``, if it did."""
        self._child.join(wait_s)
        code = self._child.exitcode
        self._child.kill()
        self._child.join()
        assert self._pipe is not None
        self._pipe.close()
        self._pipe = self._child = None
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _serve(pipe: Connection, preprocessor: bytes, memory_bytes: int) -> None:
    """The child: prepares one sample after another, until its parent is gone; each is answered when
    it is done, so that what came of those before one that ends this process is not lost."""
    import torch

    torch.set_num_threads(1)
    prepare = cloudpickle.loads(preprocessor).prepare
    _limit(memory_bytes)
    pipe.send(True)
    while True:
        try:
            samples = pipe.recv()
        except EOFError:
            return
        for sample in samples:
            try:
                pipe.send(prepare(sample))
            except BadRow as error:
                pipe.send(error)
            except MemoryError:
                pipe.send(MemoryError())
