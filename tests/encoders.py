"""Image encoders whose batch norms fit what they are shown, so that values keep their size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmray.config import ImageModel
from mmray.model import image
from mmray.model.image import ImageEncoder
from mmray.model.speed import fold_batch_norms


def fitted(name: str) -> tuple[ImageEncoder, Tensor]:
    """With its batch norms folded; and the pixels that it was shown: uint8 [6, 3, 64, 64]."""
    torch.manual_seed(0)
    made = image.build(ImageModel(encoder=name), image_size=64)
    pixels = torch.randint(0, 256, (6, 64, 64, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
        elif type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    with torch.no_grad():
        made.train()(pixels)
    fold_batch_norms(made.eval().requires_grad_(False).net)
    return made, pixels
