"""One sitting of a training, by a driver of its own that can be killed with all it started.

    python tests/sitting.py CONFIG.json FOLDER [EPOCH STEP]

FOLDER gets what ``stage.recorded`` writes and, at the end, ``result.json``: the measured losses and
the lines. With EPOCH and STEP (both 0-based) every step leaves a checkpoint, and at this one
workers wait for their end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stage

from mmray.config import TrainConfig
from mmray.engine import loop
from mmray.engine import train as engine


class Recorded:
    """``loop.train_loop`` for workers, which leaves a record and may wait for its end."""

    def __init__(self, folder: str, end: Sequence[int]) -> None:
        self.folder, self.end = Path(folder), tuple(end)

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        step = loop._Worker._step

        def watched(worker: Any, *arguments: Any) -> Any:
            if (worker.state.epoch, worker.state.step) == self.end:
                time.sleep(600)
            return step(worker, *arguments)

        loop._Worker._step = watched  # type: ignore[method-assign]
        with stage.recorded(self.folder):
            return train_loop(config)


train_loop = loop.train_loop


def main(config: str, folder: str, *end: str) -> None:
    loop.train_loop = Recorded(folder, [int(number) for number in end])  # type: ignore[assignment]
    if end:
        engine.SAVE_SECONDS = -1.0
    lines: list[str] = []
    done = engine.train(TrainConfig.model_validate_json(config), progress=lines.append)
    losses = [epoch[name] for epoch in done.metrics["epochs"] for name in ("loss", "dev_loss")]
    Path(folder, "result.json").write_text(json.dumps({"losses": losses, "lines": lines}))


# --- killing all of it ---------------------------------------------------------------------------


def kill_session(session: int) -> None:
    """SIGKILL for every process of a session, until none is left: a machine that loses power."""
    while left := [pid for pid in _processes() if _session(pid) == session]:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _session(pid: int) -> int | None:
    """The session of a process; None for one that is gone, or has ended and is not waited for."""
    try:
        state, _, _, session, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(session)


if __name__ == "__main__":
    main(*sys.argv[1:])
