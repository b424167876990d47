"""Averages of weights, which often score better than the last ones: over steps, or over epochs.

A state is what a module's ``state_dict`` gives: name -> tensor. Weights and batch-norm statistics
are averaged; counters (integers) are taken from the newest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]
Quality = TypeVar("Quality", bound=tuple[float, ...])


class Ema:
    """Exponential moving average of a module's weights over steps, in ``model``, a copy of it.

    The decay rises as ``(1 + step) / (10 + step)`` to its full value, so that a short run does not
    average in where it started from (as TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights of ``model`` after step ``step`` (0-based)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        kept, now = self.model.state_dict(), model.state_dict()
        floats = [name for name, tensor in kept.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([kept[n] for n in floats], [now[n] for n in floats], weight)
        for name in kept.keys() - set(floats):
            kept[name].copy_(now[name])


def greedy_soup(
    order: Sequence[int],
    load: Callable[[int], State],
    quality: Callable[[State], Quality],
    least: Quality,
) -> tuple[list[int], State]:
    """The greedy soup (Wortsman et al. 2022, arXiv:2203.05482, recipe 1) of candidates ``order``,
    the best first: each is kept whose mean with those kept before is no worse on held-out rows.

    ``load`` gives a candidate's state, ``quality`` what one scores, higher is better; ``least`` is
    the quality of the first. Gives the candidates kept and their mean.
    """
    kept, soup = [order[0]], load(order[0])
    best = least
    for candidate in order[1:]:
        state = load(candidate)
        tried = {
            name: torch.lerp(tensor, state[name], 1 / (len(kept) + 1))
            if tensor.is_floating_point()
            else tensor
            for name, tensor in soup.items()
        }
        found = quality(tried)
        if found >= best:
            kept, soup, best = [*kept, candidate], tried, found
    return kept, soup
