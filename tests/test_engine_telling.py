"""What a person sees of a training while it runs."""

from __future__ import annotations

from typing import Any

import pytest

from mmray.config import TrainConfig, validate
from mmray.engine import telling
from mmray.engine.checkpoint import State
from mmray.report.journal import Journal


class FakeVoice:
    due = True

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        return None


SEEN = {
    "epoch": 2,
    "loss": 0.75,
    "dev_loss": 0.8,
    "dev_accuracy": 0.7,
    "dev_macro_f1": 0.625,
    "dev_auroc": 0.875,
}


def told(
    monkeypatch: pytest.MonkeyPatch, task: str, *, ranked: bool = True
) -> tuple[telling.Teller, FakeVoice]:
    """A teller 20 s after its start, of epochs of 10 steps and 1,000 rows."""
    now = iter([100.0])
    monkeypatch.setattr(telling.time, "monotonic", lambda: next(now, 120.0))
    tree = {"data": {"archive": "a"}, "out": "o", "task": task, "train": {"epochs": 4}}
    voice: Any = FakeVoice()
    journal = Journal(None, None, first_step=0, say=voice.say) if ranked else None
    cfg = validate(TrainConfig, tree, "test")
    return telling.Teller(voice, journal, cfg, steps=10, rows=1000), voice


@pytest.mark.parametrize(
    ("task", "figure"), [("classify", "macro-F1 0.6250"), ("match", "AUROC 0.8750")]
)
def test_the_live_line_has_loss_figure_rate_and_time_left(
    task: str, figure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figure is the one that chooses the epoch; time left counts all that is to come."""
    teller, voice = told(monkeypatch, task)
    teller.taken, teller.waited = 2000, 5.0
    state = State(epoch=2, step=4, loss_sum=200.0, rows=400, epochs=[SEEN, SEEN])
    teller.progress(state)
    (line,) = voice.lines
    assert line == (
        f"epoch 3/4  step 4/10  loss 0.5000  dev {figure}  100 rows/s  "
        "waiting for data 25%  ETA 16s"
    )
    teller.progress(State(epoch=0, step=4, loss_sum=200.0, rows=400))
    assert "dev" not in voice.lines[1] and voice.lines[1].endswith("ETA 36s")
    voice.due = False
    teller.progress(state)
    assert len(voice.lines) == 2


def test_an_epoch_without_an_auroc_is_told_and_only_the_first_worker_speaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teller, voice = told(monkeypatch, "match")
    teller.epoch(9, SEEN | {"dev_auroc": None}, better=True)
    assert voice.lines[0].endswith("dev macro-F1 0.6250  dev AUROC none  best so far")
    silent, voice = told(monkeypatch, "match", ranked=False)
    silent.epoch(9, SEEN, better=True)
    silent.progress(State(epoch=1, step=1, loss_sum=1.0, rows=1, epochs=[SEEN]))
    assert not voice.lines
