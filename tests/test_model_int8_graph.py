"""Without these, values that stay in 8 bits could be others than the convolutions around expect."""

from __future__ import annotations

import pytest
import torch
from encoders import fitted
from torch import Tensor, nn

from mmray.model import int8, packed
from mmray.model.fuse import fused
from mmray.model.int8 import Int8Conv2d, Rounded

pytestmark = pytest.mark.skipif(
    not (int8.supported() and packed.supported()),
    reason="this CPU does not multiply 8-bit integers",
)


def of_kind(net: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, kind)]


#: Encoder -> how many of its convolutions in 8 bits give them too, and what is rounded by itself:
#: what comes out of the pool, and of blocks that end in floats as their shortcut does, or for a
#: convolution too small to be worth it.
EIGHTS = {"resnet18": (12, 4), "resnet50": (31, 11)}


@pytest.mark.parametrize("name", EIGHTS)
def test_values_stay_in_8_bits_and_little_is_lost_by_it(name: str) -> None:
    plain, pixels = fitted(name)
    with torch.inference_mode():
        with int8.observed(plain.net) as ranges:
            exact = plain(pixels).pooled
        int8.quantize(plain.net, ranges, torch.float32)
        alone = plain(pixels).pooled
        made = fused(plain)
        found = made(pixels).pooled
        by_row = torch.cat([made(row).pooled for row in pixels.split(1)])
        again = made(pixels.flip(0)).pooled.flip(0)
    eights = [m for m in of_kind(made.net, Int8Conv2d) if m.dtype == torch.uint8]
    assert (len(eights), len(of_kind(made.net, Rounded))) == EIGHTS[name]
    off = (alone - exact).norm()  # much, of a network that was never trained
    assert 0 < (found - alone).norm() < off
    assert (found - exact).norm() < 1.2 * off
    assert torch.equal(again, found)
    assert (by_row - found).norm() < 0.2 * off


@pytest.mark.parametrize("name", EIGHTS)
def test_each_convolution_gives_a_row_the_same_alone_and_among_others(name: str) -> None:
    plain, pixels = fitted(name)
    with torch.inference_mode():
        with int8.observed(plain.net) as ranges:
            plain(pixels)
        int8.quantize(plain.net, ranges, torch.float32)
        made = fused(plain)
        convs = of_kind(made.net, Int8Conv2d)
        taken: dict[nn.Module, list[Tensor | None]] = {}
        gave: dict[nn.Module, Tensor] = {}

        def take(module: nn.Module, given: tuple[Tensor | None, ...]) -> None:
            taken[module] = [None if x is None else x.clone() for x in given]  # before it is added

        def give(module: nn.Module, given: object, output: Tensor) -> None:
            gave[module] = output.clone()

        hooks = [conv.register_forward_pre_hook(take) for conv in convs]
        hooks += [conv.register_forward_hook(give) for conv in convs]
        made(pixels)
        for hook in hooks:
            hook.remove()
        assert len(gave) == len(convs) == len(ranges)
        for conv, output in gave.items():
            rows = [[None if x is None else x[i : i + 1] for x in taken[conv]] for i in range(6)]
            alone = torch.cat([conv(*row) for row in rows])
            if output.dtype == torch.uint8 or name == "resnet18":
                assert torch.equal(alone, output)
            else:  # floats of another kernel for 1 x 1 and one row: their last bit
                torch.testing.assert_close(alone, output, rtol=0, atol=1e-5)
