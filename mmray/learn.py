"""One optimisation step and one evaluation pass; no Ray, no I/O.

Shapes: B rows of this process's batch, L tokens of its longest caption, H x W pixels, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmray.config import Precision, Train
from mmray.counts import AnswerCounts
from mmray.model import FusionModel
from mmray.objective import Objective
from mmray.preprocess import Prepared

# --- batches -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows on one device.

    ``pixels``: uint8 [B, 3, H, W]; ``tokens``: int64 [B, L]; ``mask``: bool [B, L], True for real
    tokens, none of a row without a caption; ``labels``: int64 [B] indices of classes, or of
    label sets. None where the model or the caller needs none, or no row has any. ``pictured``: bool
    [B], which rows have a picture, where some have none: their pixels are zeros.
    """

    pixels: Tensor | None
    tokens: Tensor | None
    mask: Tensor | None
    labels: Tensor | None
    pictured: Tensor | None = None

    def __len__(self) -> int:
        parts = (self.pixels, self.tokens, self.labels)
        return next(len(part) for part in parts if part is not None)

    def pinned(self) -> Batch:
        """The same rows in memory from which a GPU copies without being waited for."""
        parts = (self.pixels, self.tokens, self.mask, self.labels, self.pictured)
        return Batch(*(p if p is None else p.pin_memory() for p in parts))

    def to(self, device: torch.device | str) -> Batch:
        """The same rows on ``device``."""
        parts = (self.pixels, self.tokens, self.mask, self.labels, self.pictured)
        return Batch(*(p if p is None else p.to(device, non_blocking=True) for p in parts))

    def split(self, parts: int) -> list[Batch]:
        """The same rows in order, as at most ``parts`` batches of nearly one size."""
        columns = [getattr(self, field.name) for field in fields(self)]
        ends = [len(self) * i // parts for i in range(parts + 1)]
        return [
            Batch(*(c if c is None else c[start:stop] for c in columns))
            for start, stop in pairwise(ends)
            if start < stop
        ]


def collate(prepared: Sequence[Prepared], labels: Sequence[int] | None = None) -> Batch:
    """Rows (at least one) as one Batch on the CPU; tokens padded to the longest, nothing else."""
    assert prepared, "a batch has at least one row"
    pixels = tokens = mask = pictured = None
    pixels_CHW = [row.pixels for row in prepared if row.pixels is not None]
    tokens_L = [row.tokens for row in prepared if row.tokens is not None]
    if len(pixels_CHW) == len(prepared):
        pixels = torch.from_numpy(np.stack(pixels_CHW))
    elif pixels_CHW:
        pictured = torch.tensor([row.pixels is not None for row in prepared])
        pixels = torch.zeros(len(prepared), *pixels_CHW[0].shape, dtype=torch.uint8)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        pixels[pictured] = torch.from_numpy(np.stack(pixels_CHW))
    if tokens_L:
        lengths = np.array([0 if row.tokens is None else len(row.tokens) for row in prepared])
        real = np.arange(max(1, lengths.max())) < lengths[:, None]
        ids = np.zeros(real.shape, np.int64)
        ids[real] = np.concatenate(tokens_L)
        tokens, mask = torch.from_numpy(ids), torch.from_numpy(real)
    targets = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    return Batch(pixels, tokens, mask, targets, pictured)


def drop_modalities(batch: Batch, share: float, draws: Tensor | None = None) -> Batch:
    """``batch`` without the picture or the caption, never both, of about ``share`` of the rows that
    have both. ``draws``: float32 [B, 2] in [0, 1), on the CPU, decide which: those of a row whether
    it loses one, and which one; by default torch's seed does."""
    if not share or batch.pixels is None or batch.mask is None:
        return batch
    device, rows = batch.mask.device, len(batch)
    if draws is None:
        draws = torch.rand(rows, 2)  # on the CPU: the same rows, then, on every device
    pictured_B = torch.ones(rows, dtype=torch.bool, device=device)
    if batch.pictured is not None:
        pictured_B = batch.pictured
    dropped_B, of_images_B = (draws < torch.tensor([share, 0.5])).to(device).unbind(1)
    dropped_B = dropped_B & pictured_B & batch.mask.any(1)
    images_B = dropped_B & of_images_B
    mask_BL = batch.mask & ~(dropped_B & ~images_B).unsqueeze(1)
    return replace(batch, mask=mask_BL, pictured=pictured_B & ~images_B)


def mixed(*numbers: int) -> int:
    """A seed for torch, another one where any of ``numbers`` (0 or more) is another. On the CPU
    torch looks at no more than the lowest 32 bits of a seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# --- precision -----------------------------------------------------------------------------------


def resolve_precision(
    precision: Precision, device: torch.device | str
) -> Literal["bf16", "float32"]:
    """What ``auto`` means on ``device``: bf16 where its hardware is faster at it, else float32.

    CPUs are with AMX. With no more than AVX-512's bf16 AMD's are, which of those alone have sse4a;
    Intel's take 1.3 to 1.7 times as long as in float32.
    """
    if precision != "auto":
        return precision
    if torch.device(device).type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities().get
        faster = bool(has("amx_bf16") or (has("avx512_bf16") and has("sse4a")))
    return "bf16" if faster else "float32"


def autocast(precision: Precision, device: torch.device | str) -> torch.autocast:
    """Context in which a model's forward runs."""
    resolved = resolve_precision(precision, device)
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=resolved == "bf16")


# --- optimisation --------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, cfg: Train) -> torch.optim.Optimizer:
    """Adam or AdamW over the parameters that train.

    An encoder learns at its own ``lr`` if it has one, at ``backbone_lr`` if it is pretrained, all
    else at ``lr``; biases and norms (every tensor with fewer than two dimensions) get no weight
    decay. A group's ``lr_scale`` is its learning rate over ``lr``.
    """
    plain = _unwrap(model)
    own = plain.spec.config.image.lr, plain.spec.config.text.lr
    left = {id(p): p for p in plain.parameters()}
    parts: list[tuple[str, float, list[nn.Parameter]]] = []
    for name, encoder, lr in zip(("image", "text"), (plain.image, plain.text), own, strict=True):
        if encoder is not None:
            lr = lr or (cfg.backbone_lr if encoder.pretrained else None) or cfg.lr
            parts.append((name, lr, [left.pop(id(p)) for p in encoder.parameters()]))
    parts.append(("joint", cfg.lr, list(left.values())))
    groups: list[dict[str, Any]] = []
    for name, lr, parameters in parts:
        for decays in (True, False):
            chosen = [p for p in parameters if p.requires_grad and (p.ndim > 1) == decays]
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "name": name if decays else f"{name}, no decay",
                        "lr": lr,
                        "lr_scale": lr / cfg.lr,
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


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step saw, on the batch's device, so that a GPU need not wait to be asked.

    ``loss``: float32 [], as it was minimised: by default the mean over this process's rows;
    ``correct``: int64 [], rows that were answered right; ``grad_norm``: float32 [], before
    clipping.
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
    objective: Objective | None = None,
    rows: float | None = None,
    drops: Tensor | None = None,
) -> StepResult:
    """Forward, backward, clip, step at learning rate ``lr`` (of the new parts; backbones scale it).

    ``model`` is a FusionModel in training mode, or one wrapped in DistributedDataParallel; the
    batch lies on its device and has labels, which ``objective`` understands (by default a class
    each). The loss summed over the batch is divided by ``rows``,
    by default the batch's. DistributedDataParallel takes the mean over processes: with ``rows`` the
    rows of all of them over their number, every row weighs the same however unevenly they are
    spread; with infinity the batch weighs nothing. ``drops`` are the draws of ``drop_modalities``.

    The batch is taken in ``cfg.accumulate`` parts, whose gradients add up to the whole's: less
    memory, the same step, but that batch norm sees the parts (and learns nothing from parts of one
    row).
    """
    batch = drop_modalities(batch, cfg.modality_dropout, drops)
    assert batch.labels is not None
    if objective is None:
        objective = Objective(label_smoothing=cfg.label_smoothing, focal_gamma=cfg.focal_gamma)
    optimizer.zero_grad(set_to_none=True)
    rows = len(batch) if rows is None else rows
    loss = torch.zeros((), device=batch.labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=batch.labels.device)
    *first, last = batch.split(cfg.accumulate)
    for part in (*first, last):
        # Processes exchange gradients once, when the last part's are added.
        with _unsynced(model) if part is not last else nullcontext():
            part_loss, part_correct = _backward(model, part, cfg, objective, rows)
        loss += part_loss
        correct += part_correct
    limit = math.inf if cfg.grad_clip is None else cfg.grad_clip
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.step()
    return StepResult(loss, len(batch), correct, grad_norm)


def _unsynced(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which gradients stay in their process."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def _backward(
    model: nn.Module, batch: Batch, cfg: Train, objective: Objective, rows: float
) -> tuple[Tensor, Tensor]:
    """Add the gradient of a batch; its loss, over ``rows``, and its correct rows."""
    assert batch.labels is not None
    with autocast(cfg.precision, batch.labels.device):
        logits_BC, _ = model(batch.pixels, batch.tokens, batch.mask, batch.pictured)
    loss = objective.loss_sum(logits_BC, batch.labels) / rows
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), objective.correct(logits_BC.detach(), batch.labels)


# --- evaluation ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Counts over some rows; those of parts merge into those of the whole."""

    counts: AnswerCounts
    loss_sum: float  # summed over rows, without smoothing or weights

    @property
    def loss(self) -> float:
        """Mean loss of a row; 0 without rows."""
        return self.loss_sum / self.counts.rows if self.counts.rows else 0.0


def evaluate_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    counts: AnswerCounts,
    *,
    objective: Objective | None = None,
    precision: Precision = "auto",
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Every row of ``batches`` once, in evaluation mode (the model's mode is put back).

    ``batches`` are moved to ``device``, where the model and ``objective`` are; all have labels that
    ``objective`` understands (by default a class each). They are counted in ``counts``, in place.
    A DistributedDataParallel model is unwrapped, so ranks may hold unequal numbers of rows.
    """
    plain, measured, total = _unwrap(model), (objective or Objective()).plain(), 0.0
    was_training = plain.training
    plain.eval()
    try:
        with torch.inference_mode(), autocast(precision, device):
            for batch in (b.to(device) for b in batches):
                assert batch.labels is not None
                logits_BC, _ = plain(batch.pixels, batch.tokens, batch.mask, batch.pictured)
                total += float(measured.loss_sum(logits_BC, batch.labels))
                scores_BC = measured.probabilities(logits_BC).float().cpu().numpy()
                counts.add(measured.truth(batch.labels), scores_BC)
    finally:
        plain.train(was_training)
    return Evaluation(counts, total)


def _unwrap(model: nn.Module) -> FusionModel:
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(plain, FusionModel)
    return plain
