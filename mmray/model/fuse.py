"""An image encoder as a graph of calls, with fewer of them: on a CPU, convolutions take over the
activation and the addition that come after them (see ``packed``), and what those in 8 bits read
comes to them in 8 bits (see ``int8_graph``)."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from typing import cast

from torch import Tensor, fx, nn

from mmray.model import pooling
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
    runs under bfloat16 autocast. It has been through ``speed.for_inference``, and is neither
    trained nor copied after. Scores change by float rounding; in 8 bits also by that of the
    shortcuts. What becomes infinite on the way may end as 0, as oneDNN's ReLU has it.

    Nothing happens where torch has no oneDNN for it, or torch.fx cannot tell the order of calls;
    nor to weights that are no numbers, so that their scores are none.
    """
    if model.image is None or not supported(bf16=bf16):
        return
    numbers = chain(model.image.parameters(), model.image.buffers())
    if all(bool(value.isfinite().all()) for value in numbers):
        model.image = fused(model.image)


def fused(encoder: ImageEncoder) -> ImageEncoder:
    """The same encoder, made of the parts of ``encoder``, which is not used after."""
    try:
        graph = _Tracer().trace(encoder)
    except (fx.proxy.TraceError, TypeError):
        return encoder
    for name, module in list(encoder.named_modules()):
        if type(module) is nn.Conv2d and is_plain(module):
            encoder.set_submodule(name, FusedConv2d(module))
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
        elif type(module) is nn.MaxPool2d and _is_relu(node.args[0], modules):
            encoder.set_submodule(str(node.target), pooling.faster(module))
    _keep_what_is_read_again(graph, modules)
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


def _is_relu(node: object, modules: Modules) -> bool:
    """Whether ``node`` calls a convolution that ends in ReLU."""
    conv = _module(node, modules)
    return isinstance(conv, PackedConv2d) and conv.activation == RELU


def _fuse(graph: fx.Graph, node: fx.Node, conv: PackedConv2d, modules: Modules) -> None:
    """Have ``conv``, which ``node`` calls, do what comes after it and alone reads it."""
    (read,), added, done = node.args, None, [node]
    while len(done[-1].users) == 1 and conv.activation == NOTHING:
        (after,) = done[-1].users
        module = _module(after, modules)
        if module is not None and type(module) in ACTIVATIONS:
            name, numbers = ACTIVATIONS[type(module)]
            if name not in (conv.ACTIVATIONS if added is None else ("relu",)):
                break
            conv.activation = name, numbers
        elif after.target is operator.add and added is None:
            added = _added(after, done[-1], modules)
            if added is None or _is_written_over(read, modules):
                added = None
                break
        else:
            break
        done.append(after)
    order = list(graph.nodes)
    late = added is not None and order.index(added) > order.index(node)
    with graph.inserting_after(added if late else node):
        call = graph.call_module(str(node.target), (read, added))
    done[-1].replace_all_uses_with(call)
    for each in reversed(done):
        graph.erase_node(each)


def _added(addition: fx.Node, to: fx.Node, modules: Modules) -> fx.Node | None:
    """The other value, where it is a map that was computed; else None: a number, a parameter, or
    ``to`` itself."""
    others = [arg for arg in addition.args if arg is not to]
    if len(others) == 1 and isinstance(_module(others[0], modules), PackedConv2d | nn.MaxPool2d):
        return cast(fx.Node, others[0])
    return None


def _is_written_over(value: object, modules: Modules) -> bool:
    """Whether a module changes ``value`` where it lies, so that calls must stay in their order."""
    assert isinstance(value, fx.Node)
    return any(getattr(_module(user, modules), "inplace", False) for user in value.users)


def _keep_what_is_read_again(graph: fx.Graph, modules: Modules) -> None:
    """A convolution writes its sums over what it adds: where that is what it reads, or anyone else
    may read it later, have it write over a copy."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node, place in order.items():
        added = node.args[1] if len(node.args) == 2 else None
        if not (isinstance(_module(node, modules), PackedConv2d) and isinstance(added, fx.Node)):
            continue
        others = added.users.keys() - {node}
        spent = node.args[0] is not added and all(
            order.get(user, place) < place and isinstance(_module(user, modules), PackedConv2d)
            for user in others
        )
        if not spent:
            with graph.inserting_before(node):
                node.update_arg(1, graph.call_method("clone", (added,)))
