"""What the tests share: known answers, instruction sets, and the shapes and dtypes to try."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import cuda_on_host
import pytest
import torch
from cuda_on_host import on_host  # noqa: F401
from fake_gpus import entered, gpus  # noqa: F401
from helpers import ISAS, no_gpu

from ddpm_fast.backends import native

if no_gpu():  # read when Triton is imported, which nothing here has done
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Known answers computed with 50 digits by independent code."""
    return json.loads((Path(__file__).parent / "data" / "golden.json").read_text())


@pytest.fixture(params=[*ISAS, "cuda-on-host", "cuda-blocks-on-host"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn, those that this processor lacks skipped, then the bodies of the
    CUDA kernels run on the host: the one that takes a problem, and the one that takes any."""
    if request.param.endswith("on-host"):
        stand_in = cuda_on_host.AsNative()
        stand_in.module.set_blocks_only("blocks" in request.param)
        monkeypatch.setattr(import_module("ddpm_fast.backends"), "native", stand_in)
        yield request.param
        stand_in.module.set_blocks_only(False)
        return
    with_isa(request.param)
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def with_isa(name: str) -> None:
    if native is None:
        pytest.skip("installed without compiled kernels")
    if name not in native.supported_isas():
        pytest.skip(f"this processor has no {name}")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an element a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny models, which more threads slow down, and for bits that child processes of one
    thread have to meet."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
