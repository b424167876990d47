"""A frozen encoder gives the same features in every epoch: compute them once, before the first.

Shapes: N rows, B rows of a batch, D width of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from mmray.config import Precision
from mmray.engine.feed import Feed
from mmray.engine.feeder import FEATURES
from mmray.engine.prepared import PreparedRows
from mmray.engine.windows import Ints
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

    ``image``, ``text``: float32 [N, D] on the CPU, in place of pixels or tokens, zeros for a row
    that has none; None where the encoder is itself.
    """

    def __init__(
        self, rows: PreparedRows, image: Tensor | None = None, text: Tensor | None = None
    ) -> None:
        self._rows, self._image, self._text = rows, image, text
        self.classes = rows.classes

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, at: Ints, captions: Ints | None = None) -> Batch:
        """The rows ``at`` (one or more) as a batch on the CPU, with their labels; ``captions`` as
        of ``PreparedRows.batch``."""
        batch = self._rows.batch(
            at, captions=captions, pixels=self._image is None, tokens=self._text is None
        )
        if self._image is not None:
            pictured = self._rows.pictured[at]
            pictured_B = None if pictured.all() else torch.from_numpy(pictured)
            batch = replace(batch, pixels=self._image[at], pictured=pictured_B)
        if self._text is not None:
            shown = at if captions is None else captions
            real_B1 = torch.from_numpy(self._rows.captioned[shown]).unsqueeze(1)
            batch = replace(batch, tokens=self._text[shown], mask=real_B1)
        return batch


def precompute(
    model: FusionModel,
    sides: Sequence[PreparedRows],
    feed: Feed,
    *,
    precision: Precision,
    say: Callable[[int, int], None],
) -> list[FeatureRows]:
    """The rows of every side, with features where an encoder of ``model`` is frozen; that encoder
    is replaced in place.

    Each rank computes its share, which ``feed`` gives it, and all get all. ``say(done, total)`` is
    told how far all of them are, by this rank.
    """
    frozen: dict[str, Encoder] = {
        name: encoder
        for name, encoder in (("image", model.image), ("text", model.text))
        if encoder is not None and encoder.frozen and model.fusion.pooled_only
    }
    if not frozen:
        return [FeatureRows(rows) for rows in sides]
    model.eval()
    total, done = sum(map(len, sides)), 0
    made = []
    for rows, number in zip(sides, FEATURES, strict=False):
        features = {name: torch.zeros(len(rows), e.dim) for name, e in frozen.items()}
        for at in feed.shares(number, BATCH, pixels="image" in frozen):
            for name, encoder in frozen.items():
                there = at[(rows.pictured if name == "image" else rows.captioned)[at]]
                if len(there):
                    batch = rows.batch(there, pixels=name == "image", tokens=name == "text")
                    features[name][there] = _pooled(model, encoder, batch, precision)
            done += len(at) * feed.world
            say(min(done, total), total)
        made.append(FeatureRows(rows, **{n: _summed(f, model) for n, f in features.items()}))
    if "image" in frozen:
        feed.drop_pixels()
    for name, encoder in frozen.items():
        setattr(model, name, Precomputed(encoder.dim))
    return made


def _pooled(model: FusionModel, encoder: Encoder, batch: Batch, precision: Precision) -> Tensor:
    """What a frozen encoder of ``model`` makes of a batch, float32 [B, D] on the CPU."""
    device = next(model.parameters()).device
    batch = batch.to(device)
    with torch.no_grad(), autocast(precision, device):
        if batch.pixels is not None:
            features = encoder(batch.pixels)
        else:
            assert batch.tokens is not None and batch.mask is not None
            ids_BL = batch.tokens.masked_fill(~batch.mask, model.spec.pad_id)
            features = encoder(ids_BL, batch.mask)
    pooled_BD: Tensor = features.pooled.float().cpu()
    return pooled_BD


def _summed(part_ND: Tensor, model: FusionModel) -> Tensor:
    """The sum over ranks: each has filled in other rows."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return part_ND
    device = next(model.parameters()).device
    whole_ND = part_ND.to(device)  # NCCL sums on GPUs only
    dist.all_reduce(whole_ND)
    return whole_ND.cpu()
