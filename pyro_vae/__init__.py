"""Variational autoencoders as Pyro programs: say, fit, judge."""

from pyro_vae.data import Labels, Split, load_data
from pyro_vae.evidence.annealed import ais
from pyro_vae.evidence.bidirectional import Bidirectional, bidirectional
from pyro_vae.evidence.chains import ChainEstimate
from pyro_vae.evidence.compare import Comparison, Comparisons, compare
from pyro_vae.evidence.elbo_parts import ElboParts
from pyro_vae.evidence.estimate import Estimate, PredictiveEstimate
from pyro_vae.evidence.evaluate import evaluate
from pyro_vae.evidence.evaluation import Evaluation
from pyro_vae.evidence.gaps import Gaps, gaps
from pyro_vae.evidence.global_latents import joint_log_weights, log_predictive
from pyro_vae.evidence.importance import log_evidence, log_weights
from pyro_vae.evidence.nats import Nats
from pyro_vae.evidence.pareto import pareto_k, smoothed
from pyro_vae.evidence.prior import from_prior
from pyro_vae.evidence.reciprocal import reciprocal_evidence
from pyro_vae.evidence.surgery import elbo_parts
from pyro_vae.evidence.upper import UpperBound, upper_bound
from pyro_vae.inference.free_bits import FreeBits
from pyro_vae.inference.handlers import kl_weight, warmup
from pyro_vae.inference.refine import refine
from pyro_vae.inference.stratified import Stratified
from pyro_vae.inference.svi import SVI, DivergedError
from pyro_vae.inference.wake_sleep import WakeSleep
from pyro_vae.inference.weighted import (
    DReG,
    ImportanceWeighted,
    ReweightedWakeSleep,
    StickingTheLanding,
)
from pyro_vae.program import distributions, families, networks, priors
from pyro_vae.program.autoregressive import Autoregressive
from pyro_vae.program.conditional import Conditional, ConditionalFlow
from pyro_vae.program.masked import Masked
from pyro_vae.program.vae import Guide, Model, decode, encode, generate, reconstruct
from pyro_vae.runs.compare import RunComparison, compare_runs
from pyro_vae.runs.evaluate import evaluate_run
from pyro_vae.runs.fit import History, fit
from pyro_vae.runs.load import load
from pyro_vae.runs.results import Results
from pyro_vae.runs.swaps import compare_swaps

__all__ = [
    "SVI",
    "Autoregressive",
    "Bidirectional",
    "ChainEstimate",
    "Comparison",
    "Comparisons",
    "Conditional",
    "ConditionalFlow",
    "DReG",
    "DivergedError",
    "ElboParts",
    "Estimate",
    "Evaluation",
    "FreeBits",
    "Gaps",
    "Guide",
    "History",
    "ImportanceWeighted",
    "Labels",
    "Masked",
    "Model",
    "Nats",
    "PredictiveEstimate",
    "Results",
    "ReweightedWakeSleep",
    "RunComparison",
    "Split",
    "StickingTheLanding",
    "Stratified",
    "UpperBound",
    "WakeSleep",
    "ais",
    "bidirectional",
    "compare",
    "compare_runs",
    "compare_swaps",
    "decode",
    "distributions",
    "elbo_parts",
    "encode",
    "evaluate",
    "evaluate_run",
    "families",
    "fit",
    "from_prior",
    "gaps",
    "generate",
    "joint_log_weights",
    "kl_weight",
    "load",
    "load_data",
    "log_evidence",
    "log_predictive",
    "log_weights",
    "networks",
    "pareto_k",
    "priors",
    "reciprocal_evidence",
    "reconstruct",
    "refine",
    "smoothed",
    "upper_bound",
    "warmup",
]
