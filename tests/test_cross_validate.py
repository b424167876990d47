"""Figures by which one decides whether pictures are worth their cost."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from mmray.archive.shards import list_shards
from mmray.metrics import Confusion

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cross_validate


def test_another_question_never_gets_the_answers_of_one_before(tmp_path: Path) -> None:
    """Another archive, label, number of folds, config or --set; the same again goes on."""
    config = tmp_path / "config.yaml"
    config.write_text("train: {epochs: 1}")
    archive = tiny.write_archive(tmp_path / "archive", [3])

    def asked(**keys: object) -> tuple[Path, Path]:
        told = {"label": "label", "folds": 5, "config": str(config), "sets": ["seed=1"]} | keys
        shards = list(list_shards(str(archive)))
        return cross_validate.places(tmp_path, shards, argparse.Namespace(**told))

    first = asked()
    assert asked() == first
    others = [asked(sets=["seed=2"]), asked(label="cls"), asked(folds=4)]
    config.write_text("train: {epochs: 2}")
    others.append(asked())
    tiny.write_archive(archive, [4])
    others.append(asked())
    assert len({place for _, place in [first, *others]}) == 6
    # Folds are dealt once for all configs, so that their rows are the same.
    assert len({folds for folds, _ in [first, *others]}) == 4


def test_differences_are_those_of_the_reports_and_groups_widen_their_intervals() -> None:
    """An interval that takes ten copies of a row for ten rows would find differences that are
    noise."""
    random = np.random.default_rng(0)
    names = np.array(["calm", "wild", "odd"])
    true = random.choice(3, 400, p=[0.6, 0.3, 0.1])
    better = np.where(random.random(400) < 0.8, true, random.choice(3, 400))
    worse = np.where(random.random(400) < 0.5, true, random.choice(3, 400))

    def answers(given: np.ndarray, copies: int) -> cross_validate.Answers:
        pairs = list(zip(names[true].tolist(), names[given].tolist(), strict=True))
        return dict(enumerate(pair for pair in pairs for _ in range(copies)))

    one = {"both": answers(better, 1), "text": answers(worse, 1)}
    del one["text"][7]  # a row that a model cannot read is no difference
    found = cross_validate.differences(one, np.arange(400))["text"]
    assert found["rows"] == 399
    kept = np.arange(400) != 7
    reports = []
    for given in (better, worse):
        confusion = Confusion(names.tolist())
        confusion.add(true[kept], given[kept])
        reports.append(confusion.report())
    for name in ("accuracy", "macro_f1"):
        low, high = found[name]["interval"]
        difference = reports[0][name] - reports[1][name]
        assert found[name]["difference"] == pytest.approx(difference)
        assert 0 < low < difference < high < 0.5

    ten = {"both": answers(better, 10), "text": answers(worse, 10)}
    grouped = cross_validate.differences(ten, np.repeat(np.arange(400), 10))["text"]
    alone = cross_validate.differences(ten, np.arange(4000))["text"]
    for name in ("accuracy", "macro_f1"):
        wide, narrow = (np.diff(of[name]["interval"])[0] for of in (grouped, alone))
        assert wide == pytest.approx(np.diff(found[name]["interval"])[0], rel=0.1)
        assert wide > 2.5 * narrow


def test_reports_count_every_answer() -> None:
    report = cross_validate.report({0: ("a", "a"), 5: ("a", "b"), 6: ("b", "b")})
    assert (report["rows"], report["confusion"]) == (3, [[1, 1], [0, 1]])
