"""Choose a device."""

import torch
from torch import nn

from pyro_vae.context import bare
from pyro_vae.inference.handlers import Program

__all__ = ["resolve_device"]


def resolve_device(device: str | torch.device, *programs: Program) -> torch.device:
    """The device that is meant, checked to be there.

    Args:
        device: "auto" (a GPU where there is one and all programs are modules, which can be moved),
            "cpu", "cuda", "cuda:1"...
        programs: Model and guide.

    Raises:
        ValueError: The device is not there.
    """
    if device == "auto":
        movable = all(isinstance(bare(program), nn.Module) for program in programs)
        return torch.device("cuda" if movable and torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device: {device!r} is not available here ({str(error).splitlines()[0]}); use 'cpu' "
            "or 'auto'."
        ) from error
    return target
