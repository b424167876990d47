"""Without these the weights that score would not be the average that was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmray.averaging import Ema, greedy_soup


def test_a_short_run_does_not_average_in_its_start() -> None:
    """With a decay of 0.999 alone, 20 steps would leave 98 % of the random start."""
    model = nn.Linear(3, 3)
    start = model.weight.detach().clone()
    ema = Ema(model, 0.999)
    with torch.no_grad():
        model.weight.copy_(start + 1)
    for step in range(20):
        ema.update(model, step)
    torch.testing.assert_close(ema.model.weight, start + 1, atol=1e-4, rtol=0)
    assert not ema.model.weight.requires_grad


def test_the_decay_is_the_one_asked_for_in_the_long_run() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, 0.9)
    before = float(ema.model.weight)
    with torch.no_grad():
        model.weight.fill_(7.0)
    ema.update(model, 10_000)
    assert float(ema.model.weight) == pytest.approx(0.9 * before + 0.7, abs=1e-5)


def test_batch_norm_statistics_are_averaged_and_its_counter_is_the_newest() -> None:
    model = nn.BatchNorm1d(2)
    ema = Ema(model, 0.5)
    model(torch.full((4, 2), 5.0) + torch.arange(4.0)[:, None])
    ema.update(model, 100)
    torch.testing.assert_close(ema.model.running_mean, model.running_mean / 2)
    assert int(ema.model.num_batches_tracked) == 1


def soup(values: dict[int, float], target: float) -> tuple[list[int], float]:
    """The soup of one-number models, the nearer ``target`` the better."""

    def quality(state: object) -> tuple[float, ...]:
        return (-abs(float(state["w"]) - target),)  # type: ignore[index]

    states = {e: {"w": torch.tensor(v), "n": torch.tensor(e)} for e, v in values.items()}
    order = sorted(values, key=lambda e: quality(states[e]), reverse=True)
    kept, mean = greedy_soup(order, states.__getitem__, quality, quality(states[order[0]]))
    return kept, float(mean["w"])


def test_a_soup_takes_in_what_helps_and_leaves_what_does_not() -> None:
    assert soup({1: 0.0, 2: 2.0, 3: 9.0}, target=1.1) == ([2, 1], 1.0)
    kept, mean = soup({1: 1.0, 2: 4.0, 3: 2.5, 4: 1.5}, target=1.9)
    assert kept == [4, 3] and mean == pytest.approx(2.0)
    assert soup({1: 3.0}, target=0.0) == ([1], 3.0)


def test_a_soup_is_a_plain_mean_of_its_parts() -> None:
    kept, mean = soup({1: 2.0, 2: 5.0, 3: 0.9}, target=3.0)
    assert kept == [1, 2, 3] and mean == pytest.approx((2.0 + 5.0 + 0.9) / 3)
