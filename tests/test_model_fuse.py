"""Without these, what a convolution does beside could change a score, and nobody would see why."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from encoders import fitted
from torch import Tensor, fx, nn

from mmray.config import ImageModel, Model, TextModel
from mmray.model import build_model, int8, make_spec, packed
from mmray.model.features import Features
from mmray.model.fuse import FusedEncoder, fuse, fused
from mmray.model.image import ImageEncoder, Torchvision
from mmray.model.packed import FusedConv2d, PackedConv2d
from mmray.model.speed import for_inference, round_weights

pytestmark = pytest.mark.skipif(not packed.supported(), reason="torch has no oneDNN here")


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
    plain, pixels = fitted(name)
    with torch.inference_mode():
        expected = plain(pixels)
        made = fused(plain)
        found = made(pixels)
        alone = torch.cat([made(row).pooled for row in pixels.split(1)])
    assert expected.pooled.std() > 1e-3, "else nothing is compared"
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=0, atol=1e-3)
    torch.testing.assert_close(alone, expected.pooled, rtol=0, atol=1e-3)
    left = calls(made)
    assert "clone" not in left, "which would be a pass over maps that is not needed"
    assert "FusedConv2d" in left and not set(left) & set(TAKEN_OVER[name])


@pytest.mark.skipif(not packed.supported(bf16=True), reason="no bfloat16 on this CPU")
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_in_bfloat16_it_is_no_further_from_float32_than_without(name: str) -> None:
    plain, pixels = fitted(name)
    with torch.inference_mode():
        exact = plain(pixels).pooled
        round_weights(plain)
        with torch.autocast("cpu", torch.bfloat16):
            before = plain(pixels).pooled.float()
            after = fused(plain)(pixels).pooled.float()
    assert 0 < (after - exact).norm() < 1.1 * (before - exact).norm()


class Forked(ImageEncoder):
    """Calls and values that must stay apart: what is added, or comes before an activation, is read
    again, written over elsewhere, or is what the convolution itself reads."""

    def __init__(self, kind: str = "again", dim: int = 3) -> None:
        super().__init__("symmetric")
        self.dim, self.kind = dim, kind
        self.one = nn.Conv2d(3, dim, 3, padding=1)
        self.two, self.three, self.four = (nn.Conv2d(dim, dim, 3, padding=1) for _ in range(3))
        self.relu, self.pool, self.over = nn.ReLU(), nn.MaxPool2d(2), nn.SiLU(inplace=True)
        self.shift = nn.Parameter(torch.randn(1, dim, 1, 1))

    def encode(self, x_BCHW: Tensor) -> Features:
        y = getattr(self, self.kind)(self.pool(self.relu(self.one(x_BCHW))))
        return Features(y.mean((2, 3)), y.flatten(2))

    def again(self, x: Tensor) -> Tensor:
        y = self.two(x) + x
        z = self.relu(y)
        doubled = self.three(z) + y
        return z * x + y + doubled + 1

    def called_twice(self, x: Tensor) -> Tensor:
        return self.relu(self.two(self.relu(self.two(x))))

    def itself(self, x: Tensor) -> Tensor:
        return self.relu(self.two(x) + x)

    def twice(self, x: Tensor) -> Tensor:
        y = self.two(x)
        return y + y

    def two_shortcuts(self, x: Tensor) -> Tensor:
        y, z = self.two(self.four(x)), self.three(x)
        return self.relu(z + self.relu(y + x))

    def written_over(self, x: Tensor) -> Tensor:
        y = self.two(x)
        return y + self.three(self.over(x))

    def activation_behind(self, x: Tensor) -> Tensor:
        y = self.two(x)
        z = self.over(x)
        return z * self.relu(y)

    def broadcast(self, x: Tensor) -> Tensor:
        return self.relu(self.two(x) + self.shift)


KINDS = [
    "again", "called_twice", "itself", "twice", "two_shortcuts", "written_over",
    "activation_behind", "broadcast",
]  # fmt: skip


@pytest.mark.parametrize("in_8_bits", [False, True], ids=["floats", "8 bits"])
@pytest.mark.parametrize("dim", [3, 64], ids=["3 channels", "64 channels"])  # two ways of oneDNN's
@pytest.mark.parametrize("kind", KINDS)
def test_no_value_is_lost_in_any_order_of_calls(
    kind: str, dim: int, in_8_bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_8_bits and not int8.supported():
        pytest.skip("this CPU does not multiply 8-bit integers")
    torch.manual_seed(0)
    plain = Forked(kind, dim).eval().requires_grad_(False)
    pixels = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    with torch.inference_mode():
        if in_8_bits:
            monkeypatch.setattr(int8, "WORTH", 1)
            with int8.observed(plain) as ranges:
                plain(pixels)
            del ranges["one"]
            int8.quantize(plain, ranges, torch.float32)
        expected = plain(pixels)
        made = fused(plain)
        found = made(pixels)
    assert isinstance(made, FusedEncoder)
    atol = 0.02 if in_8_bits else 1e-5
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=0, atol=atol)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=0, atol=atol)


@pytest.mark.skipif(not int8.supported(), reason="this CPU does not multiply 8-bit integers")
@pytest.mark.parametrize("in_8_bits", [False, True], ids=["floats", "8 bits"])
def test_weights_that_are_no_numbers_keep_their_scores_from_being_any(in_8_bits: bool) -> None:
    image = ImageModel(encoder="resnet18")
    cfg = Model(modalities="image", image=image, text=TextModel(encoder="bag"))
    spec = make_spec(cfg, num_classes=3, vocab_size=10, pad_id=0, max_tokens=8, image_size=64)
    for weight, kind in ((0.1, FusedEncoder), (torch.nan, Torchvision)):
        model = build_model(spec)
        assert model.image is not None
        name = "layer1.0.conv2"
        with torch.no_grad():
            model.image.get_parameter(f"net.{name}.weight").fill_(weight)
        fuse(for_inference(model, ranges={name: (0.0, 1.0)} if in_8_bits else None))
        assert type(model.image) is kind


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
from mmray.model.int8 import Int8Conv2d
from mmray.model.packed import FusedConv2d

conv = nn.Conv2d(256, 1024, 1).requires_grad_(False)  # of ResNet-50
made = {made}
x = torch.rand(16, 256, 14, 14).to(memory_format=torch.channels_last)
made(x[:8]), made(x[:1])
with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
    for rows in (1, 3, 8, 16):
        made(x[:rows])
"""


@pytest.mark.parametrize(
    "made", ["FusedConv2d(conv)", "Int8Conv2d(conv, (0.0, 1.0), torch.bfloat16)"]
)
def test_weights_are_laid_out_once_for_a_row_and_once_for_many(made: str) -> None:
    if "Int8" in made and not int8.supported():
        pytest.skip("this CPU does not multiply 8-bit integers")
    script = [sys.executable, "-c", LAID_OUT.format(made=made)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=True)
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
