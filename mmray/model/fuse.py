"""An image encoder as a graph of calls, with fewer of them: on a CPU, convolutions take over the
activation and the addition that come after them (see ``packed``), and what those in 8 bits read
comes to them in 8 bits (see ``int8_graph``)."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor, fx, nn

from mmray.model.features import Features
from mmray.model.fusion_model import FusionModel
from mmray.model.image import ImageEncoder
from mmray.model.int8_graph import keep_rounded
from mmray.model.packed import (
    NOTHING,
    RELU,
    Activation,
    FusedConv2d,
    PackedConv2d,
    is_plain,
    supported,
)
from mmray.model.pooling import BitsMaxPool2d

ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: RELU,
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.Hardswish: ("hardswish", []),
    nn.Hardsigmoid: ("hardsigmoid", []),
    nn.SiLU: ("swish", []),
    nn.Sigmoid: ("sigmoid", []),
}
STOCHASTIC_DEPTH = "StochasticDepth"  # torchvision's, by name: to import it takes two seconds
Modules = Mapping[str, nn.Module]


class FusedEncoder(ImageEncoder):
    """What ``fused`` makes: the parts of another one, called in the order of a graph."""

    def __init__(self, encoder: ImageEncoder, graph: fx.Graph) -> None:
        super().__init__(encoder.normalize)
        self.dim = encoder.dim
        self.net = fx.GraphModule(encoder, graph)
        self.eval()

    def encode(self, x_BCHW: Tensor) -> Features:
        features: Features = self.net(x_BCHW)
        return features


class _Tracer(fx.Tracer):
    traced_func_name = "encode"

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, PackedConv2d) or _does_nothing(m)
        return ours or super().is_leaf_module(m, module_qualified_name)


def fuse(model: FusionModel, *, bf16: bool = False) -> None:
    """Make the picture encoder of ``model`` faster where it scores on a CPU, in place. ``bf16``: it
    runs under bfloat16 autocast. It has been through ``speed.for_inference``, and is not trained
    after. Scores change by float rounding; in 8 bits also by that of the shortcuts.

    Nothing happens where torch has no oneDNN for it, or torch.fx cannot tell the order of calls;
    nor to weights that are no numbers, as oneDNN's ReLU makes 0 of what comes of them.
    """
    if model.image is None or not supported(bf16=bf16):
        return
    if all(bool(p.isfinite().all()) for p in model.image.parameters()):
        model.image = fused(model.image)


def fused(encoder: ImageEncoder) -> ImageEncoder:
    """The same encoder, made of the parts of ``encoder``, which is not used after."""
    for name, module in list(encoder.named_modules()):
        if type(module) is nn.Conv2d and is_plain(module):
            encoder.set_submodule(name, FusedConv2d(module))
    try:
        graph = _Tracer().trace(encoder)
    except (fx.proxy.TraceError, TypeError):
        return encoder
    modules = dict(encoder.named_modules())
    for node in list(graph.nodes):
        if _does_nothing(_module(node, modules)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        module = _module(node, modules)
        if module is None or calls[str(node.target)] > 1:
            continue
        if isinstance(module, PackedConv2d):
            _fuse(graph, node, module, modules)
        elif type(module) is nn.MaxPool2d and _is_after_relu(node, modules):
            encoder.set_submodule(str(node.target), BitsMaxPool2d.of(module))
    keep_rounded(graph, encoder)
    return FusedEncoder(encoder, graph)


def _module(node: object, modules: Modules) -> nn.Module | None:
    """What ``node`` calls, if that is a module."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return modules[str(node.target)]
    return None


def _does_nothing(module: nn.Module | None) -> bool:
    """In evaluation mode."""
    named = type(module).__name__ == STOCHASTIC_DEPTH
    return named or isinstance(module, nn.Identity | nn.Dropout)


def _fuse(graph: fx.Graph, node: fx.Node, conv: PackedConv2d, modules: Modules) -> None:
    """Have ``conv``, which ``node`` calls, do what comes after it and alone reads it."""
    (read,), added, chain = node.args, None, [node]
    while len(chain[-1].users) == 1 and conv.activation == NOTHING:
        (after,) = chain[-1].users
        module = _module(after, modules)
        if module is not None and type(module) in ACTIVATIONS:
            name, numbers = ACTIVATIONS[type(module)]
            if name not in (conv.ACTIVATIONS if added is None else ("relu",)):
                break
            conv.activation = name, numbers
        elif after.target is operator.add and added is None:
            others = [arg for arg in after.args if arg is not chain[-1]]
            if len(others) != 1 or not isinstance(others[0], fx.Node):
                break  # to itself, or a number
            added = others[0]
        else:
            break
        chain.append(after)
    with graph.inserting_before(chain[-1]):
        if added is not None and not _is_spent(graph, added, chain, modules):
            added = graph.call_method("clone", (added,))
        call = graph.call_module(str(node.target), (read, added))
    chain[-1].replace_all_uses_with(call)
    for each in reversed(chain):
        graph.erase_node(each)


def _is_after_relu(node: fx.Node, modules: Modules) -> bool:
    conv = _module(node.args[0], modules)
    return isinstance(conv, PackedConv2d) and conv.activation == RELU


def _is_spent(graph: fx.Graph, value: fx.Node, chain: Sequence[fx.Node], modules: Modules) -> bool:
    """Whether ``value`` lies in memory of its own, and nobody reads it after ``chain``, which adds
    it."""
    order = list(graph.nodes)
    earlier = order[: order.index(chain[-1])]
    return isinstance(_module(value, modules), PackedConv2d | nn.MaxPool2d) and all(
        user in chain or (user in earlier and isinstance(_module(user, modules), PackedConv2d))
        for user in value.users
    )
