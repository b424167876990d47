"""Without these 8-bit convolutions would give other numbers than the ones they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torchvision import models

from mmray.model import int8
from mmray.model.packed import RELU
from mmray.model.speed import fold_batch_norms

pytestmark = pytest.mark.skipif(
    not int8.supported(), reason="this CPU does not multiply 8-bit integers"
)


def convolution(stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(16, 40, kernel, stride, padding=kernel // 2).requires_grad_(False)


def in_floats(conv: nn.Conv2d, x: Tensor, taken: tuple[float, float]) -> Tensor:
    """What ``Int8Conv2d`` must give, from its definition."""
    low, high = taken
    step = (high - low) / 255
    zero = round(-low / step)
    x = ((x / step + zero).round().clamp(0, 255) - zero) * step
    scales = conv.weight.abs().amax((1, 2, 3), keepdim=True) / 127
    weight = (conv.weight / scales).round() * scales
    return conv2d(x, weight, conv.bias, conv.stride, conv.padding)


@pytest.mark.parametrize("taken", [(0.0, 3.0), (-0.375, 3.0)], ids=["unsigned", "signed"])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (1, 1)])
def test_it_is_the_convolution_of_rounded_inputs_and_weights(
    taken: tuple[float, float], stride: int, kernel: int
) -> None:
    conv = convolution(stride, kernel)
    x = torch.randn(3, 16, 13, 11).clamp(taken[0], 4.0)  # beyond 3 it saturates
    found = int8.Int8Conv2d(conv, taken, torch.float32)(x)
    torch.testing.assert_close(found, in_floats(conv, x, taken), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, conv(x), rtol=1e-4, atol=1e-4)


def test_what_another_one_reads_is_rounded_once_with_relu_in_it() -> None:
    conv = convolution()
    x = torch.rand(2, 16, 9, 9)
    made = int8.Int8Conv2d(conv, (0.0, 1.0), torch.float32)
    made.activation, made.dtype, made.out_scale = RELU, torch.uint8, 2.0 / 255
    found = made(x)
    expected = in_floats(conv, x, (0.0, 1.0)).relu().div(2.0 / 255).round().clamp(max=255)
    assert found.dtype == torch.uint8
    assert (found.float() - expected).abs().max() <= 1  # a tie may go either way
    assert (found.float() != expected).float().mean() < 0.01
    next_one = int8.Int8Conv2d(
        nn.Conv2d(40, 16, 3).requires_grad_(False), (0.0, 2.0), torch.float32
    )
    torch.testing.assert_close(next_one(found), next_one(found.float() * (2.0 / 255)))


@pytest.mark.parametrize("rounded", [False, True], ids=["floats", "8 bits"])
def test_a_shortcut_is_added_before_relu(rounded: bool) -> None:
    conv = convolution()
    x, added = torch.rand(2, 16, 9, 9), torch.rand(2, 40, 9, 9) * 3
    added = added.contiguous(memory_format=torch.channels_last)
    made = int8.Int8Conv2d(conv, (0.0, 1.0), torch.float32)
    made.activation = RELU
    given = added.clone()
    if rounded:
        made.dtype, made.added_scale, made.out_scale = torch.uint8, 3.0 / 255, 4.0 / 255
        given = int8.Rounded(3.0 / 255)(added)
        added = int8.Floats(3.0 / 255, torch.float32)(given)
    expected = (in_floats(conv, x, (0.0, 1.0)) + added).relu()
    found = made(x, given)
    if rounded:
        off = found.float() * (4.0 / 255) - expected.clamp(max=4.0)
        assert off.abs().max() <= 0.51 * 4.0 / 255
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_only_what_is_faster_is_taken() -> None:
    net = models.resnet18(weights=None)
    found = int8.worthwhile(net)
    assert len(found) == 17 and "layer2.0.downsample.0" not in found
    assert not any(
        m.groups > 1 for m in int8.worthwhile(models.mobilenet_v2(weights=None)).values()
    )


def resnet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = models.resnet18(weights=None).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # as training leaves them: of some size each
            module.running_var.uniform_(0.5, 2.0)
            module.running_mean.uniform_(-0.2, 0.2)
    fold_batch_norms(net)
    net.fc = nn.Identity()
    return net, torch.randn(6, 3, 96, 96).contiguous(memory_format=torch.channels_last)


def test_a_network_stays_what_it_was_and_no_row_depends_on_the_others() -> None:
    net, x = resnet()
    with int8.observed(net) as ranges, torch.inference_mode():
        expected = net(x)
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert len(ranges) == 17 and all(low <= 0 <= high for low, high in ranges.values())
    int8.quantize(net, ranges, torch.float32)
    made = [m for m in net.modules() if isinstance(m, int8.Int8Conv2d)]
    assert len(made) == 17
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def see(module: nn.Module, given: tuple[Tensor], gave: Tensor) -> None:
        seen.append((module, given[0].clone(), gave.clone()))  # ReLU works in place

    hooks = [module.register_forward_hook(see) for module in made]
    with torch.inference_mode():
        found = net(x)
        for hook in hooks:
            hook.remove()
        assert len(seen) == 17
        for module, given, gave in seen:
            assert torch.equal(torch.cat([module(row) for row in given.split(1)]), gave)
        alone = torch.cat([net(row) for row in x.split(1)])
        assert torch.equal(net(x.flip(0)).flip(0), found)
    off = (found - expected).abs().max() / expected.abs().max()
    assert 0 < off < 0.05
    # What is not in 8 bits may differ in its last bit by the size of the batch, as in any network;
    # here and there that is the next step of the 8 bits.
    assert (alone - found).norm() < 0.1 * (found - expected).norm()
