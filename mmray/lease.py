"""One command at a time on a run, of scoring or training: a lease that ends with whoever holds it.

``OUT/_run/lease/<n>.json`` is the lease; the highest ``n`` counts, and taking one is a conditional
put of the next number, so two commands never both win. Its holder writes it again every few
seconds. Whoever finds one held by a process of the same machine looks whether that lives; by
another machine, whether it is still written. No clocks are compared. A holder that for long
could not write, as storage failed, takes the next number like anyone: it goes on unless another was
faster.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from mmray import storage
from mmray.errors import ConfigError, Conflict, NotFound, RunError, StorageError

LEASES = "_run/lease"
RENEW_SECONDS = 10.0
DEAD_SECONDS = 45.0  # without a renewal
TAKEN = "another command has taken over, as this one seemed dead"


class Lease:
    """``with Lease(out, say):`` holds OUT. Raises ConfigError when another command does."""

    def __init__(self, out: str, say: Callable[[str], None]) -> None:
        self._out, self._root, self._say = out, storage.join(out, LEASES), say
        self._me = _identity() | {"id": uuid.uuid4().hex}
        self._number = 0
        self._renewed = time.monotonic()
        self._problem: str | None = None
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._take()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self._problem is None:
            storage.delete(self._uri(self._number))

    def check(self) -> None:
        """Raise RunError when the lease is lost, so that no two commands go on for long.

        One that is overdue is renewed here and now, for as long as storage is asked again.
        """
        self.check_taken()
        if self._overdue():
            with self._writing:
                if self._overdue():  # still, after the other thread's attempt
                    self._reclaim()
            self.check_taken()

    def check_taken(self) -> None:
        """Raise RunError when another command is known to have taken over."""
        if self._problem is not None:
            raise RunError(f"{self._out}: {self._problem}; what is finished is kept")

    # --- taking --------------------------------------------------------------------------------

    def _take(self) -> None:
        while True:
            numbers = self._numbers()
            held = self._read(max(numbers)) if numbers else None
            if held is not None:
                self._wait_for_death(max(numbers), held)
            number = max(numbers, default=0) + 1
            try:
                storage.write_bytes(self._uri(number), self._text(), if_absent=True)
            except Conflict:
                continue  # another was faster: look at that one
            self._hold(number, numbers)
            return

    def _hold(self, number: int, others: list[int]) -> None:
        self._number, self._renewed = number, time.monotonic()
        for old in others:
            storage.delete(self._uri(old))

    def _wait_for_death(self, number: int, held: dict[str, Any]) -> None:
        """Return when the holder is dead or has let go; refuse when it lives."""
        who = f"process {held.get('pid')} on {held.get('host')}, begun {held.get('begun')}"
        if _same_machine(held, self._me):
            if _alive(held):
                raise self._refusal(who)
            return
        self._say(
            f"{self._out} is held by {who}; waiting up to {DEAD_SECONDS:.0f} s for a sign of life"
        )
        seen = time.monotonic()
        while time.monotonic() - seen < DEAD_SECONDS:
            time.sleep(1)
            now = self._read(number)
            if now is None:
                return
            if now != held:
                raise self._refusal(who)

    def _refusal(self, who: str) -> ConfigError:
        return ConfigError(
            f"{self._out}: another command works on it ({who}); wait for it, or end it and run "
            "this again"
        )

    # --- keeping -------------------------------------------------------------------------------

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                with self._writing:
                    if not self._holds():
                        return
                    storage.write_bytes(self._uri(self._number), self._text())
                    self._renewed = time.monotonic()
            except StorageError as error:
                self._say(f"the lease of {self._out} could not be renewed, trying again: {error}")

    def _overdue(self) -> bool:
        return time.monotonic() - self._renewed > DEAD_SECONDS

    def _reclaim(self) -> None:
        """Another may be about to take over, so writing the old number would prove nothing."""
        try:
            if not self._holds():
                return
            storage.write_bytes(self._uri(self._number + 1), self._text(), if_absent=True)
            self._hold(self._number + 1, [self._number])
        except Conflict:
            self._problem = TAKEN
        except StorageError as error:
            raise RunError(
                f"{self._out}: the lease of this command could not be renewed for "
                f"{time.monotonic() - self._renewed:.0f} s ({error}), so another may have begun; "
                "run the same command again"
            ) from error

    def _holds(self) -> bool:
        """Whether none has taken a higher number, nor done so and ended since."""
        if max(self._numbers(), default=0) != self._number:
            self._problem = TAKEN
        return self._problem is None

    def _numbers(self) -> list[int]:
        try:
            found = [item.path for item in storage.list_objects(self._root)]
        except NotFound:
            return []
        return [int(path.removesuffix(".json")) for path in found if path[:-5].isdecimal()]

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            held: dict[str, Any] = json.loads(storage.read_bytes(self._uri(number)))
        except NotFound:
            return None
        return held

    def _uri(self, number: int) -> str:
        return storage.join(self._root, f"{number:06d}.json")

    def _text(self) -> bytes:
        return json.dumps(self._me | {"beat": uuid.uuid4().hex}).encode()


# --- who holds it --------------------------------------------------------------------------------


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _text_of("/proc/sys/kernel/random/boot_id"),
        "pids": _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether process numbers of one mean the same to the other."""
    known = one.get("boot") is not None and one.get("pids") is not None
    return known and all(one.get(name) == other[name] for name in ("host", "boot", "pids"))


def _alive(holder: dict[str, Any]) -> bool:
    return holder.get("started") is not None and _started(holder["pid"]) == holder["started"]


def _started(pid: int) -> str | None:
    """When a process began, in ticks since boot: numbers are used again, this is not."""
    text = _text_of(f"/proc/{pid}/stat")
    return None if text is None else text.rpartition(")")[2].split()[19]


def _text_of(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None
