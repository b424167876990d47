"""Without these a faster pooling could take another value than the largest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmray.model.pooling import BitsMaxPool2d, faster

POOLS = [
    nn.MaxPool2d(3, 2, 1),  # of a ResNet
    nn.MaxPool2d(2, ceil_mode=True),  # of the small CNN
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, 1, 1),
    nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.MaxPool2d(5, 3, 2, ceil_mode=True),
    nn.MaxPool2d(1, 2),
]


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_gives_what_torchs_own_gives_to_the_bit(pool: nn.MaxPool2d, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = faster(pool)
    assert isinstance(made, BitsMaxPool2d)
    for height, width in ((16, 16), (15, 16), (16, 15), (7, 5), (6, 19)):
        x = torch.randn(2, 3, height, width).relu().to(dtype)
        x[0, 0, 0, 0] = torch.inf  # of a row that overflowed
        for given in (x.contiguous(memory_format=torch.channels_last), x):
            assert torch.equal(made(given), pool(given)), (height, width)


def test_memory_stays_as_convolutions_take_it_fastest() -> None:
    x = torch.rand(2, 3, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    made = faster(nn.MaxPool2d(3, 2, 1))
    assert made(x).is_contiguous(memory_format=torch.channels_last)


def test_a_pool_of_another_kind_is_left_alone() -> None:
    for pool in (nn.MaxPool2d(3, dilation=2), nn.MaxPool2d(3, return_indices=True)):
        assert faster(pool) is pool
