"""The ops on each backend for GPUs that runs here, and what is compared of their results."""

from __future__ import annotations

import pytest
import torch
from helpers import no_gpu

import ddpm_fast
from ddpm_fast import use_backend

BACKENDS = ["cuda", "triton"]
FORMATS = ["contiguous", "channels_last"]
BIG = 2**31 + 520


class On:
    """The ops on one backend for GPUs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, op: str):
        def run(*args, **kwargs):
            with use_backend(self.name):
                return getattr(ddpm_fast, op)(*args, **kwargs)

        return run


@pytest.fixture(name="on", params=BACKENDS, autouse=True)
def on_each(request: pytest.FixtureRequest):
    """Each backend for GPUs that runs here; tensors on the CPU keep to the CPU's kernels."""
    status = ddpm_fast.backends()[request.param]
    if no_gpu() or not status.available:
        pytest.skip(f"{request.param}: {status.detail}")
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    yield On(request.param)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(name="on", params=BACKENDS, autouse=True)
def backend_in_use(request: pytest.FixtureRequest):
    """Every test on each backend for GPUs that runs here, which all ops take; its name."""
    status = ddpm_fast.backends()[request.param]
    if no_gpu() or not status.available:
        pytest.skip(f"{request.param}: {status.detail}")
    with use_backend(request.param):
        yield request.param


def gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bits, and strides."""
    assert found.is_cuda
    assert not found.isnan().any()
    assert torch.equal(found.cpu(), expected)
    assert found.stride() == expected.stride()
