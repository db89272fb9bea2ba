"""The engine's operations: checked here, registered with torch, run by a backend's kernel."""

from .add_noise import add_noise
from .randn import randn
from .reverse_step import reverse_step

__all__ = ["add_noise", "randn", "reverse_step"]
