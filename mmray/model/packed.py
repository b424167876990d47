"""Convolutions whose weights lie as oneDNN wants them, and that also do what comes after them.

An activation or the addition of a shortcut is one more pass over maps that no cache holds, unless
it is done on what a convolution still has in registers: oneDNN's post-operations, which
torch.compile uses as well.

Shapes: B rows, C channels in, O out, H x W pixels.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn

#: What a convolution does with its sums: oneDNN's name for it, and the numbers it takes.
Activation = tuple[str, list[float]]
NOTHING: Activation = "none", []
RELU: Activation = "relu", []


def supported(*, bf16: bool = False) -> bool:
    """Whether torch has oneDNN's own kernels here, which are those for x86, and for ``bf16`` a CPU
    with what that needs."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    there = x86 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and (not bf16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def is_plain(conv: nn.Conv2d) -> bool:
    """Whether it pads with zeros, by numbers, not by "same" or "valid"."""
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


class PackedConv2d(nn.Module):
    """``forward(x, added)``: [B, C, H, W] and, of the result's shape and dtype, what is added to it
    -> ``activation(conv(x) + added)``.

    ``added``, channels last in memory, is overwritten; with it, the activation is ReLU or nothing,
    else one of ``ACTIVATIONS``, by name. Weights are held as they were, and as oneDNN wants them
    for one row and for many, once either was there."""

    ACTIVATIONS: frozenset[str]

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.activation = NOTHING
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.groups = conv.groups
        # No buffers, which .to() would take for tensors like others.
        self._packed: dict[bool, Tensor] = {}

    def packed(self, shape: torch.Size) -> Tensor:
        """The weights for such an input. A single row is multiplied in another way than many are:
        packed for the other, or for none in particular, they would be laid out anew in every call.
        """
        alone = shape[0] == 1
        if alone not in self._packed:
            self._packed[alone] = self._pack(list(shape))
        return self._packed[alone]

    def _pack(self, shape: list[int]) -> Tensor:
        raise NotImplementedError


class FusedConv2d(PackedConv2d):
    """A convolution in the dtype of its weights, float32 or bfloat16."""

    ACTIVATIONS = frozenset({"relu", "hardtanh", "hardswish", "hardsigmoid", "swish", "sigmoid"})

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x_BCHW: Tensor, added_BOHW: Tensor | None = None) -> Tensor:
        x_BCHW = x_BCHW.to(self.weight.dtype)
        weight = self.packed(x_BCHW.shape)
        given = weight, self.bias, self.padding, self.stride, self.dilation, self.groups
        name, numbers = self.activation
        out_BOHW: Tensor
        if added_BOHW is None:
            out_BOHW = torch.ops.mkldnn._convolution_pointwise(x_BCHW, *given, name, numbers, "")
        else:
            out_BOHW = torch.ops.mkldnn._convolution_pointwise_.binary(
                added_BOHW, x_BCHW, *given, "add", 1.0, name if name == "relu" else None, [], ""
            )
        return out_BOHW

    def _pack(self, shape: list[int]) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            self.weight, self.padding, self.stride, self.dilation, self.groups, shape
        )
        return packed
