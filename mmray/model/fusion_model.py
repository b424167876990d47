"""FusionModel: an encoder a modality, a fusion, a linear head.

Shapes: B rows, C classes (in ``logits_BC``) or colour channels (in ``pixels_BCHW``), L tokens,
D = ``config.hidden``, the width of the fused vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmray.config import Model
from mmray.model import image, text, weights
from mmray.model.cross_attention import CrossAttention
from mmray.model.features import Encoder, Features
from mmray.model.fusion import Bilinear, Concat, Film, Fusion, Gated, Projection
from mmray.model.missing import StandIn
from mmray.model.spec import ModelSpec

#: ``model.fusion`` -> its module.
FUSIONS: dict[str, type[Fusion]] = {
    "concat": Concat,
    "gated": Gated,
    "film": Film,
    "bilinear": Bilinear,
    "cross_attention": CrossAttention,
}


class FusionModel(nn.Module):
    """A classifier over pairs, or over one modality of them (``spec.config.modalities``).

    With one modality the other's encoder and the fusion are not there at all. ``no_image`` and
    ``no_text`` are there where a row may lack its picture or its caption (``missing``).
    """

    image: image.ImageEncoder | None
    text: text.TextEncoder | None
    no_image: StandIn | None
    no_text: StandIn | None
    fusion: Fusion | Projection

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        cfg = spec.config
        self.spec = spec
        self.image = self.text = self.no_image = self.no_text = None
        if cfg.uses_image:
            self.image = image.build(cfg.image, image_size=spec.image_size)
        if cfg.uses_text:
            assert spec.vocab_size is not None
            self.text = text.build(
                cfg.text,
                vocab_size=spec.vocab_size,
                max_tokens=spec.max_tokens,
                dropout=cfg.dropout,
                hf_config=spec.hf_config,
            )
        if self.image is not None and self.text is not None:
            fusion = FUSIONS[cfg.fusion]
            self.fusion = fusion(self.image.dim, self.text.dim, cfg.hidden, cfg.dropout)
            if cfg.missing:
                self.no_image, self.no_text = StandIn(self.image.dim), StandIn(self.text.dim)
        else:
            (alone,) = self.encoders()
            self.fusion = Projection(alone.dim, cfg.hidden, cfg.dropout)
        self.head = nn.Sequential(nn.Dropout(cfg.dropout), nn.Linear(cfg.hidden, spec.num_classes))

    def forward(
        self,
        pixels_BCHW: Tensor | None,
        tokens_BL: Tensor | None,
        mask_BL: Tensor | None,
        pictured_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits float32 [B, classes] and embedding float32 [B, D] (the vector under the head).

        ``pixels``: uint8 [B, 3, size, size] RGB; ``tokens``: int64 [B, L <= max_tokens]; ``mask``:
        bool [B, L], True for real tokens. An unused modality's input is ignored and may be None.

        Where one may be missing: a row without any real token has no caption; ``pictured`` says
        which rows have a picture, bool [B], None: all; and None for ``pixels`` or ``tokens`` says
        that no row has any.
        """
        features = []
        if self.image is not None:
            features.append(self._see(pixels_BCHW, pictured_B, tokens_BL))
        if self.text is not None:
            features.append(self._read(tokens_BL, mask_BL, pixels_BCHW))
        if isinstance(self.fusion, Projection):
            fused_BD = self.fusion(features[0].pooled)
        else:
            fused_BD = self.fusion(*features)
        embedding_BD = fused_BD.float()
        # In bfloat16 logits of 2 lie 0.016 apart: rows would tie, and the first label win.
        with torch.autocast(embedding_BD.device.type, enabled=False):
            return self.head(embedding_BD), embedding_BD

    def _see(
        self, pixels: Tensor | None, pictured_B: Tensor | None, tokens: Tensor | None
    ) -> Features:
        assert self.image is not None
        if self.no_image is None:
            assert pixels is not None and pictured_B is None, "this model needs pictures"
            features: Features = self.image(pixels)
            return features
        return self.no_image.pictures(self.image, pixels, pictured_B, _rows(pixels, tokens))

    def _read(
        self, tokens: Tensor | None, mask_BL: Tensor | None, pixels: Tensor | None
    ) -> Features:
        assert self.text is not None
        if tokens is None and self.no_text is not None:
            assert pixels is not None
            tokens = torch.zeros(len(pixels), 1, dtype=torch.int64, device=pixels.device)
            mask_BL = torch.zeros_like(tokens, dtype=torch.bool)
        assert tokens is not None and mask_BL is not None, "this model needs captions"
        features: Features = self.text(tokens.masked_fill(~mask_BL, self.spec.pad_id), mask_BL)
        return features if self.no_text is None else self.no_text.captions(features, mask_BL.any(1))

    def encoders(self) -> list[Encoder]:
        """The encoders there are, image first."""
        return [encoder for encoder in (self.image, self.text) if encoder is not None]


def _rows(*inputs: Tensor | None) -> int:
    return next(len(given) for given in inputs if given is not None)


def build_model(spec: ModelSpec) -> FusionModel:
    """The model of ``spec`` with random weights (``torch.manual_seed`` decides which), on the CPU.

    Needs no file and no network. Convolution kernels lie channels-last in memory: make tensors
    ``.contiguous()`` before writing them to safetensors.
    """
    return FusionModel(spec)


def load_pretrained(model: FusionModel, cfg: Model) -> None:
    """Load the pretrained weights ``cfg`` names into a freshly built model, in place.

    Only where training starts: a bundle holds all weights itself. Raises ConfigError when a file
    is missing or does not fit, naming the first keys.
    """
    if isinstance(model.image, image.Torchvision) and cfg.image.weights is not None:
        weights.load(model.image.net, cfg.image, head=model.image.family.head)
    elif isinstance(model.image, image.SmallCNN) and cfg.image.weights is not None:
        weights.load(model.image.net, cfg.image, head=None)
    if isinstance(model.text, text.HuggingFace):
        model.text.load(cfg.text.encoder.removeprefix(text.HF))
