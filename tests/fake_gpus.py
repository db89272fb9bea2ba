"""A machine with two GPUs, as far as the choice of a backend asks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddpm_fast.kernels import support

backends = import_module("ddpm_fast.backends")


class FakeCuda(SimpleNamespace):
    """A module built with CUDA 13.0, under a driver for it."""

    def __init__(self, driver: int = 13_000, targets: tuple[str, ...] = ("sm_90", "compute_90")):
        super().__init__(calls=[], targets=list(targets))
        self.driver_version = lambda: driver
        self.runtime_version = lambda: 13_000
        self.randn = lambda *arguments: self.calls.append(arguments)


class WithCuda:
    """The native module with another part for GPUs."""

    def __init__(self, cuda: FakeCuda | None) -> None:
        self.module, self.cuda = backends.native, cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """gpus(native.cuda, capability, interpreted): torch as on a machine with two such GPUs, and a
    Triton that compiles or interprets."""

    def install(
        cuda: FakeCuda | None, capability: tuple[int, int] = (9, 0), interpreted: bool = True
    ) -> None:
        monkeypatch.setattr(backends, "native", WithCuda(cuda))
        monkeypatch.setattr(support, "interpreted", lambda: interpreted)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        for name, value in {
            "is_available": True,
            "device_count": 2,
            "current_device": 0,
            "get_device_capability": capability,
            "get_device_name": "NVIDIA H200",
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        raw_stream = lambda index: 70 + index  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", raw_stream, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        forget()

    def forget() -> None:
        backends._cuda_problem.cache_clear()
        backends.device_problem.cache_clear()
        support.gpu_problem.cache_clear()
        support.device_problem.cache_clear()

    yield install
    forget()


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch.cuda.device is told: indices, and "left"."""
    told: list[Any] = []

    class Device(contextlib.AbstractContextManager):
        def __init__(self, index: int) -> None:
            told.append(index)

        def __exit__(self, *_: object) -> None:
            told.append("left")

    monkeypatch.setattr(torch.cuda, "device", Device)
    return told
