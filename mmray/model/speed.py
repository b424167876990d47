"""What makes a model faster and leaves what it computes as it is, but for rounding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmray.config import Range
from mmray.model import int8
from mmray.model.fusion_model import FusionModel


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that trains in float32 whatever autocast says: on a CPU its gradients
    take two to ten times as long in bfloat16 where it has a stride or more than 3 x 3 weights."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float()).to(x.dtype)


def for_training(model: FusionModel) -> FusionModel:
    """``model``, in place; on a CPU, its depthwise convolutions are ``DepthwiseConv2d``."""
    for module in model.modules():
        depthwise = type(module) is nn.Conv2d and 1 < module.groups == module.in_channels
        if depthwise and module.weight.device.type == "cpu":
            module.__class__ = DepthwiseConv2d  # parameters, hooks and names stay
    return model


def for_inference(
    model: FusionModel, *, bf16: bool = False, ranges: Mapping[str, Range] | None = None
) -> FusionModel:
    """``model`` in evaluation mode, its picture encoder's batch norms folded away, in place.

    ``bf16``: it will run under bfloat16 autocast. ``ranges``: the encoder's convolutions of these
    names compute in 8 bits, see ``int8``.
    """
    model.eval().requires_grad_(False)
    if model.image is not None:
        fold_batch_norms(model.image.net)
        if ranges:
            int8.quantize(model.image.net, ranges, torch.bfloat16 if bf16 else torch.float32)
    if bf16:
        round_weights(model)
    return model


def round_weights(model: nn.Module) -> None:
    """Keep what autocast would round to bfloat16 in every batch so, in place; it keeps no rounded
    weights where no gradient is asked for. What is computed stays the same to the bit: the head of
    a FusionModel is beyond autocast."""
    exact = set(model.head.modules()) if isinstance(model, FusionModel) else set()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module not in exact:
            module.to(torch.bfloat16)


def fold_batch_norms(net: nn.Module) -> int:
    """Fold every batch norm that alone reads a convolution's output into that convolution, in
    place; says how many. Scores change by float rounding alone (Jacob et al. 2018, section 3.2).

    ``net`` is in evaluation mode. One whose order of calls torch.fx cannot tell is left as it is.
    """
    try:
        graph = fx.Tracer().trace(net)
    except (fx.proxy.TraceError, TypeError):
        return 0
    modules = dict(net.named_modules())
    folded = 0
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) > 1:
            continue
        convolution = modules[before.target]
        if isinstance(convolution, nn.Conv2d):
            fused = fuse_conv_bn_eval(convolution, modules[node.target])
            net.set_submodule(before.target, fused)
            net.set_submodule(node.target, nn.Identity())
            folded += 1
    return folded
