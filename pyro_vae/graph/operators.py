"""Operators of our own, for what the compiler should leave as it is."""

import functools

import torch
from torch import Tensor

__all__ = ["hold", "product"]


def hold(x: Tensor) -> Tensor:
    """A copy of a tensor that a compiled graph computes once, instead of wherever it is used."""
    return _operators().hold.default(x)


def product() -> torch._ops.OpOverload:
    """The operator ``(x, w, bias) -> x @ w.T + bias`` by oneDNN, on a CPU.

    Torch's own operator of that kind is one that its compiler takes for inference alone.
    """
    return _operators().product.default


@functools.cache
def _operators() -> torch._ops._OpNamespace:
    # Late, so that importing the package registers nothing.
    onednn = torch.ops.mkldnn._linear_pointwise.default

    def multiplied(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return onednn(x, w, bias, "none", [], "")

    def shape(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty(x.shape[0], w.shape[0])

    library = torch.library.Library("pyro_vae", "FRAGMENT")
    library.define("product(Tensor x, Tensor w, Tensor? bias) -> Tensor")
    library.impl("product", multiplied, "CPU")
    torch.library.register_fake("pyro_vae::product", shape, lib=library)
    library.define("hold(Tensor x) -> Tensor")
    for backend in ("CPU", "CUDA"):
        library.impl("hold", torch.clone, backend)
    torch.library.register_fake("pyro_vae::hold", torch.empty_like, lib=library)
    _LIBRARIES.append(library)
    return torch.ops.pyro_vae


_LIBRARIES: list[torch.library.Library] = []  # an operator lives as long as its library
