"""pythae's ``VAE`` with networks of our own, and the body of its ``BaseTrainer``'s loop."""

# pyright: reportMissingImports=false

import importlib.metadata

import numpy as np
import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from torch import Tensor

from experiments.benchmarks.contestant import Contestant, Objective
from experiments.benchmarks.torch_parts import network, normal_of, wait_for
from experiments.benchmarks.workloads import LEARNING_RATE, Workload

__all__ = ["make", "pythae_vae"]


class _Encoder(BaseEncoder):
    """pythae's scale is exp(log_covariance / 2); this is the log of the square of ours."""

    def __init__(self, workload: Workload, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.network = network(workload, "encoder", weights)

    def forward(self, x: Tensor) -> ModelOutput:
        loc, scale = normal_of(self.network(x))
        return ModelOutput(embedding=loc, log_covariance=2 * scale.log())


class _Decoder(BaseDecoder):
    """pythae's Bernoulli likelihood takes probabilities."""

    def __init__(self, workload: Workload, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.network = network(workload, "decoder", weights)

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.network(z).sigmoid())


def pythae_vae(workload: Workload, weights: dict[str, np.ndarray]) -> VAE:
    """The VAE of pythae with a Bernoulli likelihood and these networks.

    Args:
        workload: Sizes of the networks.
        weights: Initial weights, see ``workloads.weights``.
    """
    config = VAEConfig(
        input_dim=(workload.data_dim,),
        latent_dim=workload.latent_dim,
        reconstruction_loss="bce",
    )
    return VAE(config, encoder=_Encoder(workload, weights), decoder=_Decoder(workload, weights))


class _PythaeSteps:
    def __init__(self, vae: VAE, batch: np.ndarray, device: str) -> None:
        config = BaseTrainerConfig(
            per_device_train_batch_size=len(batch),
            learning_rate=LEARNING_RATE,
            optimizer_cls="Adam",
            no_cuda=device == "cpu",
        )
        x = torch.from_numpy(batch)
        self.trainer = BaseTrainer(vae, BaseDataset(x, torch.ones(len(x))), training_config=config)
        # Of prepare_training() this alone: the rest seeds, and makes folders and callbacks.
        self.trainer.set_optimizer()
        self.trainer.model.train()
        self.size = len(x)
        self.device = torch.device(device)
        self.inputs = self.trainer._set_inputs_to_device({"data": x})

    def step(self) -> None:
        """The body of ``BaseTrainer.train_step``'s loop, but for the data loader."""
        trainer = self.trainer
        with trainer.amp_context:
            output = trainer.model(self.inputs, epoch=1, dataset_size=self.size, uses_ddp=False)
        trainer._optimizers_step(output)
        if np.isnan(output.loss.item()):
            raise ArithmeticError("NaN detected in train loss")
        wait_for(self.device)

    def loss(self) -> float:
        with torch.no_grad():
            return self.trainer.model(self.inputs).loss.item() * self.size

    def describe(self) -> str:
        return (
            "pythae VAE, BaseTrainer's step without its data loader; its loss is a mean over the "
            "minibatch and its scale goes through a log-variance (the same function, by a log and "
            f"an exp more), pythae {importlib.metadata.version('pythae')}, "
            f"torch {torch.__version__}"
        )


def make(
    workload: Workload,
    objective: Objective,
    weights: dict[str, np.ndarray],
    batch: np.ndarray,
    *,
    device: str = "cpu",
    seed: int = 0,
) -> Contestant:
    """Make the contestant; see ``contestant.Make``."""
    if objective != "meanfield":
        raise NotImplementedError("pythae's VAE has the analytic KL alone")
    torch.manual_seed(seed)
    return _PythaeSteps(pythae_vae(workload, weights), batch, device)
