"""What a training worker says of itself: lines for the driver, curves for the journal."""

from __future__ import annotations

import time
from typing import Any

from mmray.config import TrainConfig
from mmray.engine.board import Voice
from mmray.engine.checkpoint import State
from mmray.report.journal import Journal
from mmray.report.progress import duration

LOGGED_STEPS = 2000  # of a run, at most about


class Teller:
    """Counts a sitting's rows and seconds. Rank 0 has a journal and speaks, the others are silent.

    ``steps`` and ``rows``: of an epoch.
    """

    def __init__(
        self, voice: Voice, journal: Journal | None, cfg: TrainConfig, *, steps: int, rows: int
    ) -> None:
        self._voice, self._journal, self._cfg = voice, journal, cfg.train
        # By which the best epoch is chosen: see ``counts.quality``.
        self._figure = (
            ("AUROC", "dev_auroc") if cfg.task == "match" else ("macro-F1", "dev_macro_f1")
        )
        self._steps, self._rows = steps, rows
        self._began = time.monotonic()
        self.taken = 0  # rows, over all workers
        self.waited = 0.0  # seconds for rows

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def line(self, line: str) -> None:
        if self._journal is not None:
            self._voice.say(line)

    def progress(self, state: State) -> None:
        """The live line, when it is time for it."""
        if self._journal is None or not self._voice.due:
            return
        rate = self.taken / self.seconds
        left = (self._cfg.epochs - state.epoch) * self._rows - state.rows
        name, key = self._figure
        dev = f"dev {name} {_figure(state.epochs[-1][key])}  " if state.epochs else ""
        self.line(
            f"epoch {state.epoch + 1}/{self._cfg.epochs}  step {state.step}/{self._steps}  "
            f"loss {state.loss_sum / state.rows:.4f}  {dev}{rate:,.0f} rows/s  "
            f"waiting for data {self.waited / self.seconds:.0%}  "
            f"ETA {duration(left / rate)}"
        )

    def step(self, number: int, loss: float, lr: float, grad_norm: Any) -> None:
        """A step's curves, now and then; ``number`` counts over all epochs."""
        every = max(1, self._cfg.epochs * self._steps // LOGGED_STEPS)
        if self._journal is None or number % every:
            return
        values = {
            "train/loss": loss,
            "train/lr": lr,
            "train/grad_norm": float(grad_norm),
            "train/rows_per_s": self.taken / self.seconds,
            "train/data_wait_share": self.waited / self.seconds,
        }
        self._journal.log(number, values)

    def epoch(self, number: int, seen: dict[str, Any], *, better: bool) -> None:
        """What was measured after an epoch, whose last step was ``number``."""
        self.line(
            f"epoch {seen['epoch']}/{self._cfg.epochs}  loss {seen['loss']:.4f}  "
            f"dev loss {seen['dev_loss']:.4f}  dev accuracy {seen['dev_accuracy']:.4f}  "
            f"dev macro-F1 {seen['dev_macro_f1']:.4f}  dev AUROC {_figure(seen['dev_auroc'])}"
            f"{'  best so far' if better else ''}"
        )
        if self._journal is not None:
            dev = {n: v for n, v in seen.items() if n.startswith("dev_") and v is not None}
            self._journal.log(number, {name.replace("_", "/", 1): v for name, v in dev.items()})
            self._journal.flush()

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
        self._voice.flush()


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
