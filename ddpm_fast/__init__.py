"""ddpm_fast: fused kernels and addressable noise for denoising diffusion probabilistic models."""

from . import reference
from .backends import backends, use_backend
from .nn import UNet, UNetConfig
from .ops import add_noise, randn, reverse_step
from .sampler import Sampler, SampleStep
from .schedule import NoiseSchedule, StepTable

__version__ = "0.1.0"

__all__ = [
    "NoiseSchedule",
    "SampleStep",
    "Sampler",
    "StepTable",
    "UNet",
    "UNetConfig",
    "add_noise",
    "backends",
    "randn",
    "reference",
    "reverse_step",
    "use_backend",
]
