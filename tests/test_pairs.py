"""Without these a model would be told that true pairs do not belong together, or learn less."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmray import splits
from mmray.archive.rows import Sample
from mmray.config import Data
from mmray.pairs import Kinship, draw_partners, fixed_partners, kinship, shown_captions


def kin(rows: int, seed: int = 0, pools: int = 4) -> Kinship:
    """Many rows share a picture or a caption."""
    rng = np.random.default_rng(seed)
    return Kinship(
        rng.integers(0, rows // 3, rows), rng.integers(0, rows // 2, rows),
        rng.integers(-1, pools, rows),
    )  # fmt: skip


def allowed(of: Kinship, i: int, j: int) -> bool:
    return bool(
        of.pool[i] == of.pool[j] >= 0
        and of.caption[i] != of.caption[j]
        and of.picture[i] != of.picture[j]
    )


@pytest.mark.parametrize("rows", [7, 60, 301])
def test_a_negative_is_never_a_true_pair_and_none_is_missed(rows: int) -> None:
    of = kin(rows, rows)
    partners = fixed_partners(of, seed=3)
    possible = [[allowed(of, i, j) for j in range(rows)] for i in range(rows)]
    assert of.have_partners().tolist() == [any(row) for row in possible]
    for i, partner in enumerate(partners.tolist()):
        assert possible[i][partner] if any(possible[i]) else partner == -1


def test_a_row_whose_only_partner_is_one_of_many_finds_it() -> None:
    captions = np.zeros(500, np.int64)
    captions[123] = 1
    of = Kinship(captions, np.arange(500), np.zeros(500, np.int64))
    partners = fixed_partners(of, seed=0)
    assert (np.delete(partners, 123) == 123).all() and partners[123] != 123
    same = Kinship(np.zeros(500, np.int64), np.arange(500), np.zeros(500, np.int64))
    assert (fixed_partners(same, seed=0) == -1).all() and not same.have_partners().any()


def test_all_partners_are_equally_likely() -> None:
    of = Kinship(np.arange(5), np.arange(5), np.zeros(5, np.int64))
    drawn = [int(draw_partners(of, np.random.default_rng(s), of.pool == 0)[0]) for s in range(800)]
    assert sorted(set(drawn)) == [1, 2, 3, 4]
    assert min(drawn.count(j) for j in range(1, 5)) > 140


def test_half_of_the_captions_of_an_epoch_are_others() -> None:
    of = kin(3000, pools=2)
    shown = shown_captions(of, epoch=0, seed=1)
    own = shown == np.arange(3000)
    have = of.have_partners()
    assert own[~have].all()
    assert 0.46 < own[have].mean() < 0.54
    assert all(allowed(of, i, int(j)) for i, j in enumerate(shown) if i != j)
    # the same for all who ask, another in another epoch or with another seed
    assert np.array_equal(shown, shown_captions(of, epoch=0, seed=1))
    for other in ({"epoch": 1, "seed": 1}, {"epoch": 0, "seed": 2}):
        assert 0.1 < (shown == shown_captions(of, **other)).mean() < 0.6


def test_partners_within_a_step_are_of_that_step() -> None:
    of = kin(400, pools=2)
    steps = np.random.default_rng(0).permutation(400) // 40
    shown = shown_captions(of, epoch=2, seed=0, steps=steps)
    assert (steps[shown] == steps).all()
    others = np.flatnonzero(shown != np.arange(400))
    assert len(others) > 100
    assert all(allowed(of, int(i), int(shown[i])) for i in others)


def test_partners_do_not_depend_on_how_rows_are_coded() -> None:
    """Training and evaluation number captions and pictures each in their own way."""
    of = kin(200)
    rename = np.random.default_rng(1).permutation(1000)
    codes = Kinship(rename[of.caption], rename[of.picture], np.where(of.pool < 0, -1, 9 - of.pool))
    assert np.array_equal(fixed_partners(of, 5), fixed_partners(codes, 5))


def test_kinship_is_of_normalised_captions_and_equal_pictures() -> None:
    rows: list[tuple[Any, ...]] = [
        (b"1", "A red  shirt", "top"),
        (b"2", "@shop a\u200b RED&nbsp;shirt https://x.y/z", "top"),  # the first one's caption
        (b"1", "a blue shirt", "top"),  # the first one's picture
        (b"3", "a green shirt", "top"),
        (b"4", "shoes", "feet"),
        (b"5", "no kind", None),
        (b"", "no picture", "top"),
        (b"6", None, "top"),
    ]
    samples = [
        Sample("a", i, "k", image or None, text, {"kind": kind})
        for i, (image, text, kind) in enumerate(rows)
    ]
    samples.append(Sample("a", 8, "k", error="image truncated: x", fields={"kind": "top"}))
    data = Data(archive="a", negatives_within="kind")
    table = splits.identify(samples, data, "match")
    within = kinship(table, data)
    assert within.have_partners().tolist() == [True, True, True, True, *[False] * 5]
    assert fixed_partners(within, 0)[0] == 3  # neither its caption's nor its picture's other row
    anywhere = kinship(table, data.model_copy(update={"negatives_within": None}))
    assert anywhere.have_partners().tolist() == [True] * 6 + [False] * 3
    assert len(kinship(table.slice(0, 0), data)) == 0
