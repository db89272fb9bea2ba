"""What the tests of a sample() that keeps its state share: its model, and calls of it."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, randn
from ddpm_fast.states import read_state

SCHEDULE = NoiseSchedule.linear(100)
SHAPE = (3, 2, 8, 8)


class Net(nn.Module):
    """Convolutions that know t and a class; ``calls`` counts, and ``before`` is called first."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        torch.manual_seed(outputs)
        self.inside = nn.Conv2d(2, 8, 3, padding=1)
        self.outside = nn.Conv2d(8, outputs, 3, padding=1)
        self.classes = nn.Embedding(5, 8)
        self.register_buffer("scale", torch.linspace(0.1, 1, 100), persistent=False)
        self.calls, self.before = 0, lambda call: None

    def forward(self, x, t, y=None, **ignored):
        self.before(self.calls)
        self.calls += 1
        h = self.inside(x) * self.scale[t.long()].to(x.dtype)[:, None, None, None]
        if y is not None:
            h = h + self.classes(y)[:, :, None, None]
        return self.outside(torch.sin(h))


UNET = UNetConfig(
    image_size=8, in_channels=2, channels=(16, 16), num_res_blocks=1, attention_resolutions=(4,),
    norm_groups=4, num_classes=3,
)  # fmt: skip


def unet() -> UNet:
    torch.manual_seed(5)
    return UNet(UNET).eval()


def sampler_of(model=None, **arguments: Any) -> Sampler:
    return Sampler(model or Net().eval(), SCHEDULE, **{"num_steps": 12, **arguments})


X_T = randn(SHAPE, seed=3)
CLASSES, OTHERS = torch.tensor([0, 3, 1]), torch.tensor([4, 4, 4])
# What is called: a sampler made anew, and the arguments of sample()
CASES: dict[str, Any] = {
    "plain": lambda: (sampler_of(), {}),
    "ddim": lambda: (sampler_of(method="ddim", eta=0.5), {"seed": (1 << 64) - 1}),
    "bf16": lambda: (sampler_of(Net().eval().bfloat16()), {"seed": 2}),
    "learned": lambda: (sampler_of(Net(4).eval(), variance="learned_range"), {}),
    "addresses": lambda: (
        sampler_of(), {"seed": torch.tensor([1, -1, 9]), "sample_ids": [5, 1 << 40, 0]},
    ),
    "guidance": lambda: (
        sampler_of(guidance_scale=torch.tensor([1.5, 2.0, 0.0])),
        {"model_kwargs": {"y": CLASSES}, "uncond_kwargs": {"y": OTHERS}},
    ),
    "threshold": lambda: (
        sampler_of(dynamic_threshold=0.9, denoised_fn=torch.tanh), {"seed": 4},
    ),
    "start": lambda: (
        sampler_of(), {"x_T": X_T.contiguous(memory_format=torch.channels_last), "start": 2},
    ),
    "unet": lambda: (sampler_of(unet()), {"model_kwargs": {"class_labels": CLASSES % 4}}),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


class Stop(Exception):
    pass


def stops_at(row: int):
    """A callback that ends the loop after the step of a row."""

    def callback(step):
        if step.step == row:
            raise Stop

    return callback


@functools.cache
def undisturbed(case: str) -> torch.Tensor:
    sampler, arguments = CASES[case]()
    return sampler.sample(SHAPE, **arguments)


def row_in(folder: Path) -> int:
    return read_state(folder, "sample")[0]["row"]


def forked(work) -> int:
    """Its exit status in another process; negative: the signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
