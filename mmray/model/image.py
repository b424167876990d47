"""Image encoders: uint8 pixels -> Features.

Shapes: B rows, C=3 colour channels (RGB), H x W pixels (h x w after the encoder's strides),
P = h * w patches, D width.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmray.config import ImageModel
from mmray.errors import ConfigError
from mmray.model import weights, zoo
from mmray.model.features import Encoder, Features

SMALL_CNN = "small_cnn"


class Normalize(nn.Module):
    """uint8 [B, 3, H, W] in 0..255 -> float32 of the same shape, channels last in memory."""

    mean: Tensor
    scale: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        mean, std = (torch.tensor(values) * 255 for values in weights.NORMALIZE[name])
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("scale", 1 / std, persistent=False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BHWC = pixels_BCHW.permute(0, 2, 3, 1).to(
            torch.float32, memory_format=torch.contiguous_format
        )
        # Whole lines of a picture at once: three channels at a time leave vector units idle.
        width = x_BHWC.shape[2]
        lines = x_BHWC.flatten(2)
        lines.sub_(self.mean.repeat(width)).mul_(self.scale.repeat(width))
        return x_BHWC.permute(0, 3, 1, 2)


class ImageEncoder(Encoder):
    """``forward(pixels_BCHW uint8)`` -> Features; tokens are patches, row by row."""

    net: nn.Module

    def __init__(self, normalize: str | Normalize) -> None:
        super().__init__()
        self.normalize = normalize if isinstance(normalize, Normalize) else Normalize(normalize)

    def forward(self, pixels_BCHW: Tensor) -> Features:
        alone = self.training and len(pixels_BCHW) == 1
        with self.grad_mode(), _running_statistics(self) if alone else nullcontext():
            return self.encode(self.normalize(pixels_BCHW))

    def encode(self, x_BCHW: Tensor) -> Features:
        """``x``: float32, normalised."""
        raise NotImplementedError


@contextmanager
def _running_statistics(encoder: nn.Module) -> Iterator[None]:
    """Context in which batch norms go by what they have gathered: a single picture, whose last map
    may be one pixel, has no statistics."""
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


class SmallCNN(ImageEncoder):
    """Four blocks of convolution, batch norm, ReLU and pooling: the field's usual small model."""

    WIDTHS = (32, 64, 128, 256)

    def __init__(self, normalize: str) -> None:
        super().__init__(normalize)
        blocks, before = [], 3
        for width in self.WIDTHS:
            blocks.append(
                nn.Sequential(
                    # At full resolution most of the time would go into the first block.
                    nn.Conv2d(before, width, 3, 2 if before == 3 else 1, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                    nn.MaxPool2d(2, ceil_mode=True),
                )
            )
            before = width
        self.net = nn.Sequential(*blocks)
        self.dim = before

    def encode(self, x_BCHW: Tensor) -> Features:
        return _spatial(self.net(x_BCHW))


@dataclass(frozen=True, slots=True)
class Family:
    """How torchvision networks of one kind are cut: ``head`` is the part to leave out, ``encode``
    runs the rest."""

    head: str
    encode: Callable[[Any, Tensor], Features]


def _spatial(x_BDhw: Tensor) -> Features:
    return Features(x_BDhw.mean((2, 3)), x_BDhw.flatten(2).transpose(1, 2))


def _features(net: Any, x_BCHW: Tensor) -> Features:
    return _spatial(net.features(x_BCHW))


def _resnet(net: Any, x_BCHW: Tensor) -> Features:
    x = net.maxpool(net.relu(net.bn1(net.conv1(x_BCHW))))
    return _spatial(net.layer4(net.layer3(net.layer2(net.layer1(x)))))


def _regnet(net: Any, x_BCHW: Tensor) -> Features:
    return _spatial(net.trunk_output(net.stem(x_BCHW)))


def _convnext(net: Any, x_BCHW: Tensor) -> Features:
    norm = net.classifier[0]  # over channels; torchvision pools first
    x_BDhw = net.features(x_BCHW)
    pooled_BD = norm(x_BDhw.mean((2, 3), keepdim=True)).flatten(1)
    return Features(pooled_BD, norm(x_BDhw).flatten(2).transpose(1, 2))


def _swin(net: Any, x_BCHW: Tensor) -> Features:
    x_BhwD = net.norm(net.features(x_BCHW))
    return Features(x_BhwD.mean((1, 2)), x_BhwD.flatten(1, 2))


def _vit(net: Any, x_BCHW: Tensor) -> Features:
    x_BPD = net._process_input(x_BCHW)
    x_BPD = net.encoder(torch.cat([net.class_token.expand(x_BPD.shape[0], -1, -1), x_BPD], dim=1))
    return Features(x_BPD[:, 0], x_BPD[:, 1:])


#: first part of a torchvision name -> its family
FAMILIES: dict[str, Family] = {
    "resnet": Family("fc", _resnet),
    "resnext": Family("fc", _resnet),
    "wide_resnet": Family("fc", _resnet),
    "regnet": Family("fc", _regnet),
    "mobilenet_v2": Family("classifier", _features),
    "mobilenet_v3": Family("classifier", _features),
    "efficientnet": Family("classifier", _features),
    "convnext": Family("classifier.2", _convnext),
    "swin": Family("head", _swin),
    "vit": Family("heads", _vit),
}


class Torchvision(ImageEncoder):
    """A torchvision classification network without its classifier.

    ``net`` keeps torchvision's parameter names. Pooled is what its classifier is given: the mean
    over patches, or the class token of a vision transformer.
    """

    def __init__(self, name: str, normalize: str, *, width: float, image_size: int) -> None:
        super().__init__(normalize)
        self.name = name
        self.family = _family(name)
        self.net = _network(name, width, image_size)
        head = self.net.get_submodule(self.family.head)
        self.dim = next(m.in_features for m in head.modules() if isinstance(m, nn.Linear))
        self.net.set_submodule(self.family.head, nn.Identity())

    def encode(self, x_BCHW: Tensor) -> Features:
        return self.family.encode(self.net, x_BCHW)


def _network(name: str, width: float, image_size: int) -> nn.Module:
    models = zoo.models()
    net: nn.Module
    if name.startswith("mobilenet"):
        net = models.get_model(name, weights=None, width_mult=width)
    elif name.startswith("vit"):
        net = models.get_model(name, weights=None, image_size=image_size)
    else:
        net = models.get_model(name, weights=None)
    return net


def _family(name: str) -> Family:
    matches = [prefix for prefix in FAMILIES if name.startswith(prefix)]
    if name not in encoders() or not matches:
        near = difflib.get_close_matches(name, encoders(), n=4, cutoff=0.5)
        hint = f"near: {', '.join(near)}; " if near else ""
        raise ConfigError(
            f"model.image.encoder: got {name!r}; {hint}allowed: {SMALL_CNN} and torchvision's "
            f"{', '.join(FAMILIES)} networks"
        )
    return FAMILIES[matches[0]]


def encoders() -> list[str]:
    """Every name ``model.image.encoder`` may have."""
    models = zoo.models()
    names = models.list_models(module=models)
    return [SMALL_CNN, *(name for name in names if name.startswith(tuple(FAMILIES)))]


def build(cfg: ImageModel, *, image_size: int) -> ImageEncoder:
    """The encoder ``cfg`` names, with random weights; ``weights.load`` brings in its own."""
    encoder: ImageEncoder
    if cfg.encoder == SMALL_CNN:
        encoder = SmallCNN(cfg.normalize)
    else:
        encoder = Torchvision(cfg.encoder, cfg.normalize, width=cfg.width, image_size=image_size)
    encoder.settle(pretrained=cfg.weights is not None, frozen=cfg.frozen)
    # float kernels of convolutions run fastest on channels-last memory
    return encoder.to(memory_format=torch.channels_last)


def check(cfg: ImageModel, image_size: int) -> None:
    """Raise ConfigError when ``cfg`` names what is not there or contradicts itself."""
    if cfg.encoder != SMALL_CNN:
        _family(cfg.encoder)
    if cfg.width != 1.0 and not cfg.encoder.startswith("mobilenet"):
        raise ConfigError(
            f"model.image.width: got {cfg.width} with encoder {cfg.encoder!r}; only MobileNets "
            f"have a width multiplier"
        )
    if cfg.freeze and cfg.weights is None:
        raise ConfigError(
            "model.image.freeze: got true with model.image.weights null, so random weights would "
            "be kept; name weights or set freeze to false"
        )
    if cfg.encoder.startswith("vit") and image_size % (patch := int(cfg.encoder[-2:])):
        raise ConfigError(
            f"preprocess.image.size: got {image_size}; {cfg.encoder} needs a multiple of {patch}"
        )
    if cfg.weights is not None:
        weights.check(cfg)
