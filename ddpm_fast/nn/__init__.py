"""Networks."""

from .config import UNetConfig
from .unet import UNet

__all__ = ["UNet", "UNetConfig"]
