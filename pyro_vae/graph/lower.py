"""From a captured graph to machine code: the compiler, and on a GPU the replay of all its kernels.

No global setting is touched. Random numbers are drawn by torch's own kernels, so that the compiled
graph draws what the eager program draws from the same seed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.context import forked
from pyro_vae.graph.capture import Captured
from pyro_vae.graph.logarithms import share_logarithms
from pyro_vae.graph.products import use_onednn
from pyro_vae.graph.refusal import CannotCompileError

__all__ = ["Kernel", "lower"]

Kernel = Callable[[Sequence[Tensor]], Sequence[Tensor]]

# The compiler's own generator would give other numbers than eager torch, and slower on a CPU.
_OPTIONS: dict[str, Any] = {"fallback_random": True}


def lower(captured: Captured, static: list[Tensor], data: Sequence[Tensor]) -> Kernel:
    """Compile a graph for arguments of these shapes.

    Args:
        captured: The graph, of the static arguments and then the data; used up.
        static: Arguments that are the same tensors at every call, such as parameters; the graph may
            change them in place. On a CPU the list may be changed between calls.
        data: Arguments that differ from call to call; of any strides, there as here.

    Returns:
        A function of the data to the results. On a GPU it replays one recording of all kernels.

    Raises:
        CannotCompileError: The compiler failed.
    """
    import torch._inductor  # late: importing it, and what it needs, adds filters of warnings
    from torch._guards import tracing

    share_logarithms(captured.module)
    use_onednn(captured.module)
    reached = captured.reached
    data = [tensor.contiguous() for tensor in data]  # a kernel is for one layout only
    try:
        with torch.no_grad(), tracing(_context()):
            compiled: Any = torch._inductor.compile(
                captured.module, [*static, *data, *reached], options=_OPTIONS
            )
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise CannotCompileError(f"{type(error).__name__}: {reason}") from error

    def kernel(arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return compiled(*static, *(given.contiguous() for given in arguments), *reached)

    everything = [*static, *data, *reached]
    if everything and all(tensor.is_cuda for tensor in everything):
        return _recorded(kernel, data, changed=[*static, *reached])
    return kernel


def _context() -> Any:
    """Where the compiler looks for the shapes that it is compiling for; without, it caches little.

    All shapes are static.
    """
    from torch._guards import TracingContext
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return TracingContext(FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True))


def _recorded(kernel: Kernel, data: Sequence[Tensor], changed: Sequence[Tensor]) -> Kernel:
    """Record the kernels of a call once; then copy the data in, and replay them."""
    held = [tensor.detach().clone() for tensor in data]
    saved = [tensor.detach().clone() for tensor in changed]
    with forked(device=held[0].device if held else None):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries make their workspaces outside of the recording
                kernel(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = kernel(held)
    with torch.no_grad():
        for tensor, before in zip(changed, saved, strict=True):
            tensor.copy_(before)

    def replay(arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        for own, given in zip(held, arguments, strict=True):
            own.copy_(given, non_blocking=True)
        graph.replay()
        return [result.clone() for result in results]  # the next replay writes over them

    return replay
