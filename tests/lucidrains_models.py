"""Small models as denoising_diffusion_pytorch calls them, and pairs of stock and accelerated."""

from __future__ import annotations

import copy
import random

import torch
from torch import nn

from ddpm_fast import accelerate

SIZE = 8  # of images


class TinyNet(nn.Module):
    """One convolution of the image, and of x_self_cond where it takes that, in its own dtype."""

    def __init__(self, channels=3, self_condition=False):
        super().__init__()
        self.channels = self.out_dim = channels
        self.self_condition = self_condition
        self.conv = nn.Conv2d(channels * (1 + self_condition), channels, 3, padding=1)
        self.time = nn.Embedding(1000, channels)

    def forward(self, x, t, x_self_cond=None):
        x = x.to(self.conv.weight.dtype)
        if self.self_condition:
            known = torch.zeros_like(x) if x_self_cond is None else x_self_cond.to(x.dtype)
            x = torch.cat([x, known], 1)
        return self.conv(x) + self.time(t)[:, :, None, None]


def stock_diffusion(package, *, self_condition=False, model=None, **config):
    torch.manual_seed(0)
    model = TinyNet(self_condition=self_condition) if model is None else model
    return package.GaussianDiffusion(model, image_size=SIZE, **config)


def both(package, *, noise="torch", **config):
    """A stock diffusion, and an accelerated copy that draws torch's numbers."""
    stock = stock_diffusion(package, **config)
    return stock, accelerate(copy.deepcopy(stock), noise=noise)


def seeded(function, seed=1):
    """What it returns with both of the stock code's generators seeded, and torch's after it."""
    torch.manual_seed(seed)
    random.seed(seed)
    return function(), torch.get_rng_state()


def images(samples=4, channels=3, seed=0):
    """In [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(samples, channels, SIZE, SIZE, generator=generator)
