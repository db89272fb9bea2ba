"""Samplers whose steps are captured on the host, and what they are to draw."""

from __future__ import annotations

import warnings

import pytest
import torch
from graph_on_host import HostRecorder
from test_unet_variants import SMALL
from unet2d_models import SMALL as THEIRS
from unet2d_models import theirs_of
from unet_weights import randomised

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig
from ddpm_fast.capture import recorder
from ddpm_fast.engine import Trajectory

SCHEDULE = NoiseSchedule.linear()
SHAPE = (4, 3, 8, 8)
CLASSES = UNetConfig(**{**vars(SMALL), "in_channels": 3, "num_classes": 3})


@pytest.fixture(name="graphs")
def graphs_on_host(monkeypatch):
    """CPU tensors are captured, too. Gives the recordings, one after the other."""
    monkeypatch.setitem(recorder.RECORDERS, "cpu", HostRecorder)
    monkeypatch.setattr(HostRecorder, "recordings", [])
    monkeypatch.setattr(HostRecorder, "marks", 0)
    return HostRecorder.recordings


@pytest.fixture(name="rows_on_device")
def rows_as_on_a_device(monkeypatch):
    """A plan reads its rows as on a GPU, where the host knows none."""
    monkeypatch.setattr(
        Trajectory,
        "_rows_of",
        lambda self, row, labels, _: self._table().select(row.view(-1), labels),
    )


def model(x, t, shift=None, gain=1.0, more=None):
    """Smooth, dependent on t."""
    eps = torch.sin(2 * x) * (0.5 + gain * t.reshape(-1, *[1] * (x.ndim - 1)) / 2000)
    for each in (shift, *(more or {}).get("shifts", ())):
        eps = eps if each is None else eps + each.reshape(-1, *[1] * (x.ndim - 1))
    return eps


def doubled(x, t):
    return torch.cat([model(x, t), torch.cos(3 * x)], 1)


class Net(torch.nn.Module):
    """A module with a weight and a buffer, in a dtype."""

    def __init__(self, dtype=torch.float32, gain=2.0):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor([gain], dtype=dtype))
        self.register_buffer("shift", torch.tensor([0.1], dtype=dtype))
        self.scale = 1.0
        self.eval()

    def forward(self, x, t):
        return self.scale * torch.sin(self.gain * x) + self.shift


def sampler_of(model=model, **kwargs):
    return Sampler(model, SCHEDULE, **{"num_steps": 20, **kwargs})


def silent(call):
    """What it returns without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


def drawn(sampler, shape=SHAPE, **kwargs):
    """All states and x̂₀ of a stream, a sample and a sample by a callback."""
    kwargs = {"seed": 7, **kwargs}
    found = [tensor for step in sampler.stream(shape, **kwargs) for tensor in (step.x, step.x0)]
    found.append(sampler.sample(shape, **kwargs))
    found.append(sampler.sample(shape, callback=lambda step: None, **kwargs))
    return found


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert a.is_inference() == b.is_inference()


def assert_played(sampler, graphs, shape=SHAPE, captures=2, **kwargs):
    """From graphs, without a warning, to the bits of the loop."""
    sampler.graph = "off"
    expected = drawn(sampler, shape, **kwargs)
    sampler.graph, before = "auto", len(graphs)
    found = silent(lambda: drawn(sampler, shape, **kwargs))
    assert_same(found, expected)
    assert len(graphs) - before == captures
    assert all(graph.replays for graph in graphs)
    return found


SHIFTS = torch.tensor([0.1, -0.1, 0.3, 0.0])
GUIDED = {"model_kwargs": {"shift": SHIFTS}, "uncond_kwargs": {}}
ONES = torch.ones(4, dtype=torch.int64)
LAST = torch.linspace(-1, 1, 768).view(4, 3, 8, 8).to(memory_format=torch.channels_last)


def one_buffer():
    buffer = torch.empty(SHAPE)
    return lambda x, t, shift=None: buffer.copy_(model(x, t, shift))


def embedded():
    torch.manual_seed(0)
    table = torch.nn.Embedding(3, 3)
    return lambda x, t, y: torch.sin(x + table(y)[..., None, None]) * (t[:, None, None, None] / 999)


def unet():
    return randomised(UNet(CLASSES))


# The sampler's model, its arguments, and those of its call
CASES = {
    "ddpm": (model, {}, {}),
    "ddim": (model, {"method": "ddim", "eta": 0.5}, {}),
    "learned range": (doubled, {"variance": "learned_range"}, {}),
    "a number guides": (model, {"guidance_scale": 2.5}, GUIDED),
    "numbers guide": (model, {"guidance_scale": torch.tensor([0.0, 1, 2, 4])}, GUIDED),
    "a tensor guides": (model, {"guidance_scale": torch.tensor(3.0)}, GUIDED),
    "one buffer": (one_buffer(), {"guidance_scale": 2.5}, GUIDED),
    "threshold": (model, {"dynamic_threshold": 0.9, "guidance_scale": 2.5}, GUIDED),
    "denoised_fn": (model, {"denoised_fn": lambda x0: 0.9 * x0 + 0.01}, {}),
    "reference": (model, {"backend": "reference", "clip": None}, {}),
    "floats": (model, {"model_timesteps": torch.arange(1000) / 7}, {}),
    "bf16": (Net(torch.bfloat16), {}, {}),
    "fp16": (Net(torch.float16), {"denoised_fn": torch.tanh}, {}),
    "seeds and ids": (model, {}, {"seed": torch.tensor([1, -3, 5, 9]), "sample_ids": [5, 1, 2, 8]}),
    "a large seed": (model, {}, {"seed": 2**64 - 3, "sample_ids": torch.arange(4) + 2**40}),
    "start": (model, {}, {"x_T": LAST, "start": 3}),
    "start in bf16": (Net(torch.bfloat16), {}, {"x_T": LAST, "start": 4}),
    "nested": (model, {}, {"model_kwargs": {"more": {"shifts": [SHIFTS, (SHIFTS + 1)]}}}),
    "expanded": (model, {}, {"model_kwargs": {"shift": torch.tensor(0.25).expand(4)}}),
    "three dimensions": (model, {}, {"shape": (2, 3, 2, 4, 5)}),
    "none": (model, {}, {"shape": (3, 5)}),
    # Where a mode is on that sees operations, as recording here, its norms are PyTorch's
    "classes": (unet(), {"plan": "off", "guidance_scale": 1.5, "backend": "reference"}, {
        "model_kwargs": {"class_labels": None}, "uncond_kwargs": {"class_labels": None}}),
    "labels": (embedded(), {"guidance_scale": 1.5}, {
        "model_kwargs": {"y": torch.tensor([2, 0, 1, 1])}, "uncond_kwargs": {"y": 2 * ONES}}),
}  # fmt: skip


def diffusers_model():
    pytest.importorskip("diffusers")
    return theirs_of(THEIRS)
