"""How much work a program is, counted and never timed, so that what follows is reproducible."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["WORTH_COMPILING", "Work"]

# Compiling costs about ten seconds: worth it where the uncompiled program would take this long.
WORTH_COMPILING = 20.0

# Rates of two CPU cores, and what Pyro's handlers cost a call of model and guide.
_FLOPS = 1.5e11
_ELEMENTS = 1e9
_HANDLERS = 2e-3


class Work(TorchDispatchMode):
    """Counts the operations of what runs inside it.

    Attributes:
        flops: Floating-point operations of matrix products and convolutions.
        elements: Elements written by all operations.
        made: Bytes of each tensor made, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.elements = 0
        self.made: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                # A view or an expanded tensor is no memory of its own.
                own = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
                if not func.is_view:
                    self.elements += tensor.numel()
                    self.made.append(own)
        return result

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor made."""
        return max(self.made, default=0)

    def seconds(self, times: float, calls: int) -> float:
        """A rough time for repeating this work, uncompiled, on two CPU cores.

        Args:
            times: How often the work is repeated.
            calls: In how many calls of model and guide.
        """
        return times * (self.flops / _FLOPS + self.elements / _ELEMENTS) + calls * _HANDLERS
