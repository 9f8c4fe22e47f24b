r"""Networks: plain ``nn.Module`` s from inputs to the parameters of a distribution.

Every network maps ``(*batch, in_dim)`` to ``(*batch, P, D)`` for any number of batch
dimensions, because the particle plate of an estimator adds one on the left. A network of
your own only has to do the same.

Several inputs (``network(z, y)``) are broadcast against each other and joined along the
last dimension; ``in_dim`` is then the total.
"""

from pyro_vae.program.networks.dense import gated_mlp, masked_mlp, mlp
from pyro_vae.program.networks.images import conv_decoder, conv_encoder
from pyro_vae.program.networks.wrappers import rescaled, with_free

__all__ = [
    "conv_decoder",
    "conv_encoder",
    "gated_mlp",
    "masked_mlp",
    "mlp",
    "rescaled",
    "with_free",
]
