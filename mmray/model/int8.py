"""Convolutions in 8-bit integers, on CPUs that multiply those twice as fast as bfloat16.

As in Jacob et al. 2018 (arXiv:1712.05877): weights are rounded by output channel, what goes in by
the range that was seen before (``observed``), beyond which it saturates; sums are exact. Everything
else stays in the precision it has.

Shapes: B rows, C channels in, O out, H x W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from mmray.config import Range
from mmray.errors import BundleError
from mmray.model.packed import PackedConv2d, is_plain

#: Multiplications that every value going in takes part in, from which on more time is won than
#: rounding the values takes; 3 x 3 to 64 channels are 576, 1 x 1 to 64 channels 64.
WORTH = 256
LEVELS = 255
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

    Batch norms are folded by then (``speed.fold_batch_norms``); a convolution that only another one
    reads, through ReLU, gives 8 bits itself. Raises BundleError for a name that is none of
    ``eligible``.
    """
    found = eligible(net)
    if strange := sorted(ranges.keys() - found.keys()):
        raise BundleError(f"ranges of {strange[0]!r}, which is no convolution that has 8 bits")
    named = {name: found[name] for name in ranges}
    reads = _readers(net, named)
    for name, module in named.items():
        low, high = ranges[reads[name]] if name in reads else (0.0, 0.0)
        most = high if low == 0 else 0.0  # ReLU gives nothing below 0
        net.set_submodule(name, Int8Conv2d(module, ranges[name], most, dtype))


class Int8Conv2d(PackedConv2d):
    """Takes float or, as another Int8Conv2d made it, uint8; gives ``dtype``, or uint8 for the next
    one, which takes 0 to ``most``, ReLU included; 0: there is none."""

    def __init__(self, conv: nn.Conv2d, taken: Range, most: float, dtype: torch.dtype) -> None:
        super().__init__(conv)
        weight_OCHW = conv.weight.detach().float()
        scales_O = weight_OCHW.abs().amax((1, 2, 3)).clamp_min(1e-12) / 127
        rounded_OCHW = (weight_OCHW / scales_O.view(-1, 1, 1, 1)).round().to(torch.int8)
        self.scale, self.zero = _grid(taken)
        self.out_scale = _grid((0.0, most))[0] if most else 1.0
        self.dtype = torch.uint8 if most else dtype
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
            out_BOHW = torch.ops.onednn.qconv2d_pointwise.binary(
                *given, added_BOHW, *how, 1.0, 0, "sum", 1.0, *self.activation, ""
            )
        return out_BOHW

    def _pack(self, shape: list[int]) -> Tensor:
        packed: Tensor = torch.ops.onednn.qconv_prepack(
            self.rounded, self.scales, self.scale, self.zero,
            self.stride, self.padding, self.dilation, 1, shape,
        )  # fmt: skip
        return packed


def rounded(x: Tensor, scale: float, zero: int) -> Tensor:
    """``x / scale + zero`` as uint8: the nearest of 0..255."""
    y = x.to(torch.float32, copy=True).mul_(1 / scale).clamp_(-zero, LEVELS - zero)
    return y.add_(FLOAT_INTEGERS + zero).view(torch.int32).to(torch.uint8)


def _grid(taken: Range) -> tuple[float, int]:
    """The width of a step, and which step is 0."""
    low, high = taken
    scale = max(high - low, 1e-6) / LEVELS
    return scale, round(-low / scale)


def _readers(net: nn.Module, named: Mapping[str, nn.Conv2d]) -> dict[str, str]:
    """Of the convolutions ``named`` those that one other alone reads, through ReLU: by whom."""
    try:
        graph = fx.Tracer().trace(net)
    except (fx.proxy.TraceError, TypeError):
        return {}
    modules = dict(net.named_modules())
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    found: dict[str, str] = {}
    for node in graph.nodes:
        name = str(node.target)
        if name in named and calls[name] == 1:
            reader = _through_relu(node, modules)
            if reader is not None and reader in named and calls[reader] == 1:
                found[name] = reader
    return found


def _through_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Who alone reads ``node``, if it goes through ReLU, and nothing else that matters."""
    kept = False
    while len(node.users) == 1:
        (node,) = node.users
        module = modules[str(node.target)] if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d):
            return str(node.target) if kept else None
        if not isinstance(module, (nn.Identity, nn.ReLU)):
            return None
        kept |= isinstance(module, nn.ReLU)
    return None
