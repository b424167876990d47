"""What a model is worth on the dev rows, counted by all workers together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmray import learn
from mmray.config import TrainConfig
from mmray.counts import AnswerCounts
from mmray.engine.feed import Feed
from mmray.engine.frozen import FeatureRows
from mmray.engine.windows import Ints
from mmray.objective import Objective

EVAL_ROWS = 64  # a forward pass


class Dev:
    """The dev rows. ``others``: for ``match``, int64 [N], the row whose caption makes each row's
    negative, -1 where there is none."""

    def __init__(
        self,
        rows: FeatureRows,
        feed: Feed,
        cfg: TrainConfig,
        labels: tuple[str, ...],
        objective: Objective,
        others: Ints | None,
    ) -> None:
        self._rows, self._feed, self._cfg = rows, feed, cfg
        self._labels, self._objective, self._others = labels, objective, others

    def report(self, model: nn.Module, epoch: int, device: torch.device) -> dict[str, Any]:
        """The report over all rows, each counted once, the same on every rank; all must come here.
        ``epoch``: the last that was trained, 0-based."""
        if self._feed.world > 1:
            for buffer in model.buffers():  # batch-norm statistics drift apart between ranks
                dist.broadcast(buffer, 0)
        counts = AnswerCounts(self._labels, self._cfg.task)
        found = learn.evaluate_batches(
            model,
            self._batches(epoch),
            counts,
            objective=self._objective,
            precision=self._cfg.train.precision,
            device=device,
        )
        vector = torch.from_numpy(counts.vector()).to(device)
        loss = torch.tensor([found.loss_sum], dtype=torch.float64, device=device)
        counts.load(summed(vector).cpu().numpy())
        return {**counts.report(), "loss": float(summed(loss)) / max(1, counts.rows)}

    def _batches(self, epoch: int) -> Iterator[learn.Batch]:
        """This rank's share; for ``match`` every row with its own caption, then with another's."""
        for at in self._feed.shares(2 * epoch + 1, EVAL_ROWS):
            if self._others is None:
                yield self._rows.batch(at)
                continue
            yield self._rows.batch(at, at)
            have = at[self._others[at] >= 0]
            if len(have):
                yield self._rows.batch(have, self._others[have])


def summed(tensor: Tensor) -> Tensor:
    """``tensor`` summed over ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
