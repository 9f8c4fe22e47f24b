"""The bound of held-out data while a pair is trained."""

from torch import Tensor

from pyro_vae.context import at_rest, seeded
from pyro_vae.inference.svi import SVI

__all__ = ["validation_bounds"]

BATCH = 1000


def validation_bounds(svi: SVI, data: tuple[Tensor, ...], *, seed: int) -> tuple[float, float]:
    """The ELBO of validation data, and the tighter of it and minus the loss.

    The parameters are chosen by the second: importance weighting raises its own bound while the
    ELBO falls. The noise is the same after every epoch.

    Args:
        svi: The step, whose loss it is.
        data: Tensors of equal length.
        seed: Seed of the noise.

    Returns:
        Both in nats per datum; where a loss hides its parts, minus that loss.
    """
    elbo = loss = 0.0
    with at_rest(svi.model, svi.guide), seeded(seed, "valid", device=data[0].device):
        for start in range(0, len(data[0]), BATCH):
            terms = svi.evaluate(*(tensor[start : start + BATCH] for tensor in data))
            bound = -(terms.distortion + terms.rate)
            # A loss of the user's hides its parts: then the bound is minus that loss.
            elbo += (-terms.loss if bound.isnan() else bound).item()
            loss += terms.loss.item()
    size = len(data[0])
    return elbo / size, max(elbo, -loss) / size  # NaN where the ELBO is
