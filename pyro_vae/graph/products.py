"""Matrix products of a captured graph, by the library that runs them fastest.

Torch multiplies float32 matrices on x86 CPUs by MKL, which leaves the AVX-512 units of other
vendors' chips unused (190 against 430 GFLOP/s on two cores of a Zen 5). oneDNN, which torch ships
too, uses them. Torch has no switch for float32, so large products of a graph are sent there.
"""

import torch
from torch import fx

from pyro_vae.graph.operators import product

__all__ = ["use_onednn"]

# Below this many multiplications oneDNN's fixed costs outweigh its speed.
_LARGE = 1 << 21


def use_onednn(module: fx.GraphModule) -> int:
    """Send the large float32 products of a CPU graph to oneDNN.

    The choice is made by size, processor and the user's ``torch.backends.mkldnn`` flags, never by
    timing, so that it is the same in every run.

    Args:
        module: The graph; changed in place.

    Returns:
        How many products were sent.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # type: ignore[truthy-function]
        return 0
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return 0
    count = 0
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten.mm.default:
            bias, (x, y) = None, node.args
        elif node.target is torch.ops.aten.addmm.default and not node.kwargs:
            bias, x, y = node.args
            if bias.meta["val"].shape != node.meta["val"].shape[1:]:
                continue
        else:
            continue
        out, left = node.meta["val"], x.meta["val"]
        size = out.shape.numel() * left.shape[1]
        if out.dtype != torch.float32 or out.device.type != "cpu" or size < _LARGE:
            continue
        with module.graph.inserting_before(node):
            transposed = module.graph.call_function(torch.ops.aten.t.default, (y,))
            new = module.graph.call_function(product(), (x, transposed, bias))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
        count += 1
    module.recompile()
    return count
