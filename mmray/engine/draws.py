"""The random numbers of a training step: others in every step, the same when it is run again."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmray import augment, learn

DROPOUT, AUGMENT, DROP_MODALITIES = 0, 1, 2  # a step's streams


class Draws:
    """Those of one rank. ``number`` is the step's, over all epochs; ``own`` of its ``total`` rows
    are this rank's, or none, and one stands in."""

    def __init__(self, seed: int, rank: int, world: int) -> None:
        self._seed, self._rank, self._world = seed, rank, world

    def begin(self, number: int) -> None:
        """Seed torch, for dropout: it differs between ranks."""
        step = number * self._world + self._rank
        torch.manual_seed(learn.mixed(self._seed, DROPOUT, step))

    def changes(self, number: int, own: int, total: int) -> Tensor:
        """Of ``augment``, for this rank's rows."""
        drawn = augment.draw(total, learn.mixed(self._seed, AUGMENT, number))
        return self._share(drawn, own)

    def drops(self, number: int, own: int, total: int) -> Tensor:
        """Of ``learn.drop_modalities``, for this rank's rows."""
        seed = learn.mixed(self._seed, DROP_MODALITIES, number)
        drawn = torch.rand(total, 2, generator=torch.Generator().manual_seed(seed))
        return self._share(drawn, own)

    def _share(self, drawn: Tensor, own: int) -> Tensor:
        """Drawn for all rows of a step, so that what becomes of a row does not depend on the number
        of workers."""
        at = np.array_split(np.arange(len(drawn)), self._world)[self._rank]
        return drawn[at] if own else drawn[:1]
