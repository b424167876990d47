"""FusionModel: an encoder a modality, a fusion, a linear head.

Shapes: B rows, C classes (in ``logits_BC``) or colour channels (in ``pixels_BCHW``), L tokens,
D = ``config.hidden``, the width of the fused vector.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmray.config import Model
from mmray.model import image, text, weights
from mmray.model.features import Encoder
from mmray.model.fusion import FUSIONS, Fusion, Projection
from mmray.model.spec import ModelSpec


class FusionModel(nn.Module):
    """A classifier over pairs, or over one modality of them (``spec.config.modalities``).

    With one modality the other's encoder and the fusion are not there at all.
    """

    image: image.ImageEncoder | None
    text: text.TextEncoder | None
    fusion: Fusion | Projection

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        cfg = spec.config
        self.spec = spec
        self.image = self.text = None
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
        else:
            (alone,) = self.encoders()
            self.fusion = Projection(alone.dim, cfg.hidden, cfg.dropout)
        self.head = nn.Sequential(nn.Dropout(cfg.dropout), nn.Linear(cfg.hidden, spec.num_classes))

    def forward(
        self, pixels_BCHW: Tensor | None, tokens_BL: Tensor | None, mask_BL: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits float32 [B, classes] and embedding float32 [B, D] (the vector under the head).

        ``pixels``: uint8 [B, 3, size, size] RGB; ``tokens``: int64 [B, L <= max_tokens]; ``mask``:
        bool [B, L], True for real tokens. An unused modality's input is ignored and may be None.
        """
        features = []
        if self.image is not None:
            assert pixels_BCHW is not None, "this model needs pictures"
            features.append(self.image(pixels_BCHW))
        if self.text is not None:
            assert tokens_BL is not None and mask_BL is not None, "this model needs captions"
            tokens_BL = tokens_BL.masked_fill(~mask_BL, self.spec.pad_id)
            features.append(self.text(tokens_BL, mask_BL))
        if isinstance(self.fusion, Projection):
            fused_BD = self.fusion(features[0].pooled)
        else:
            fused_BD = self.fusion(*features)
        return self.head(fused_BD).float(), fused_BD.float()

    def encoders(self) -> list[Encoder]:
        """The encoders there are, image first."""
        return [encoder for encoder in (self.image, self.text) if encoder is not None]


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
