"""A frozen encoder gives the same features in every epoch: compute them once, before the first.

Shapes: N rows, B rows of a batch, D width of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmray.config import Precision
from mmray.engine.prepared import Ints, PreparedRows
from mmray.learn import Batch, autocast
from mmray.model import Encoder, Features, FusionModel

BATCH = 64


class Precomputed(Encoder):
    """Stands where a frozen encoder was; its input is what that one pooled, float [B, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.settle(pretrained=True, frozen=True)

    def forward(self, pooled_BD: Tensor, mask_B1: Tensor | None = None) -> Features:
        return Features(pooled_BD, pooled_BD.unsqueeze(1))


class FeatureRows:
    """Rows for a model some of whose encoders are ``Precomputed``.

    ``image``, ``text``: float32 [N, D] on the CPU, in place of pixels or tokens; None where the
    encoder is itself.
    """

    def __init__(
        self, rows: PreparedRows, image: Tensor | None = None, text: Tensor | None = None
    ) -> None:
        self._rows, self._image, self._text = rows, image, text
        self.classes = rows.classes

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, at: Ints) -> Batch:
        """The rows ``at`` (one or more) as a batch on the CPU, with their labels."""
        batch = self._rows.batch(at, pixels=self._image is None, tokens=self._text is None)
        if self._image is not None:
            batch = replace(batch, pixels=self._image[at])
        if self._text is not None:
            real_B1 = torch.ones(len(at), 1, dtype=torch.bool)
            batch = replace(batch, tokens=self._text[at], mask=real_B1)
        return batch


def precompute(
    model: FusionModel,
    sides: list[PreparedRows],
    *,
    precision: Precision,
    rank: int,
    world: int,
    say: Callable[[int, int], None],
) -> list[FeatureRows]:
    """The rows of every side, with features where an encoder of ``model`` is frozen; that encoder
    is replaced in place.

    Each of ``world`` ranks computes its share and all get all. ``say(done, total)`` is told how
    far this rank is.
    """
    frozen: dict[str, Encoder] = {
        name: encoder
        for name, encoder in (("image", model.image), ("text", model.text))
        if encoder is not None and encoder.frozen and model.fusion.pooled_only
    }
    if not frozen:
        return [FeatureRows(rows) for rows in sides]
    model.eval()
    shares = [np.array_split(np.arange(len(rows)), world)[rank] for rows in sides]
    total, done = sum(map(len, shares)), 0
    made = []
    for rows, share in zip(sides, shares, strict=True):
        features = {name: torch.zeros(len(rows), e.dim) for name, e in frozen.items()}
        for start in range(0, len(share), BATCH):
            at = share[start : start + BATCH]
            for name, pooled_BD in _encode(model, rows, at, frozen, precision).items():
                features[name][at] = pooled_BD
            done += len(at)
            say(done, total)
        made.append(FeatureRows(rows, **{n: _summed(f, model) for n, f in features.items()}))
    for name, encoder in frozen.items():
        setattr(model, name, Precomputed(encoder.dim))
    return made


def _encode(
    model: FusionModel,
    rows: PreparedRows,
    at: Ints,
    frozen: dict[str, Encoder],
    precision: Precision,
) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    batch = rows.batch(at, pixels="image" in frozen, tokens="text" in frozen).to(device)
    found = {}
    with torch.no_grad(), autocast(precision, device):
        if "image" in frozen:
            found["image"] = frozen["image"](batch.pixels).pooled
        if "text" in frozen:
            assert batch.tokens is not None and batch.mask is not None
            ids_BL = batch.tokens.masked_fill(~batch.mask, model.spec.pad_id)
            found["text"] = frozen["text"](ids_BL, batch.mask).pooled
    return {name: pooled_BD.float().cpu() for name, pooled_BD in found.items()}


def _summed(part_ND: Tensor, model: FusionModel) -> Tensor:
    """The sum over ranks: each has filled in other rows."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return part_ND
    device = next(model.parameters()).device
    whole_ND = part_ND.to(device)  # NCCL sums on GPUs only
    dist.all_reduce(whole_ND)
    return whole_ND.cpu()
