"""Fusions: the features of both modalities -> one vector a row. ``cross_attention`` has its own
module.

Shapes: B rows, P patches, D width of the fused vector; see ``features`` for the rest. A fusion is
made from (image width, text width, fused width, dropout) and may use pooled vectors, tokens and
masks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmray.model.features import Features, masked_mean


class Fusion(nn.Module):
    """``forward(image, text)`` -> float [B, dim]. ``pooled_only``: it looks at no single token or
    patch, so pooled vectors are all that must be kept of a frozen encoder."""

    pooled_only: bool

    def __init__(self, image_dim: int, text_dim: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.image_dim, self.text_dim, self.dim, self.dropout = image_dim, text_dim, dim, dropout

    def forward(self, image: Features, text: Features) -> Tensor:
        raise NotImplementedError


class Projection(nn.Sequential):
    """Pooled vector of one modality -> [B, dim]; also stands in for a fusion when it is alone."""

    pooled_only = True

    def __init__(self, in_dim: int, dim: int, dropout: float) -> None:
        super().__init__(
            nn.LayerNorm(in_dim), nn.Dropout(dropout), nn.Linear(in_dim, dim), nn.GELU()
        )


class Concat(Fusion):
    """Projected pooled vectors side by side, then a layer over both, as in ConcatBERT (Kiela et al.
    2020, arXiv:2005.04790, section 4).

    ``h = gelu(W [p_v(v), p_t(t)])``, v [B, image width], t [B, text width], both projected to
    [B, D]. One layer, with the linear head a two-layer perceptron: deeper ones overfit a few
    thousand pairs.
    """

    pooled_only = True

    def __init__(self, image_dim: int, text_dim: int, dim: int, dropout: float) -> None:
        super().__init__(image_dim, text_dim, dim, dropout)
        self.image = Projection(image_dim, dim, dropout)
        self.text = Projection(text_dim, dim, dropout)
        self.joint = nn.Sequential(nn.Dropout(dropout), nn.Linear(2 * dim, dim), nn.GELU())

    def forward(self, image: Features, text: Features) -> Tensor:
        joined_BD = torch.cat([self.image(image.pooled), self.text(text.pooled)], dim=1)
        fused_BD: Tensor = self.joint(joined_BD)
        return fused_BD


class Gated(Fusion):
    """Gated multimodal unit (Arevalo et al. 2017, arXiv:1702.01992, equations 1-4).

    ``h = z * tanh(W_v v) + (1 - z) * tanh(W_t t)`` with ``z = sigmoid(W_z [v, t])``: each fused
    value is a mix of picture and text, in a share that both together decide.
    """

    pooled_only = True

    def __init__(self, image_dim: int, text_dim: int, dim: int, dropout: float) -> None:
        super().__init__(image_dim, text_dim, dim, dropout)
        self.image_norm, self.text_norm = nn.LayerNorm(image_dim), nn.LayerNorm(text_dim)
        self.image = nn.Linear(image_dim, dim)
        self.text = nn.Linear(text_dim, dim)
        self.gate = nn.Linear(image_dim + text_dim, dim)

    def forward(self, image: Features, text: Features) -> Tensor:
        image_BD, text_BD = self.image_norm(image.pooled), self.text_norm(text.pooled)
        gate_BD = torch.sigmoid(self.gate(torch.cat([image_BD, text_BD], dim=1)))
        return gate_BD * torch.tanh(self.image(image_BD)) + (1 - gate_BD) * torch.tanh(
            self.text(text_BD)
        )


class Bilinear(Fusion):
    """Low-rank bilinear pooling (Kim et al. 2017, arXiv:1610.04325, section 3).

    ``tanh(U v) * tanh(W t)``: every product of a picture's and a text's feature has its weight, in
    D factors of rank one; the head is the paper's projection of them.
    """

    pooled_only = True

    def __init__(self, image_dim: int, text_dim: int, dim: int, dropout: float) -> None:
        super().__init__(image_dim, text_dim, dim, dropout)
        self.image, self.text = (
            nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, dim))
            for width in (image_dim, text_dim)
        )

    def forward(self, image: Features, text: Features) -> Tensor:
        return torch.tanh(self.image(image.pooled)) * torch.tanh(self.text(text.pooled))


class Film(Fusion):
    """Feature-wise linear modulation (Perez et al. 2018, arXiv:1709.07871): the text scales and
    shifts every feature of every patch, twice, and the mean over the patches is the result.

    One way, as in the paper: what a picture shows is read in the light of what is said. The paper's
    residual blocks, with 1 x 1 convolutions alone (patches of some encoders lie in no grid) and a
    normalisation over features, which does not depend on the other rows.
    """

    pooled_only = False

    def __init__(self, image_dim: int, text_dim: int, dim: int, dropout: float) -> None:
        super().__init__(image_dim, text_dim, dim, dropout)
        self.image = nn.Sequential(nn.LayerNorm(image_dim), nn.Linear(image_dim, dim))
        self.text = nn.Sequential(nn.LayerNorm(text_dim), nn.Dropout(dropout))
        self.blocks = nn.ModuleList(_Modulated(text_dim, dim) for _ in range(2))

    def forward(self, image: Features, text: Features) -> Tensor:
        x_BPD, text_BD = self.image(image.tokens), self.text(text.pooled)
        for block in self.blocks:
            x_BPD = block(x_BPD, text_BD)
        return masked_mean(x_BPD, image.mask)


class _Modulated(nn.Module):
    """``x + relu((1 + gamma) * norm(linear(x)) + beta)``, gamma and beta from the text."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)  # the text does that
        self.modulation = nn.Linear(text_dim, 2 * dim)

    def forward(self, x_BPD: Tensor, text_BD: Tensor) -> Tensor:
        gamma_B1D, beta_B1D = self.modulation(text_BD).unsqueeze(1).chunk(2, dim=-1)
        modulated_BPD = (1 + gamma_B1D) * self.norm(self.linear(x_BPD)) + beta_B1D
        return x_BPD + torch.relu(modulated_BPD)
