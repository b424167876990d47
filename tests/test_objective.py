"""Without these training would minimise something else than the config says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmray.config import Train
from mmray.objective import Objective, class_weights, make_objective

SETS = np.array([[0, 0, 0], [1, 0, 1], [0, 1, 0]], dtype=bool)


def logits(rows: int = 6, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 1, 1, 2, 0, 1])


def test_balanced_weights_make_a_row_weigh_1_and_spare_absent_classes() -> None:
    assert class_weights([10, 30], Train()) is None
    weights = class_weights([10, 30, 0], Train(class_weights="balanced"))
    assert weights is not None
    assert weights.tolist() == pytest.approx([2.0, 2 / 3, 0.0])
    total = Objective(weights=weights).loss_sum(logits(), LABELS)
    rows = F.cross_entropy(logits(), LABELS, reduction="none")
    assert float(total) == pytest.approx(float((rows * weights[LABELS]).sum()), rel=1e-5)


def test_balanced_labels_weigh_as_much_as_their_absence() -> None:
    cfg = Train(class_weights="balanced")
    made = make_objective(cfg, "multilabel", [5, 3, 0], SETS)
    assert made.weights is not None
    assert made.weights.tolist() == pytest.approx([5 / 3, 1.0, 5 / 3])
    has = torch.from_numpy(SETS).float()[LABELS]
    want = F.binary_cross_entropy_with_logits(
        logits(), has, pos_weight=made.weights, reduction="none"
    )
    assert float(made.loss_sum(logits(), LABELS)) == pytest.approx(float(want.mean(1).sum()))
    assert make_objective(Train(), "multilabel", [5, 3, 0], SETS).weights is None


def test_label_smoothing_is_torchs() -> None:
    want = F.cross_entropy(logits(), LABELS, label_smoothing=0.1, reduction="sum")
    assert float(Objective(label_smoothing=0.1).loss_sum(logits(), LABELS)) == pytest.approx(
        float(want)
    )
    has = torch.from_numpy(SETS).float()
    made = Objective(label_smoothing=0.2, sets=has)
    want = F.binary_cross_entropy_with_logits(logits(), 0.1 + 0.8 * has[LABELS], reduction="none")
    assert float(made.loss_sum(logits(), LABELS)) == pytest.approx(float(want.mean(1).sum()))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_is_lins(gamma: float) -> None:
    """Equation 4: -(1 - p_t)^gamma log p_t; for several labels each by itself."""
    p = logits().softmax(1).gather(1, LABELS[:, None])[:, 0]
    want = -((1 - p) ** gamma * p.log()).sum()
    assert float(Objective(focal_gamma=gamma).loss_sum(logits(), LABELS)) == pytest.approx(
        float(want), rel=1e-4
    )
    has = torch.from_numpy(SETS)
    p_t = torch.where(has[LABELS], logits().sigmoid(), 1 - logits().sigmoid())
    want = -((1 - p_t) ** gamma * p_t.log()).mean(1).sum()
    got = Objective(focal_gamma=gamma, sets=has.float()).loss_sum(logits(), LABELS)
    assert float(got) == pytest.approx(float(want), rel=1e-4)


def test_focal_loss_turns_to_the_doubtful_rows() -> None:
    rows = torch.tensor([[4.0, 0.0, 0.0], [0.2, 0.0, 0.0]])
    labels = torch.zeros(2, dtype=torch.int64)

    def share(gamma: float) -> float:
        made = Objective(focal_gamma=gamma)
        sure, doubtful = (float(made.loss_sum(rows[i : i + 1], labels[:1])) for i in (0, 1))
        return sure / doubtful

    assert share(2.0) < 0.1 * share(0.0)


def test_a_row_that_is_quite_sure_has_a_finite_gradient() -> None:
    for sets in (None, torch.eye(2)):
        sure = torch.tensor([[100.0, -100.0]], requires_grad=True)
        made = Objective(focal_gamma=0.5, sets=sets)
        made.loss_sum(sure, torch.tensor([0])).backward()
        assert sure.grad is not None and bool(sure.grad.isfinite().all())


@pytest.mark.parametrize("sets", [None, torch.from_numpy(SETS).float()])
def test_rows_add_up_however_they_are_spread(sets: torch.Tensor | None) -> None:
    made = Objective(torch.tensor([1.0, 2.0, 0.5]), 0.1, 1.5, sets)
    parts = sum(
        float(made.loss_sum(logits()[at], LABELS[at]))
        for at in (slice(1), slice(1, 4), slice(4, 6))
    )
    assert float(made.loss_sum(logits(), LABELS)) == pytest.approx(parts, rel=1e-5)
    assert float(made.plain().loss_sum(logits(), LABELS)) == pytest.approx(
        float(Objective(sets=sets).loss_sum(logits(), LABELS))
    )


def test_right_answers_and_probabilities() -> None:
    rows = torch.tensor([[3.0, 0.0, 1.0], [3.0, -1.0, 1.0], [-1.0, -1.0, -1.0]])
    labels = torch.tensor([0, 1, 0])
    plain, several = Objective(), Objective(sets=torch.from_numpy(SETS).float())
    assert int(plain.correct(rows, labels)) == 2
    assert int(several.correct(rows, labels)) == 2  # {a, c} and the empty set
    assert plain.probabilities(rows).sum(1).tolist() == pytest.approx([1.0, 1.0, 1.0])
    torch.testing.assert_close(several.probabilities(rows), rows.sigmoid())
    assert plain.truth(labels).tolist() == [0, 1, 0]
    assert several.truth(labels).tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 0]]
