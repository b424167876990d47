"""What every encoder gives and every fusion takes.

Shapes: B rows, L tokens of a caption, P patches of an image, D width, H image rows, W image
columns, C colour channels; ``x_BLD`` is a tensor of shape [B, L, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Features:
    """One modality of a batch, encoded.

    ``pooled``: float [B, D], one vector a row. ``tokens``: float [B, L, D], one vector a token
    (caption) or patch (image). ``mask``: bool [B, L], True where a token is real; None: all are.
    """

    pooled: Tensor
    tokens: Tensor
    mask: Tensor | None = None


def masked_mean(x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Mean over the real tokens (None: all are) -> [B, D]; zeros for a row that has none."""
    if mask_BL is None:
        return x_BLD.mean(1)
    weights_BL1 = mask_BL.unsqueeze(-1).to(x_BLD.dtype)
    return (x_BLD * weights_BL1).sum(1) / weights_BL1.sum(1).clamp(min=1)


def attendable(mask_BL: Tensor) -> Tensor:
    """Where attention may look, bool [B, 1, 1, L]: at real tokens. In a row that has none it may
    look anywhere, as softmax over nothing would be NaN."""
    return (mask_BL | ~mask_BL.any(1, keepdim=True))[:, None, None, :]


class Encoder(nn.Module):
    """An encoder of one modality: ``forward`` gives Features of width ``dim``.

    ``pretrained``: its weights were learned elsewhere (it trains at ``train.backbone_lr``, unless
    its own ``lr`` is given).
    A pretrained encoder keeps its batch-norm statistics even under ``train()``: small batches
    from another distribution would wreck them, and weights whose batch norms were folded away
    hold no true statistics to renew. ``frozen``: parameters stay as they are too; no gradients
    are computed, and dropout is off.
    """

    dim: int
    pretrained: bool = False
    frozen: bool = False

    def settle(self, *, pretrained: bool, frozen: bool) -> None:
        """Fix both properties; called once, at the end of construction."""
        self.pretrained, self.frozen = pretrained, frozen
        if frozen:
            self.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode and not self.frozen)
        if self.pretrained:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def grad_mode(self) -> torch.set_grad_enabled:
        """Context in which ``forward`` runs: no graph is kept for a frozen encoder."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen)
