r"""Networks: plain ``nn.Module`` s from inputs to the parameters of a distribution.

Every network maps ``(*batch, in_dim)`` to ``(*batch, P, D)`` for any number of batch
dimensions, because the particle plate of an estimator adds one on the left. A network of
your own only has to do the same.

Several inputs (``network(z, y)``) are broadcast against each other and joined along the
last dimension; ``in_dim`` is then the total.
"""

from pyro_vae.program.networks.dense import gated_mlp, masked_mlp, mlp
from pyro_vae.program.networks.images import conv_decoder, conv_encoder
from pyro_vae.program.networks.residual import (
    residual_conv_decoder,
    residual_conv_encoder,
    residual_mlp,
)
from pyro_vae.program.networks.table import per_datum
from pyro_vae.program.networks.wrappers import first, rescaled, with_free, without_missing

__all__ = [
    "conv_decoder",
    "conv_encoder",
    "first",
    "gated_mlp",
    "masked_mlp",
    "mlp",
    "per_datum",
    "rescaled",
    "residual_conv_decoder",
    "residual_conv_encoder",
    "residual_mlp",
    "with_free",
    "without_missing",
]
