r"""Sums of binary cross entropies with a quarter of the logarithms.

A Bernoulli likelihood takes an exponential and a logarithm for every pixel, and after the matrix
products these are most of what a score costs. In a sum,

.. math:: \sum_{i=1}^4 \log(1 + e^{-|u_i|}) = \log \prod_{i=1}^4 (1 + e^{-|u_i|}),

whose product lies between 1 and 16, so that nothing is lost to rounding.
"""

from functools import partial, reduce
from typing import Any

import torch
from torch import fx

__all__ = ["share_logarithms"]

_TOGETHER = 4
_ATEN = torch.ops.aten


def share_logarithms(module: fx.GraphModule) -> None:
    """Rewrite every negative binary cross entropy that is summed over its last dimension.

    Args:
        module: The graph; changed in place.
    """
    for node in list(module.graph.nodes):
        chain = _summed(node)
        if not chain:
            continue
        total = chain[-1]
        with module.graph.inserting_before(total):
            new = _shared(module.graph, node.args[0], node.args[1], node.meta["val"].shape)
        new.meta = dict(total.meta)
        total.replace_all_uses_with(new)
        for old in reversed(chain):
            module.graph.erase_node(old)
    module.recompile()


def _summed(node: fx.Node) -> list[fx.Node]:
    """The operations from a cross entropy to its negative sum, where nothing else uses them."""
    if node.target is not _ATEN.binary_cross_entropy_with_logits.default or node.kwargs:
        return []
    inputs, target, weight, pos_weight, reduction = [*node.args, None, None, 1][:5]
    shape = node.meta["val"].shape
    if weight is not None or pos_weight is not None or reduction != 0 or shape[-1] % _TOGETHER:
        return []
    if any("val" not in t.meta or t.meta["val"].shape != shape for t in (inputs, target)):
        return []
    chain = [node]
    for wanted in (_ATEN.neg.default, _ATEN.view.default, _ATEN.sum.dim_IntList):
        users = list(chain[-1].users)
        if len(users) == 1 and users[0].target is wanted:
            chain.append(users[0])
        elif wanted is not _ATEN.view.default:
            return []
    same = all(step.meta["val"].shape == shape for step in chain[:-1])
    last = list(chain[-1].args[1:]) in ([[-1]], [[len(shape) - 1]])
    return chain if same and last and not chain[-1].kwargs else []


def _shared(graph: fx.Graph, inputs: Any, target: Any, shape: torch.Size) -> fx.Node:
    def call(function: Any, *args: Any) -> fx.Node:
        return graph.call_function(function, args)

    def parts(of: Any) -> list[fx.Node]:
        width = shape[-1] // _TOGETHER
        return [
            call(_ATEN.slice.Tensor, of, -1, i * width, (i + 1) * width) for i in range(_TOGETHER)
        ]

    factors, linear = [], []
    for u, x in zip(parts(inputs), parts(target), strict=True):
        decay = call(_ATEN.exp.default, call(_ATEN.neg.default, call(_ATEN.abs.default, u)))
        factors.append(call(_ATEN.add.Tensor, decay, 1))
        hinge = call(_ATEN.clamp_min.default, u, 0)
        linear.append(call(_ATEN.sub.Tensor, call(_ATEN.mul.Tensor, u, x), hinge))
    product = reduce(partial(call, _ATEN.mul.Tensor), factors)
    rest = reduce(partial(call, _ATEN.add.Tensor), linear)
    nats = call(_ATEN.sub.Tensor, rest, call(_ATEN.log.default, product))
    return call(_ATEN.sum.dim_IntList, nats, [-1])
