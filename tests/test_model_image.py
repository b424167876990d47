"""Without these a user's pictures would be seen wrongly scaled, or trained weights be undone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mmray.config import ImageModel
from mmray.errors import ConfigError
from mmray.model import image

#: the smallest network of every family
NETWORKS = [
    "small_cnn",
    "resnet18",
    "regnet_y_400mf",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "convnext_tiny",
    "swin_t",
    "vit_b_32",
]


def pixels(rows: int = 2, size: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_gives_pooled_and_patch_features(name: str) -> None:
    encoder = image.build(ImageModel(encoder=name), image_size=64).eval()
    with torch.inference_mode():
        features = encoder(pixels(2, 64))
    assert features.pooled.shape == (2, encoder.dim)
    assert features.tokens.shape == (2, 4, encoder.dim)  # one a 32 x 32 pixels
    assert features.mask is None
    assert torch.isfinite(features.pooled).all()
    if not name.startswith(("vit", "convnext")):  # a class token; a norm after the mean
        torch.testing.assert_close(features.pooled, features.tokens.mean(1))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "small_cnn"])
def test_pooled_is_what_torchvisions_classifier_is_given(name: str) -> None:
    from torchvision import models

    encoder = image.build(ImageModel(encoder=name), image_size=32)
    assert isinstance(encoder, image.Torchvision)
    whole = models.get_model(name, weights=None, **({"image_size": 32} if "vit" in name else {}))
    head = whole.get_submodule(encoder.family.head)
    seen: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    encoder.net.load_state_dict(whole.state_dict(), strict=False)
    with torch.inference_mode():
        whole.eval()(encoder.normalize(pixels()))
        pooled = encoder.eval()(pixels()).pooled
    torch.testing.assert_close(pooled, seen[0].flatten(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["imagenet", "symmetric", "unit"])
def test_normalize_from_bytes(name: str) -> None:
    x = pixels(1, 8)
    got = image.Normalize(name)(x)
    unit = x.double() / 255
    if name == "imagenet":
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        want = (unit - mean) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    else:
        want = {"symmetric": x.double() / 127.5 - 1, "unit": unit}[name]
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    lying_otherwise = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(image.Normalize(name)(lying_otherwise), got)
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=1e-5)
    assert not image.Normalize(name).state_dict()  # decided by config, so not among the weights


def test_small_cnn_takes_any_size() -> None:
    encoder = image.build(ImageModel(), image_size=224).eval()
    for size in (1, 7, 33):
        assert encoder(pixels(1, size)).pooled.shape == (1, encoder.dim)


@pytest.mark.parametrize(
    "name", [n for n in NETWORKS if not n.startswith(("convn", "swin", "vit"))]
)
def test_a_single_small_picture_can_be_learned_from(name: str) -> None:
    """A rank's part of a step may be one row, whose last map may be one pixel: of that there are no
    statistics. It leaves those that were gathered as they are."""
    encoder = image.build(ImageModel(encoder=name), image_size=16).train()
    before = {key: value.clone() for key, value in encoder.named_buffers()}
    encoder(pixels(1, 16)).pooled.sum().backward()
    assert not [key for key, p in encoder.named_parameters() if p.grad is None]  # DDP waits for all
    assert all(torch.equal(value, before[key]) for key, value in encoder.named_buffers())
    assert all(module.training for module in encoder.modules())
    encoder(pixels(4, 16))
    assert not all(torch.equal(value, before[key]) for key, value in encoder.named_buffers())


def test_width_makes_mobilenets_smaller() -> None:
    def parameters(width: float) -> int:
        encoder = image.build(ImageModel(encoder="mobilenet_v2", width=width), image_size=32)
        return sum(p.numel() for p in encoder.parameters())

    assert parameters(0.35) < parameters(1.0) / 3


@pytest.mark.parametrize(
    ("config", "size", "words"),
    [
        ({"encoder": "mobilenetv2"}, 224, ["model.image.encoder", "'mobilenetv2'", "mobilenet_v2"]),
        ({"encoder": "resnet19"}, 224, ["resnet18"]),
        ({"encoder": "alexnet"}, 224, ["allowed: small_cnn"]),
        ({"encoder": "resnet18", "width": 0.5}, 224, ["model.image.width", "0.5", "MobileNets"]),
        ({"encoder": "resnet18", "freeze": True}, 224, ["model.image.freeze", "random weights"]),
        ({"encoder": "vit_b_32"}, 100, ["preprocess.image.size", "100", "multiple of 32"]),
    ],
)
def test_a_wrong_encoder_is_refused_with_what_would_do(
    config: dict[str, object], size: int, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        image.check(ImageModel.model_validate(config), size)
    for word in words:
        assert word in str(error.value)


def test_building_a_network_does_not_import_the_compiler_but_using_it_does() -> None:
    script = """
import sys
import mmray.model.image as image
from mmray.config import ImageModel
image.build(ImageModel(encoder="resnet18"), image_size=64)
assert not any(name.startswith("torch._dynamo") for name in sys.modules)
user = sys.modules["torchvision.ops.roi_align"]
assert user.is_compile_supported("cpu") in (True, False)
assert "torch._dynamo" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
