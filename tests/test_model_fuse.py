"""Without these, what a convolution does beside could change a score, and nobody would see why."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, fx, nn

from mmray.config import ImageModel
from mmray.model import image, packed
from mmray.model.features import Features
from mmray.model.fuse import FusedEncoder, fused
from mmray.model.image import ImageEncoder
from mmray.model.packed import FusedConv2d, PackedConv2d
from mmray.model.speed import fold_batch_norms, round_weights

pytestmark = pytest.mark.skipif(not packed.supported(), reason="torch has no oneDNN here")


def encoder(name: str) -> tuple[ImageEncoder, Tensor]:
    """With batch norms that fit these pixels, folded; and the pixels."""
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


def calls(made: ImageEncoder) -> list[str]:
    assert isinstance(made, FusedEncoder) and isinstance(made.net, fx.GraphModule)
    modules = dict(made.net.named_modules())
    return [
        type(modules[str(node.target)]).__name__
        if node.op == "call_module"
        else getattr(node.target, "__name__", str(node.target))
        for node in made.net.graph.nodes
    ]


#: Encoder -> what it had, and has no more.
TAKEN_OVER = {
    "small_cnn": ["ReLU"],
    "resnet18": ["ReLU", "add"],
    "resnext50_32x4d": ["ReLU", "add"],
    "regnet_y_400mf": ["ReLU", "Sigmoid", "add"],
    "mobilenet_v2": ["ReLU6", "add"],
    "mobilenet_v3_small": ["ReLU", "Hardswish", "Hardsigmoid", "add"],
    "efficientnet_b0": ["SiLU", "Sigmoid", "StochasticDepth", "add"],
    "convnext_tiny": [],
    "swin_t": [],
    "vit_b_32": [],
}


@pytest.mark.parametrize("name", TAKEN_OVER)
def test_features_stay_and_their_activations_and_additions_are_no_calls_of_their_own(
    name: str,
) -> None:
    plain, pixels = encoder(name)
    with torch.inference_mode():
        expected = plain(pixels)
        made = fused(copy.deepcopy(plain))
        found = made(pixels)
        alone = torch.cat([made(row).pooled for row in pixels.split(1)])
    assert expected.pooled.std() > 1e-3, "else nothing is compared"
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=0, atol=1e-3)
    torch.testing.assert_close(alone, expected.pooled, rtol=0, atol=1e-3)
    left = calls(made)
    assert "FusedConv2d" in left and not set(left) & set(TAKEN_OVER[name])


@pytest.mark.skipif(not packed.supported(bf16=True), reason="no bfloat16 on this CPU")
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_in_bfloat16_it_is_no_further_from_float32_than_without(name: str) -> None:
    plain, pixels = encoder(name)
    with torch.inference_mode():
        exact = plain(pixels).pooled
        round_weights(plain)
        with torch.autocast("cpu", torch.bfloat16):
            before = plain(pixels).pooled.float()
            after = fused(plain)(pixels).pooled.float()
    assert 0 < (after - exact).norm() < 1.1 * (before - exact).norm()


class Forked(ImageEncoder):
    """What is added, and what comes before an activation, is read again afterwards."""

    def __init__(self) -> None:
        super().__init__("symmetric")
        self.dim = 3
        self.one, self.two, self.three = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)

    def encode(self, x_BCHW: Tensor) -> Features:
        x = self.pool(self.one(x_BCHW))
        y = self.two(x) + x
        z = self.relu(self.three(y))
        twice = self.three(z)
        doubled = self.one(twice) + y
        return Features((z * x + y + doubled + 1).mean((2, 3)), (twice + twice).flatten(2))


def test_what_is_read_again_is_not_overwritten() -> None:
    torch.manual_seed(0)
    plain = Forked().eval().requires_grad_(False)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        expected = plain(pixels)
        made = fused(copy.deepcopy(plain))
        found = made(pixels)
    torch.testing.assert_close(found.pooled, expected.pooled)
    torch.testing.assert_close(found.tokens, expected.tokens)
    assert calls(made).count("ReLU") == 1, "it is called after a convolution that is called twice"


def test_what_cannot_be_traced_computes_as_before() -> None:
    class Branching(Forked):
        def encode(self, x_BCHW: Tensor) -> Features:
            x = self.one(x_BCHW) if x_BCHW.mean() > -9 else x_BCHW
            return Features(x.mean((2, 3)), x.flatten(2))

    plain = Branching().eval().requires_grad_(False)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        expected = plain(pixels)
        made = fused(plain)
        assert not isinstance(made, FusedEncoder)
        torch.testing.assert_close(made(pixels).pooled, expected.pooled)


def test_other_paddings_than_zeros_stay_torchs_own() -> None:
    class Padded(Forked):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 3, 3, padding="same")
            self.two = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")

    made = fused(Padded().eval())
    assert [isinstance(m, PackedConv2d) for m in (made.net.one, made.net.two)] == [False, False]


LAID_OUT = """
import torch
from torch import nn
from mmray.model.packed import FusedConv2d

made = FusedConv2d(nn.Conv2d(64, 256, 1).requires_grad_(False))
x = torch.rand(16, 64, 14, 14).to(memory_format=torch.channels_last)
made(x[:8]), made(x[:1])
with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
    for rows in (1, 3, 8, 16):
        made(x[:rows])
"""


def test_weights_are_laid_out_once_for_a_row_and_once_for_many() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAID_OUT], capture_output=True, text=True, timeout=120, check=True
    )
    lines = [line for line in done.stdout.splitlines() if ",exec," in line]
    assert sum(",convolution," in line for line in lines) == 4, done.stdout
    assert not [line for line in lines if ",reorder," in line]


def test_a_convolution_adds_and_then_applies_relu() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, padding=1).requires_grad_(False)
    x, added = torch.randn(2, 4, 9, 9), torch.randn(2, 8, 9, 9)
    made = FusedConv2d(conv)
    made.activation = packed.RELU
    with torch.inference_mode():
        torch.testing.assert_close(made(x, added.clone()), (conv(x) + added).relu())
        torch.testing.assert_close(made(x), conv(x).relu())
