"""The other implementations, where they are installed, and one word for those that are not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from openai_diffusion import peer
from torch import Tensor, nn


@dataclass(frozen=True)
class Missing:
    """Stands where a candidate would, and says why there is none."""

    why: str


Maybe = Callable[..., Any] | Missing


def calling(function: Maybe, *args: Any, **kwargs: Any) -> Callable[[], Any] | Missing:
    return function if isinstance(function, Missing) else lambda: function(*args, **kwargs)


@functools.cache
def diffusers() -> ModuleType | Missing:
    try:
        import diffusers as package
    except ImportError:
        return Missing("diffusers is not installed")
    return package


@functools.cache
def lucidrains() -> ModuleType | Missing:
    """The package's main module; where torchvision is missing, the tests' stand-in is imported."""
    name = "denoising-diffusion-pytorch"
    try:
        from lucidrains_package import import_package

        return import_package()
    except ImportError as error:
        missing = str(error.name).startswith("denoising_diffusion_pytorch")
        return Missing(f"{name} is not installed" if missing else f"{name}: {error}")


class Given(nn.Module):
    """A model, as lucidrains' objects take one, that says one thing whatever it is asked."""

    self_condition = False

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.channels = self.out_dim = output.shape[1]
        self.output = nn.Parameter(output)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.output


class Wrapped(nn.Module):
    """A network as lucidrains' objects take one."""

    self_condition = False

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network = network
        self.channels = self.out_dim = channels

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.network(x, t)


def lucidrains_diffusion(model: nn.Module, side: int, device: torch.device, **config: Any) -> Any:
    """Their object, with the linear schedule and ε prediction; Missing if they are."""
    package = lucidrains()
    if isinstance(package, Missing):
        return package
    options = {"objective": "pred_noise", "beta_schedule": "linear"} | config
    return package.GaussianDiffusion(model, image_size=side, **options).to(device)


def openai_diffusion(
    variance: str, loss: str = "MSE", mean: str = "EPSILON", respacing: str = "1000"
) -> Any:
    """OpenAI's object, of the code that stands in for it, with the linear schedule."""
    of = peer("guided")
    return of.SpacedDiffusion(
        of.space_timesteps(1000, respacing),
        betas=np.linspace(1e-4, 0.02, 1000),
        model_mean_type=of.ModelMeanType[mean],
        model_var_type=of.ModelVarType[variance],
        loss_type=of.LossType[loss],
    )
