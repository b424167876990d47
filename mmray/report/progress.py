"""A live line in a terminal, plain lines in a log: done of total, rate, ETA, set aside."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

TERMINAL_SECONDS, LOG_SECONDS = 0.2, 10.0
WIPE = "\r\x1b[2K"
MUCH_DOUBT = 0.05  # of rows decided in float32: from here on that is why a run is slow


class Console:
    """Where a person watches: ``say`` prints a line, ``show`` replaces the live one.

    In a terminal the live line is redrawn in place; elsewhere it is printed now and then.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._shown = 0.0
        self._live = False

    def say(self, line: str) -> None:
        self._stream.write((WIPE if self._live else "") + line + "\n")
        self._stream.flush()
        self._live = False

    def show(self, line: Callable[[], str], *, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._shown < (TERMINAL_SECONDS if self._terminal else LOG_SECONDS):
            return
        self._shown = now
        if self._terminal:
            self._stream.write(WIPE + line())
            self._stream.flush()
            self._live = True
        else:
            self.say(line())

    def end(self) -> None:
        """Leave the live line standing and go to the next."""
        if self._live:
            self._stream.write("\n")
            self._stream.flush()
        self._live = False


def duration(seconds: float) -> str:
    """``75`` -> ``1m15s``; ``40`` -> ``40s``; ``7300`` -> ``2h01m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Tally:
    """A callback for work that counts: ``120 of 300 (40%) shards read  12/s  ETA 15s``; without a
    total, just the count and the rate. The last line is always shown."""

    def __init__(self, console: Console, what: str) -> None:
        self._console, self._what = console, what
        self._started = time.monotonic()
        self._done = 0
        self._total: int | None = None

    def __call__(self, done: int, total: int | None) -> None:
        self._done, self._total = done, total
        self._console.show(self.line)

    def line(self) -> str:
        seconds = time.monotonic() - self._started
        rate = self._done / seconds if seconds else 0.0
        if not self._total:
            return f"{self._done:,} {self._what}  {rate:,.0f}/s"
        eta = duration((self._total - self._done) / rate) if rate else "?"
        return (
            f"{self._done:,} of {self._total:,} ({self._done / self._total:.0%}) {self._what}  "
            f"{rate:,.0f}/s  ETA {eta}"
        )

    def end(self) -> None:
        self._console.show(self.line, force=True)
        self._console.end()


@dataclass
class Meter:
    """Rows and bytes done of a total known in bytes beforehand and in rows only as shards end."""

    total_bytes: int
    total_shards: int
    done_bytes: int = 0
    done_shards: int = 0
    rows: int = 0
    set_aside: int = 0
    decided: int = 0  # rows whose label was in doubt: scored in float32
    resumed_bytes: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)  # seconds of each step to the first rows
    retries: Counter[str] = field(default_factory=Counter)  # S3 requests asked again, by cause
    started: float = field(default_factory=time.monotonic)
    first_rows_s: float | None = None  # seconds after which the first rows came back
    recovery_s: float = 0.0  # of all seconds, those after the first pass: for what lost its worker
    _first: tuple[int, int] = (0, 0)  # what they were: rows, bytes

    def take(self, rows: int, set_aside: int, size: int) -> None:
        """Count rows that came back, of ``size`` bytes of the archive."""
        self.rows += rows
        self.set_aside += set_aside
        self.done_bytes += size
        if self.first_rows_s is None:
            self.first_rows_s, self._first = self.seconds, (self.rows, self.fresh_bytes)

    def spend(self, stage: str, seconds: float) -> None:
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    def step(self, name: str) -> None:
        """All that is not in a step of the start yet was this one."""
        self.start[name] = self.seconds - sum(self.start.values())

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def fresh_bytes(self) -> int:
        return self.done_bytes - self.resumed_bytes

    @property
    def rate(self) -> float:
        """Rows a second since the first rows came back: what a longer run would do."""
        return self._per_second(self.rows, self._first[0])

    def _per_second(self, now: int, first: int) -> float:
        if not self._settled(now, first):  # too early to tell them from the start
            return now / self.seconds if self.seconds else 0.0
        return (now - first) / (self.seconds - (self.first_rows_s or 0.0))

    def _settled(self, now: int, first: int) -> bool:
        """Whether so much was done since the first rows that it says how fast the rest will be."""
        since = self.first_rows_s
        return since is not None and self.seconds - since >= 1 and now > first

    def line(self) -> str:
        share = self.done_bytes / self.total_bytes if self.total_bytes else 1.0
        fresh = self.fresh_bytes
        left = self.total_bytes - self.done_bytes
        speed = self._per_second(fresh, self._first[1])
        # What starting took, spread over the first rows, would make hours of minutes.
        told = speed and (self._settled(fresh, self._first[1]) or not left)
        eta = duration(left / speed) if told else "?"
        known = self.rows and fresh > 0
        estimate = f"~{round(self.rows * (left + fresh) / fresh):,}" if known else "?"
        return (
            f"{share:4.0%}  rows {self.rows:,} of {estimate}  "
            f"shards {self.done_shards:,}/{self.total_shards:,}  {self.rate:,.0f} rows/s  "
            f"ETA {eta}  set aside {self.set_aside:,}{self._doubt()}{self._bottleneck()}"
        )

    def _doubt(self) -> str:
        """What makes an archive slow on which the model can hardly decide."""
        share = self.decided / self.rows if self.rows else 0.0
        return f"  in float32 {share:.0%}" if share > MUCH_DOUBT else ""

    def _bottleneck(self) -> str:
        total = sum(self.stages.values())
        if not total:
            return ""
        stage, seconds = max(self.stages.items(), key=lambda item: item[1])
        return f"  mostly {stage} ({seconds / total:.0%})"
