"""What stands in for a picture or a caption that is not there.

Shapes: B rows, L tokens or patches, D width of an encoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmray.model.features import Encoder, Features


class StandIn(nn.Module):
    """A learned vector, float [D], in the place of one modality's features.

    It is the pooled vector and every token that may be looked at. Whatever a batch holds, it and
    the encoder take part in it: DistributedDataParallel stops at weights that do not.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.vector, std=0.02)

    def pictures(
        self, encoder: Encoder, pixels: Tensor | None, pictured_B: Tensor | None, rows: int
    ) -> Features:
        """Features of ``rows`` rows. ``pictured``: bool [B], which of them have a picture in
        ``pixels`` [B, ...]; None: all. Without ``pixels`` none has.

        Only pictures go through the encoder: blank ones would cost as much, and enter the
        statistics of its batch norms.
        """
        if pixels is None:
            return self._nothing(encoder, rows)
        if pictured_B is None and not torch.is_grad_enabled():
            features: Features = encoder(pixels)
            return features
        if pictured_B is None:
            pictured_B = torch.ones(rows, dtype=torch.bool, device=pixels.device)
        at = pictured_B.nonzero().squeeze(1)
        if not len(at):
            return self._nothing(encoder, rows)
        seen: Features = encoder(pixels if len(at) == rows else pixels[at])
        return Features(self._spread(seen.pooled, at, rows), self._spread(seen.tokens, at, rows))

    def captions(self, features: Features, captioned_B: Tensor) -> Features:
        """``features`` [B, ...] with the vector in the rows without a caption; it is the first
        token there, and the only one that is real."""
        vector = self.vector.to(features.tokens.dtype)
        captioned_B1 = captioned_B.unsqueeze(1)
        first_BD = torch.where(captioned_B1, features.tokens[:, 0], vector)
        mask = features.mask
        return Features(
            torch.where(captioned_B1, features.pooled, self.vector.to(features.pooled.dtype)),
            torch.cat([first_BD.unsqueeze(1), features.tokens[:, 1:]], dim=1),
            None if mask is None else torch.cat([mask[:, :1] | ~captioned_B1, mask[:, 1:]], dim=1),
        )

    def _spread(self, found: Tensor, at: Tensor, rows: int) -> Tensor:
        """``found`` [n, ...] as the rows ``at`` [n] of [B, ...]; the vector elsewhere."""
        vectors = self.vector.to(found.dtype).expand(rows, *found.shape[1:])
        return vectors.index_copy(0, at, found)

    def _nothing(self, encoder: Encoder, rows: int) -> Features:
        """No row has a picture: the vector everywhere, as a single patch."""
        vector_D: Tensor = self.vector
        if torch.is_grad_enabled():
            vector_D = vector_D + 0 * sum(p.sum() for p in encoder.parameters() if p.requires_grad)
        return Features(vector_D.expand(rows, -1), vector_D.expand(rows, 1, -1))
