"""Convolutions in 8-bit integers, on CPUs that multiply those twice as fast as bfloat16.

As in Jacob et al. 2018 (arXiv:1712.05877): weights are rounded by output channel, what goes in by
the range that was seen before (``observed``), beyond which it saturates; sums are exact. What other
layers compute stays in the precision it has; between two convolutions in 8 bits values stay in 8
bits (``int8_graph``).

Shapes: B rows, C channels in, O out, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmray.config import Range
from mmray.errors import BundleError
from mmray.model.packed import PackedConv2d, is_plain

#: Multiplications that every value going in takes part in, from which on more time is won than
#: rounding the values takes; 3 x 3 to 64 channels are 576, 1 x 1 to 64 channels 64.
WORTH = 256
LEVELS = 255
SCRATCH = 250_000  # floats that a core's cache holds beside what they are made of
FLOAT_INTEGERS = 2.0**23  # float32 from here on have no fraction: adding it rounds


def supported() -> bool:
    """Whether this CPU multiplies 8-bit integers without overflow in between."""
    features = torch.cpu.get_capabilities()
    return any(features.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def eligible(net: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of ``net``, by name, that can compute in 8 bits."""
    return {
        name: module
        for name, module in net.named_modules()
        if type(module) is nn.Conv2d and module.groups == 1 and is_plain(module)
    }


def worthwhile(net: nn.Module) -> dict[str, nn.Conv2d]:
    """Those that are faster so."""
    return {
        name: module
        for name, module in eligible(net).items()
        if module.weight[:, 0].numel() / (module.stride[0] * module.stride[1]) >= WORTH
    }


@contextmanager
def observed(net: nn.Module) -> Iterator[dict[str, Range]]:
    """Context that fills in, as ``net`` runs, what goes into each convolution of ``worthwhile``;
    0, of which padding is made, is always in the range."""
    ranges: dict[str, Range] = {}

    def watch(name: str, x_BCHW: Tensor) -> None:
        low, high = (float(value) for value in x_BCHW.aminmax())
        before = ranges.get(name, (0.0, 0.0))
        ranges[name] = min(before[0], low), max(before[1], high)

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: watch(name, args[0]))
        for name, module in worthwhile(net).items()
    ]
    try:
        yield ranges
    finally:
        for hook in hooks:
            hook.remove()


def quantize(net: nn.Module, ranges: Mapping[str, Range], dtype: torch.dtype) -> None:
    """Put ``Int8Conv2d`` in the place of the convolutions ``ranges`` names, in place. ``dtype`` is
    what all else computes in: float32 or bfloat16.

    Batch norms are folded by then (``speed.fold_batch_norms``). Raises BundleError for a name that
    is none of ``eligible``.
    """
    found = eligible(net)
    if strange := sorted(ranges.keys() - found.keys()):
        raise BundleError(f"ranges of {strange[0]!r}, which is no convolution that has 8 bits")
    for name, taken in ranges.items():
        net.set_submodule(name, Int8Conv2d(found[name], taken, dtype))


class Int8Conv2d(PackedConv2d):
    """Takes floats, which it rounds, or what ``Rounded`` makes of them; gives ``dtype``.

    With ``dtype`` uint8 it gives what ``Rounded(out_scale)`` would, and takes ``added`` as such
    in steps of ``added_scale``.
    """

    ACTIVATIONS = frozenset({"relu", "hardtanh", "hardswish", "swish"})

    def __init__(self, conv: nn.Conv2d, taken: Range, dtype: torch.dtype) -> None:
        super().__init__(conv)
        weight_OCHW = conv.weight.detach().float()
        scales_O = weight_OCHW.abs().amax((1, 2, 3)).clamp_min(1e-12) / 127
        rounded_OCHW = (weight_OCHW / scales_O.view(-1, 1, 1, 1)).round().to(torch.int8)
        self.scale, self.zero = _grid(taken)
        self.dtype, self.out_scale, self.added_scale = dtype, 1.0, 1.0
        self.register_buffer("rounded", rounded_OCHW, persistent=False)
        self.register_buffer("scales", scales_O, persistent=False)
        self.register_buffer(
            "zeros", torch.zeros_like(scales_O, dtype=torch.int64), persistent=False
        )
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.float(), False)

    def forward(self, x_BCHW: Tensor, added_BOHW: Tensor | None = None) -> Tensor:
        if x_BCHW.dtype != torch.uint8:
            x_BCHW = rounded(x_BCHW, self.scale, self.zero)
        weight = self.packed(x_BCHW.shape)
        given = x_BCHW, self.scale, self.zero, weight, self.scales, self.zeros
        how = self.bias, self.stride, self.padding, self.dilation, 1, self.out_scale, 0, self.dtype
        out_BOHW: Tensor
        if added_BOHW is None:
            out_BOHW = torch.ops.onednn.qconv_pointwise(*given, *how, *self.activation, "")
        else:
            sums = added_BOHW, *how, self.added_scale, 0, "sum", 1.0
            out_BOHW = torch.ops.onednn.qconv2d_pointwise.binary(
                *given, *sums, *self.activation, ""
            )
        return out_BOHW

    def _pack(self, shape: list[int]) -> Tensor:
        packed: Tensor = torch.ops.onednn.qconv_prepack(
            self.rounded, self.scales, self.scale, self.zero,
            self.stride, self.padding, self.dilation, 1, shape,
        )  # fmt: skip
        return packed


class Rounded(nn.Module):
    """Floats of 0 and more -> the nearest of 255 steps of ``scale`` and 0, uint8."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return rounded(x, self.scale, 0)


class Floats(nn.Module):
    """What ``Rounded(scale)`` has made -> ``dtype``."""

    def __init__(self, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale, self.dtype = scale, dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).mul_(self.scale)


def rounded(x_BCHW: Tensor, scale: float, zero: int) -> Tensor:
    """``x / scale + zero`` as uint8: the nearest of 0..255. ``x``: float, a row at least."""
    out_BCHW = torch.empty_like(x_BCHW, dtype=torch.uint8)
    rows = max(1, SCRATCH // x_BCHW[0].numel())
    scratch = torch.empty_like(x_BCHW[:rows], dtype=torch.float32)
    for start in range(0, len(x_BCHW), rows):
        part = slice(start, start + rows)
        y = scratch[: len(x_BCHW[part])].copy_(x_BCHW[part])
        y.mul_(1 / scale).clamp_(-zero, LEVELS - zero).add_(FLOAT_INTEGERS + zero)
        out_BCHW[part].copy_(y.view(torch.int32))
    return out_BCHW


def _grid(taken: Range) -> tuple[float, int]:
    """The width of a step, and which step is 0."""
    low, high = taken
    scale = max(high - low, 1e-6) / LEVELS
    return scale, round(-low / scale)
