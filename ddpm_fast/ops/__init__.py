"""The engine's operations: checked here, registered with torch, run by a backend's kernel."""

from .add_noise import add_noise
from .denoising_loss import denoising_loss
from .group_norm_silu import group_norm_silu
from .randn import randn
from .reverse_step import reverse_step
from .vlb_terms import hybrid_loss, vlb_terms

__all__ = [
    "add_noise",
    "denoising_loss",
    "group_norm_silu",
    "hybrid_loss",
    "randn",
    "reverse_step",
    "vlb_terms",
]
