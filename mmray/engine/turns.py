"""How the processes of a server share cores with the one that computes."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


def wait_for_turns() -> None:
    """Have no thread of this process, nor of its children, stop another the moment it wakes.

    Sockets and pipes wake threads thousands of times a second; each time, a model that computes
    on that core was stopped, and found its caches full of other things after. As Linux's
    SCHED_BATCH they wait until its turn is over, some milliseconds; a core that is free they have
    at once. Elsewhere it does nothing.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    try:
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))
    except OSError as error:  # a sandbox may forbid it; then all goes as it would have gone
        log.info("threads keep their scheduling policy: %s", error)
