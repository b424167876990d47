"""Pretrained image weights: a torchvision enum name or a local file, matched key by key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmray.config import ImageModel
from mmray.errors import ConfigError
from mmray.model import zoo

SUFFIXES = (".safetensors", ".pt", ".pth")
KEY = "model.image.weights"

#: mean and standard deviation of pixel values in [0, 1], per channel
NORMALIZE = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def is_file(weights: str) -> bool:
    """Whether ``weights`` means a file, rather than a torchvision enum name."""
    return weights.endswith(SUFFIXES) or os.sep in weights or "/" in weights


def check(cfg: ImageModel) -> None:
    """Raise ConfigError when ``cfg.weights`` names nothing that is there."""
    assert cfg.weights is not None
    if not is_file(cfg.weights):
        _check_enum(cfg)
    elif not cfg.weights.endswith(SUFFIXES):
        raise ConfigError(f"{KEY}: got {cfg.weights!r}; a file ends in {', '.join(SUFFIXES)}")
    elif not os.path.isfile(cfg.weights):
        raise ConfigError(f"{KEY}: {cfg.weights}: no such file (seen from {os.getcwd()})")


def load(net: nn.Module, cfg: ImageModel, *, head: str | None) -> None:
    """Load ``cfg.weights`` into ``net``, every parameter and buffer of it.

    The file may hold the whole classifier (its ``head`` is left out), the network without it, or
    its ``features`` module alone. Raises ConfigError with the first keys that do not fit.
    """
    assert cfg.weights is not None
    check(cfg)
    tensors = _read_file(cfg.weights) if is_file(cfg.weights) else _download(cfg)
    wanted = net.state_dict()
    net.load_state_dict(_matched(tensors, wanted, head, cfg), strict=True)


def _matched(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], head: str | None, cfg: ImageModel
) -> dict[str, Tensor]:
    """``tensors`` under the names of ``wanted``; the same names and shapes, or ConfigError."""
    found = {
        key: value
        for key, value in tensors.items()
        if head is None or not key.startswith(head + ".")
    }
    if wanted.keys() != found.keys() and all(key.startswith("features.") for key in wanted):
        prefixed = {"features." + key: value for key, value in tensors.items()}
        if prefixed.keys() & wanted.keys():
            found = prefixed
    # Files from before torch 0.4.1 lack these counters, and so do several of torchvision's.
    for key in wanted.keys() - found.keys():
        if key.endswith(".num_batches_tracked"):
            found[key] = wanted[key]
    problems = [f"missing {key}" for key in wanted if key not in found]
    problems += [f"unknown {key}" for key in found if key not in wanted]
    problems += [
        f"{key} has shape {list(found[key].shape)}, needed {list(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError(
            f"{KEY}: {cfg.weights} does not fit {cfg.encoder} at width {cfg.width:g}: "
            f"{', '.join(problems[:3])}{more}"
        )
    return found


def _read_file(path: str) -> dict[str, Tensor]:
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        raise ConfigError(f"{KEY}: {path}: not readable: {' '.join(str(error).split())}") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ConfigError(f"{KEY}: {path}: holds no state dict (names and tensors)")
    return tensors


def _download(cfg: ImageModel) -> dict[str, Tensor]:
    entry = _enum(cfg)
    try:
        tensors: dict[str, Tensor] = entry.get_state_dict(
            progress=False, check_hash=True, weights_only=True
        )
    except (URLError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"{KEY}: {cfg.weights} cannot be downloaded from {entry.url} ({error}); fetch it "
            f"elsewhere and give the file's path"
        ) from None
    return tensors


def _check_enum(cfg: ImageModel) -> None:
    transforms = _enum(cfg).transforms()
    trained_with = (tuple(transforms.mean), tuple(transforms.std))
    if trained_with != NORMALIZE[cfg.normalize]:
        right = [name for name, values in NORMALIZE.items() if values == trained_with]
        raise ConfigError(
            f"model.image.normalize: got {cfg.normalize!r}; {cfg.weights} of {cfg.encoder} was "
            f"trained with {right[0] if right else trained_with}"
        )
    if cfg.width != 1.0:
        raise ConfigError(
            f"model.image.width: got {cfg.width}; {cfg.weights} of {cfg.encoder} has width 1"
        )


def _enum(cfg: ImageModel) -> Any:
    """The torchvision weight entry ``cfg.weights`` names, with or without its class name."""
    assert cfg.weights is not None
    try:
        entries = zoo.models().get_model_weights(cfg.encoder)
    except ValueError:
        entries = None
    if entries is None:
        raise ConfigError(
            f"{KEY}: got {cfg.weights!r}; torchvision has none for {cfg.encoder!r}: give a file "
            f"({', '.join(SUFFIXES)}) or null"
        )
    class_name, _, member = cfg.weights.rpartition(".")
    if class_name not in ("", entries.__name__) or member not in entries.__members__:
        allowed = ", ".join(str(entry) for entry in entries)
        raise ConfigError(
            f"{KEY}: got {cfg.weights!r}; allowed for {cfg.encoder}: {allowed}, a file "
            f"({', '.join(SUFFIXES)}), null"
        )
    return entries[member]
