"""One optimisation step and one evaluation pass; no Ray, no I/O.

Shapes: B rows of this process's batch, L tokens of its longest caption, H x W pixels, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmray.config import Precision, Train
from mmray.metrics import Confusion
from mmray.model import FusionModel
from mmray.preprocess import Prepared

# --- batches -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows on one device.

    ``pixels``: uint8 [B, 3, H, W]; ``tokens``: int64 [B, L]; ``mask``: bool [B, L], True for real
    tokens; ``labels``: int64 [B] class indices. None where the model or the caller needs none.
    """

    pixels: Tensor | None
    tokens: Tensor | None
    mask: Tensor | None
    labels: Tensor | None

    def __len__(self) -> int:
        parts = (self.pixels, self.tokens, self.labels)
        return next(len(part) for part in parts if part is not None)

    def to(self, device: torch.device | str) -> Batch:
        """The same rows on ``device``."""
        parts = (self.pixels, self.tokens, self.mask, self.labels)
        return Batch(*(p if p is None else p.to(device, non_blocking=True) for p in parts))


def collate(prepared: Sequence[Prepared], labels: Sequence[int] | None = None) -> Batch:
    """Rows (at least one) as one Batch on the CPU; tokens padded to the longest, nothing else."""
    assert prepared, "a batch has at least one row"
    pixels = tokens = mask = None
    pixels_CHW = [row.pixels for row in prepared if row.pixels is not None]
    tokens_L = [row.tokens for row in prepared if row.tokens is not None]
    assert len(pixels_CHW) in (0, len(prepared)), "rows of one model have the same modalities"
    assert len(tokens_L) in (0, len(prepared)), "rows of one model have the same modalities"
    if pixels_CHW:
        pixels = torch.from_numpy(np.stack(pixels_CHW))
    if tokens_L:
        lengths = np.array([len(row) for row in tokens_L])
        real = np.arange(max(1, lengths.max())) < lengths[:, None]
        ids = np.zeros(real.shape, np.int64)
        ids[real] = np.concatenate(tokens_L)
        tokens, mask = torch.from_numpy(ids), torch.from_numpy(real)
    targets = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    return Batch(pixels, tokens, mask, targets)


# --- precision -----------------------------------------------------------------------------------


def resolve_precision(
    precision: Precision, device: torch.device | str
) -> Literal["bf16", "float32"]:
    """What ``auto`` means on ``device``: bf16 where its hardware computes it, else float32."""
    if precision != "auto":
        return precision
    if torch.device(device).type == "cuda":
        computes = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities()
        computes = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return "bf16" if computes else "float32"


def autocast(precision: Precision, device: torch.device | str) -> torch.autocast:
    """Context in which a model's forward runs."""
    resolved = resolve_precision(precision, device)
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=resolved == "bf16")


# --- optimisation --------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, cfg: Train) -> torch.optim.Optimizer:
    """Adam or AdamW over the parameters that train.

    Pretrained encoders learn at ``backbone_lr``, the rest at ``lr``; biases and norms (every
    tensor with fewer than two dimensions) get no weight decay. A group's ``lr_scale`` is its
    learning rate over ``lr``.
    """
    plain = _unwrap(model)
    backbone = {
        id(p) for encoder in plain.encoders() if encoder.pretrained for p in encoder.parameters()
    }
    scale = 1.0 if cfg.backbone_lr is None else cfg.backbone_lr / cfg.lr
    groups: list[dict[str, Any]] = []
    for name, is_backbone, lr_scale in (("new", False, 1.0), ("backbone", True, scale)):
        for decays in (True, False):
            chosen = [
                p
                for p in plain.parameters()
                if p.requires_grad and (id(p) in backbone) == is_backbone and (p.ndim > 1) == decays
            ]
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "name": name if decays else f"{name}, no decay",
                        "lr": cfg.lr * lr_scale,
                        "lr_scale": lr_scale,
                        "weight_decay": cfg.weight_decay if decays else 0.0,
                    }
                )
    kind = torch.optim.Adam if cfg.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=cfg.lr, fused=True)


def lr_at(step: int, total: int, cfg: Train) -> float:
    """Learning rate of step ``step`` of ``total`` (0-based): linear warm-up, then ``schedule``.

    Cosine falls to 0 just after the last step (Loshchilov & Hutter 2017, arXiv:1608.03983).
    """
    warmup = round(cfg.warmup * total)
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    if cfg.schedule == "constant":
        return cfg.lr
    done = (step - warmup) / max(1, total - warmup)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def class_weights(counts: Sequence[int], cfg: Train) -> Tensor | None:
    """Weight of each class in the loss, float32 [C], from its rows in the training split.

    ``balanced``: rows / (classes that occur * rows of the class), so that a row weighs 1 on
    average; a class without rows weighs 0. None when all weigh the same.
    """
    if cfg.class_weights == "none":
        return None
    rows_C = torch.tensor(counts, dtype=torch.float32)
    occurs_C = rows_C > 0
    weights_C = rows_C.sum() / (occurs_C.sum() * rows_C.clamp(min=1))
    return weights_C * occurs_C


def loss_sum(
    logits_BC: Tensor,
    labels_B: Tensor,
    *,
    label_smoothing: float = 0.0,
    weights_C: Tensor | None = None,
) -> Tensor:
    """Cross-entropy summed over rows, float32 []; weighted rows count with their weight.

    Summed, not normalised by the batch's weights: the mean over all workers' rows is then the
    same however the rows are spread.
    """
    return F.cross_entropy(
        logits_BC, labels_B, weights_C, label_smoothing=label_smoothing, reduction="sum"
    )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step saw, on the batch's device, so that a GPU need not wait to be asked.

    ``loss``: float32 [], as it was minimised: by default the mean over this process's rows;
    ``correct``: int64 [], rows whose most probable class was right; ``grad_norm``: float32 [],
    before clipping.
    """

    loss: Tensor
    rows: int
    correct: Tensor
    grad_norm: Tensor


def train_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    lr: float,
    cfg: Train,
    *,
    weights_C: Tensor | None = None,
    rows: float | None = None,
) -> StepResult:
    """Forward, backward, clip, step at learning rate ``lr`` (of the new parts; backbones scale it).

    ``model`` is a FusionModel in training mode, or one wrapped in DistributedDataParallel; the
    batch lies on its device and has labels. The loss summed over the batch is divided by ``rows``,
    by default the batch's. DistributedDataParallel takes the mean over processes: with ``rows`` the
    rows of all of them over their number, every row weighs the same however unevenly they are
    spread; with infinity the batch weighs nothing.
    """
    assert batch.labels is not None
    optimizer.zero_grad(set_to_none=True)
    with autocast(cfg.precision, batch.labels.device):
        logits_BC, _ = model(batch.pixels, batch.tokens, batch.mask)
    total = loss_sum(
        logits_BC, batch.labels, label_smoothing=cfg.label_smoothing, weights_C=weights_C
    )
    loss = total / (len(batch) if rows is None else rows)
    loss.backward()  # type: ignore[no-untyped-call]
    limit = math.inf if cfg.grad_clip is None else cfg.grad_clip
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.step()
    correct = (logits_BC.detach().argmax(1) == batch.labels).sum()
    return StepResult(loss.detach(), len(batch), correct, grad_norm)


# --- evaluation ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Counts over some rows; those of parts merge into those of the whole."""

    confusion: Confusion
    loss_sum: float  # cross-entropy summed over rows, without smoothing or weights

    @property
    def loss(self) -> float:
        """Mean cross-entropy of a row; 0 without rows."""
        return self.loss_sum / self.confusion.rows if self.confusion.rows else 0.0


def evaluate_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    labels: Sequence[str],
    *,
    precision: Precision = "auto",
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Every row of ``batches`` once, in evaluation mode (the model's mode is put back).

    ``batches`` are moved to ``device``, where the model is; all have labels (indices into
    ``labels``). A DistributedDataParallel model is unwrapped, so ranks may hold unequal numbers
    of rows.
    """
    plain = _unwrap(model)
    confusion, total = Confusion(labels), 0.0
    was_training = plain.training
    plain.eval()
    try:
        with torch.inference_mode(), autocast(precision, device):
            for batch in (b.to(device) for b in batches):
                assert batch.labels is not None
                logits_BC, _ = plain(batch.pixels, batch.tokens, batch.mask)
                total += float(loss_sum(logits_BC, batch.labels))
                confusion.add(batch.labels.cpu().numpy(), logits_BC.argmax(1).cpu().numpy())
    finally:
        plain.train(was_training)
    return Evaluation(confusion, total)


def _unwrap(model: nn.Module) -> FusionModel:
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(plain, FusionModel)
    return plain
