"""What a captured graph computes alike at every call, computed once.

A prior that runs a network on its own parameters, such as a VampPrior's encoder on pseudo-inputs,
costs as much as hundreds of data. While parameters stand still, as they do while a pair is judged,
that is wanted once, and not again for every few particles.
"""

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from pyro_vae.graph.capture import Captured

__all__ = ["folded"]


def folded(captured: Captured) -> Captured:
    """The graph with this moment's value of all that takes a product, but no argument.

    Only for a graph that is thrown away before a tensor that it reached changes. What is written to
    in place is no constant, nor is what is made of it.

    Args:
        captured: The graph; used up.

    Returns:
        The same function of its arguments; the values are the last of what it has reached.
    """
    graph = captured.module.graph
    nodes = list(graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    reached = placeholders[len(placeholders) - len(captured.reached) :]
    writing = (node for node in nodes if _changes_in_place(node))
    written = {_viewed(source) for node in writing for source in node.all_input_nodes}
    constant = {node for node in reached if node not in written}
    products: set[fx.Node] = set()  # constants that are worth it: a product, or made of one
    for node in nodes:
        computed = node.op == "call_function" and not (_is_random(node) or _changes_in_place(node))
        known = node.op == "get_attr" or (computed and constant.issuperset(node.all_input_nodes))
        if known and _viewed(node) not in written:
            constant.add(node)
            if _is_product(node) or not products.isdisjoint(node.all_input_nodes):
                products.add(node)
    ends = [node for node in nodes if node in products and not constant.issuperset(node.users)]
    # Views stay in the graph: an expanded value would be no memory that can be written to.
    wanted = list(dict.fromkeys(map(_viewed, ends)))
    wanted = [node for node in wanted if isinstance(node.meta.get("val"), Tensor)]
    values = _values(captured, reached, wanted)
    for node, value in zip(wanted, values, strict=True):
        with graph.inserting_after(placeholders[-1]):
            new = graph.placeholder(f"constant_{node.name}")
        new.meta["val"] = value
        node.replace_all_uses_with(new)
        placeholders.append(new)
    _ = graph.eliminate_dead_code()
    graph.lint()
    captured.module.recompile()
    return Captured(captured.module, [*captured.reached, *values])


def _values(captured: Captured, reached: list[fx.Node], wanted: list[fx.Node]) -> list[Tensor]:
    """The values of constants, computed by the graph itself."""
    if not wanted:
        return []
    nodes = list(captured.module.graph.nodes)
    needed = {*reached, *wanted}
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node in needed:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in wanted))
    # The graph has the casts of its own autocast written out, and knows of no other.
    device = wanted[0].meta["val"].device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        return list(fx.GraphModule(captured.module, part)(*captured.reached))


def _viewed(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    alike = torch.ops.aten._unsafe_view.default
    while node.target == alike or getattr(node.target, "is_view", False):
        node = node.all_input_nodes[0]
    return node


def _is_product(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in flop_registry


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _changes_in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
