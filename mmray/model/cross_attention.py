"""Cross-attention: tokens look at patches, and patches at tokens.

Shapes: B rows, L tokens or patches of one side, M of the other, N attention heads, K width of a
head, D width of the fused vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmray.model.features import Features, attendable, masked_mean
from mmray.model.fusion import Fusion

LAYERS = 2
MAX_HEADS, MIN_WIDTH = 8, 32  # of a layer; of a head


class CrossAttention(Fusion):
    """Both sides read each other, token by patch (co-attention of ViLBERT, Lu et al. 2019,
    arXiv:1908.02265, and LXMERT, Tan & Bansal 2019, arXiv:1908.07490), then their means are joined.

    Where something stands in the picture or the caption is known as far as the encoders put it into
    their tokens. Both papers' attention within a side is left to the encoders, too.
    """

    pooled_only = False

    def __init__(self, image_dim: int, text_dim: int, dim: int, dropout: float) -> None:
        super().__init__(image_dim, text_dim, dim, dropout)
        self.image, self.text = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
            for width in (image_dim, text_dim)
        )
        self.layers = nn.ModuleList(_Exchange(dim, dropout) for _ in range(LAYERS))
        self.joint = nn.Sequential(
            nn.LayerNorm(2 * dim), nn.Dropout(dropout), nn.Linear(2 * dim, dim), nn.GELU()
        )

    def forward(self, image: Features, text: Features) -> Tensor:
        image_BLD, image_B11L = _entered(self.image(image.tokens), image.mask)
        text_BLD, text_B11L = _entered(self.text(text.tokens), text.mask)
        for layer in self.layers:
            image_BLD, text_BLD = layer(image_BLD, image_B11L, text_BLD, text_B11L)
        means = masked_mean(image_BLD, image.mask), masked_mean(text_BLD, text.mask)
        fused_BD: Tensor = self.joint(torch.cat(means, dim=1))
        return fused_BD


def _entered(x_BLD: Tensor, mask_BL: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A side with nothing under its padding, which a row without a real token does look at; and
    where the other side may look."""
    if mask_BL is None:
        return x_BLD, None
    return x_BLD.masked_fill(~mask_BL.unsqueeze(-1), 0.0), attendable(mask_BL)


class _Exchange(nn.Module):
    """One layer: each side reads what the other was before it."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.image, self.text = _Reading(dim, dropout), _Reading(dim, dropout)

    def forward(
        self,
        image_BLD: Tensor,
        image_B11L: Tensor | None,
        text_BLD: Tensor,
        text_B11L: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return (
            self.image(image_BLD, text_BLD, text_B11L),
            self.text(text_BLD, image_BLD, image_B11L),
        )


class _Reading(nn.Module):
    """Every token of one side attends to all real ones of the other; pre-norm, residual, followed
    by a perceptron."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.heads = _heads(dim)
        self.own_norm, self.other_norm, self.mlp_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x_BLD: Tensor, other_BMD: Tensor, allowed_B11M: Tensor | None) -> Tensor:
        x_BLD = x_BLD + self.attend(self.own_norm(x_BLD), self.other_norm(other_BMD), allowed_B11M)
        mlp_BLD: Tensor = self.mlp(self.mlp_norm(x_BLD))
        return x_BLD + mlp_BLD

    def attend(self, x_BLD: Tensor, other_BMD: Tensor, allowed_B11M: Tensor | None) -> Tensor:
        B, L, D = x_BLD.shape
        q_BNLK = self.query(x_BLD).view(B, L, self.heads, -1).transpose(1, 2)
        kv_2BNMK = self.key_value(other_BMD).view(B, -1, 2, self.heads, D // self.heads)
        k_BNMK, v_BNMK = kv_2BNMK.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        x_BNLK = F.scaled_dot_product_attention(
            q_BNLK, k_BNMK, v_BNMK, attn_mask=allowed_B11M, dropout_p=dropout
        )
        x_out_BLD: Tensor = self.out(x_BNLK.transpose(1, 2).reshape(B, L, D))
        return F.dropout(x_out_BLD, self.dropout, self.training)


def _heads(dim: int) -> int:
    """As many heads as divide the width, up to ``MAX_HEADS`` of ``MIN_WIDTH`` or more."""
    fitting = (n for n in range(1, MAX_HEADS + 1) if dim % n == 0 and dim // n >= MIN_WIDTH)
    return max(fitting, default=1)
