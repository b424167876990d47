"""Values in 8 bits from one convolution to the next, in a graph of calls.

What a convolution in 8 bits reads would be made floats by the one before and rounded again; both
are passes over maps that no cache holds. The shortcuts of a residual network are such values too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from mmray.model.int8 import Floats, Int8Conv2d, Rounded
from mmray.model.packed import RELU


def keep_rounded(graph: fx.Graph, root: nn.Module) -> None:
    """Have each value that convolutions in 8 bits of ``root`` read, and that is 0 or more, made
    once in 8 bits, by the convolution it comes from where that can; in place, before any call.

    Whoever else reads such a value gets floats, or adds it in 8 bits."""
    _Flow(graph, root).run()


class _Flow:
    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self._graph, self._root = graph, root
        self._modules = dict(root.named_modules())
        convs = (module for module in root.modules() if isinstance(module, Int8Conv2d))
        self._dtype = next((conv.dtype for conv in convs), torch.float32)  # of floats
        self._scales: dict[fx.Node, float] = {}  # of the values in 8 bits
        self._twins: dict[fx.Node, fx.Node] = {}  # float value -> the same in 8 bits

    def run(self) -> None:
        for node in list(self._graph.nodes):
            self._visit(node)
        for node in self._scales:
            self._give_floats(node)

    def _int8(self, node: fx.Node) -> Int8Conv2d | None:
        module = self._modules.get(str(node.target)) if node.op == "call_module" else None
        return module if isinstance(module, Int8Conv2d) else None

    def _readers(self, node: fx.Node) -> Iterator[tuple[fx.Node, Int8Conv2d]]:
        """The convolutions in 8 bits that take ``node`` in, with no value below 0."""
        for user in node.users:
            conv = self._int8(user)
            if conv is not None and user.args[0] is node and conv.zero == 0:
                yield user, conv

    def _visit(self, node: fx.Node) -> None:
        """Make the value of ``node`` 8 bits, if anyone reads it so."""
        readers = list(self._readers(node))
        if not readers:
            return
        scale = readers[0][1].scale
        if self._gives(node, scale):
            self._scales[node] = scale
            return
        with self._graph.inserting_after(node):
            twin = self._call("rounded", Rounded(scale), node)
        self._scales[twin] = scale
        self._twins[node] = twin
        for user, conv in readers:
            if conv.scale == scale:
                user.update_arg(0, twin)

    def _gives(self, node: fx.Node, scale: float) -> bool:
        """Have ``node`` itself give 8 bits, if it is a convolution that can."""
        conv = self._int8(node)
        if conv is None or conv.activation != RELU:
            return False
        added = node.args[1] if len(node.args) > 1 else None
        if isinstance(added, fx.Node):
            added = self._twins.get(added, added)
            if added not in self._scales:
                return False
            node.update_arg(1, added)
            conv.added_scale = self._scales[added]
        conv.dtype, conv.out_scale = torch.uint8, scale
        return True

    def _give_floats(self, node: fx.Node) -> None:
        """To all who read ``node`` and do not take its 8 bits."""
        taking = {user for user, conv in self._readers(node) if conv.scale == self._scales[node]}
        adding = {user for user in node.users if user in self._scales and user.args[1:] == (node,)}
        for user in list(node.users):
            if user not in taking | adding:
                with self._graph.inserting_before(user):
                    floats = self._call("floats", Floats(self._scales[node], self._dtype), node)
                user.replace_input_with(node, floats)

    def _call(self, kind: str, module: nn.Module, value: fx.Node) -> fx.Node:
        name = f"{kind}_{len(self._modules)}"
        self._root.add_module(name, module)
        self._modules[name] = module
        return self._graph.call_module(name, (value,))
