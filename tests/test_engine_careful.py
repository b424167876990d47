"""Pictures that crash, stall or starve their decoder: training must end all the same."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from ray import cloudpickle
from test_engine_train import config

from mmray import bundle as bundles
from mmray.archive.rows import Sample
from mmray.engine import evaluate, guard, prepared, scan
from mmray.engine import train as engine
from mmray.engine.careful import Careful
from mmray.engine.evaluator import Evaluator
from mmray.preprocess import Preprocessor

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module

CRASHES, STALLS, STARVES = "00007", "00010", "00013"  # rows of the first shard; the second is a dev


def harm(sample: Sample) -> None:
    if sample.key == CRASHES:
        os.kill(os.getpid(), signal.SIGSEGV)
    while sample.key == STALLS:
        time.sleep(1)
    if sample.key == STARVES:
        guard._limit(5 << 30)
    held = []
    while sample.key == STARVES:
        held.append(bytes(64 << 20))


class HarmedPreprocessor(Preprocessor):
    def prepare(self, sample: Sample) -> Any:
        harm(sample)
        return super().prepare(sample)


class HarmedRecipe(prepared.Recipe):
    def build(self) -> Preprocessor:
        made = super().build()
        made.__class__ = HarmedPreprocessor
        return made


class HarmedEvaluator(Evaluator):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._predictor.preprocessor.__class__ = HarmedPreprocessor


class HarmedHashes(scan.Hashes):
    def prepare(self, sample: Sample) -> bytes | None:
        harm(sample)
        return None


def test_they_are_set_aside_with_their_reasons_and_all_others_are_learned_from(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tiny.write_archive(tmp_path / "archive", [20, 16])
    monkeypatch.setattr(engine, "Recipe", HarmedRecipe)
    monkeypatch.setattr(scan, "Hashes", HarmedHashes)
    for module in (scan, prepared, evaluate):
        monkeypatch.setattr(module, "Careful", functools.partial(Careful, seconds=3.0))
    lines: list[str] = []
    cfg = config(archive, tmp_path / "out", train__epochs=1, train__num_workers=1)
    done = engine.train(cfg, progress=lines.append)
    notes = {line.strip() for line in lines if "set aside" in line}
    assert notes == {
        "note: set aside, decode crashed: 1 rows",
        "note: set aside, decode took too long: 1 rows",
        "note: set aside, decode took too much memory: 1 rows",
    }
    report = bundles.load(done.bundle).training.split
    assert sum(report["set_aside"].values()) == 3
    assert (report["train_rows"], report["dev_rows"]) == (28, 8)
    assert done.metrics["dev"]["rows"] == 7

    monkeypatch.setattr(evaluate, "Evaluator", HarmedEvaluator)
    metrics = evaluate.evaluate(
        done.bundle,
        str(archive),
        out=str(tmp_path / "metrics"),
        split="all",
        progress=lambda _: None,
    )
    assert metrics["rows"] == 33
    assert metrics["set_aside"] == {
        "decode crashed": 1,
        "decode took too long": 1,
        "decode took too much memory": 1,
    }
