"""What training minimises: the loss of each task, and how labels and rows weigh in it.

Shapes: B rows, C labels, S sets of labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mmray.config import Task, Train
from mmray.counts import THRESHOLD


@dataclass(frozen=True, slots=True)
class Objective:
    """A task's loss. By default plain cross-entropy.

    ``weights``: float32 [C], of each class; for multilabel what a row that has the label weighs
    over one that has not. ``label_smoothing``: share of the target spread over all classes;
    ``focal_gamma``: Lin et al. 2017, arXiv:1708.02002, equation 4. ``sets``: float32 [S, C], 1
    for the labels in each set, for multilabel.
    """

    weights: Tensor | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    sets: Tensor | None = None

    def to(self, device: torch.device | str) -> Objective:
        """The same on ``device``."""
        weights, sets = (None if t is None else t.to(device) for t in (self.weights, self.sets))
        return replace(self, weights=weights, sets=sets)

    def plain(self) -> Objective:
        """The same task's loss without weights, smoothing and focus: what is measured."""
        return Objective(sets=self.sets)

    def loss_sum(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """The loss summed over rows, float32 []; weighted rows count with their weight.

        ``labels``: int64 [B], class indices, or for multilabel rows of ``sets``. Summed, not
        normalised by the batch's weights: the mean over all workers' rows is then the same however
        the rows are spread.
        """
        if self.sets is not None:
            return self._binary(logits_BC, self.sets[labels_B])
        if not self.focal_gamma:
            return self._cross_entropy(logits_BC, labels_B, "sum")
        missing_B = 1 - logits_BC.softmax(1).gather(1, labels_B[:, None])[:, 0]
        loss_B = self._cross_entropy(logits_BC, labels_B, "none")
        return (_power(missing_B, self.focal_gamma) * loss_B).sum()

    def correct(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """How many rows are answered right, all labels of a set together: int64 []."""
        if self.sets is None:
            return (logits_BC.argmax(1) == labels_B).sum()
        given_BC = logits_BC.sigmoid() >= THRESHOLD
        return (given_BC == self.sets[labels_B].bool()).all(1).sum()

    def probabilities(self, logits_BC: Tensor) -> Tensor:
        """[B, C] in [0, 1]."""
        return probabilities(logits_BC, several=self.sets is not None)

    def truth(self, labels_B: Tensor) -> npt.NDArray[np.int64]:
        """What ``AnswerCounts.add`` takes: class indices [B], or 0 and 1 [B, C]."""
        found = labels_B if self.sets is None else self.sets[labels_B].long()
        truth: npt.NDArray[np.int64] = found.cpu().numpy()
        return truth

    def _cross_entropy(self, logits_BC: Tensor, labels_B: Tensor, reduction: str) -> Tensor:
        return F.cross_entropy(
            logits_BC,
            labels_B,
            self.weights,
            label_smoothing=self.label_smoothing,
            reduction=reduction,
        )

    def _binary(self, logits_BC: Tensor, has_BC: Tensor) -> Tensor:
        """Binary cross-entropy of every label, the mean over labels, summed over rows."""
        smooth_BC = has_BC * (1 - self.label_smoothing) + self.label_smoothing / 2
        loss_BC = F.binary_cross_entropy_with_logits(
            logits_BC, smooth_BC, pos_weight=self.weights, reduction="none"
        )
        if self.focal_gamma:
            p_BC = logits_BC.sigmoid()
            missing_BC = has_BC * (1 - p_BC) + (1 - has_BC) * p_BC
            loss_BC = _power(missing_BC, self.focal_gamma) * loss_BC
        return loss_BC.mean(1).sum()


def _power(missing: Tensor, gamma: float) -> Tensor:
    """``missing ** gamma`` with a finite slope at 0, which an exponent below 1 has not."""
    return missing.clamp(min=1e-6) ** gamma


def probabilities(logits_BC: Tensor, *, several: bool) -> Tensor:
    """[B, C]: of each label by itself where a row may have ``several``, else rows sum to 1."""
    return logits_BC.sigmoid() if several else logits_BC.softmax(dim=1)


def make_objective(
    cfg: Train, task: Task, counts: Sequence[int], sets: npt.NDArray[np.bool_] | None = None
) -> Objective:
    """What ``cfg`` says. ``counts``: training rows of each class, or for multilabel of each of
    ``sets`` (bool [S, C])."""
    assert (sets is not None) == (task == "multilabel")
    sets_SC = None if sets is None else torch.from_numpy(sets).float()
    return Objective(
        weights=class_weights(counts, cfg, sets_SC),
        label_smoothing=cfg.label_smoothing,
        focal_gamma=cfg.focal_gamma,
        sets=sets_SC,
    )


def class_weights(
    counts: Sequence[int], cfg: Train, sets_SC: Tensor | None = None
) -> Tensor | None:
    """Weight of each class in the loss, float32 [C], from its rows in the training split.

    ``balanced``: rows / (classes that occur * rows of the class), so that a row weighs 1 on
    average; a class without rows weighs 0. Of ``sets``: rows without the label / rows that have
    it, 1 where there are none. None when all weigh the same.
    """
    if cfg.class_weights == "none":
        return None
    rows = torch.tensor(counts, dtype=torch.float32)
    if sets_SC is not None:
        having_C = rows @ sets_SC
        weights_C = (rows.sum() - having_C) / having_C.clamp(min=1)
        return torch.where(having_C > 0, weights_C, torch.ones_like(weights_C))
    occurs_C = rows > 0
    return rows.sum() / (occurs_C.sum() * rows.clamp(min=1)) * occurs_C
