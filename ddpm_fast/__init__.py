"""ddpm_fast: fused kernels and addressable noise for denoising diffusion probabilistic models."""

from . import reference
from .backends import backends, use_backend
from .engine import Plan, prepare
from .integrations import accelerate
from .likelihood import BitsPerDim, bits_per_dim
from .locking import InUseError
from .loss import DenoisingLoss, LossOutput
from .nn import UNet, UNetConfig
from .ops import (
    add_noise,
    denoising_loss,
    group_norm_silu,
    hybrid_loss,
    randn,
    reverse_step,
    vlb_terms,
)
from .sampler import Sampler
from .sampling import SampleStep
from .schedule import NoiseSchedule, StepTable
from .sessions import Handle, Session, SessionClosed, SessionFull

__version__ = "0.1.0"

__all__ = [
    "BitsPerDim",
    "DenoisingLoss",
    "Handle",
    "InUseError",
    "LossOutput",
    "NoiseSchedule",
    "Plan",
    "SampleStep",
    "Sampler",
    "Session",
    "SessionClosed",
    "SessionFull",
    "StepTable",
    "UNet",
    "UNetConfig",
    "accelerate",
    "add_noise",
    "backends",
    "bits_per_dim",
    "denoising_loss",
    "group_norm_silu",
    "hybrid_loss",
    "prepare",
    "randn",
    "reference",
    "reverse_step",
    "use_backend",
    "vlb_terms",
]
