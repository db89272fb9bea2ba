"""Which implementation runs: the compiled kernels, or plain PyTorch.

``auto`` takes the kernels made for a tensor's device. A backend asked for by name that cannot run
raises with the reason; where ``auto`` finds none for a CPU tensor it says so once and takes the
reference implementation.

Environment variables:
    DDPM_FAST_BACKEND: the backend of calls that do not name one ("auto" if unset), read on import.
    DDPM_FAST_CPU_ISA: "avx512", "avx2" or "portable" in place of the widest that runs.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, get_args

import torch  # before the native module: both then share torch's OpenMP runtime

Backend = Literal["auto", "reference", "cpu", "cuda", "triton"]

# The codes of DType in csrc/core/convert.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}


@dataclass(frozen=True)
class BackendStatus:
    """What is known of one backend: whether it runs here, how, and if not, why."""

    name: str
    available: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name:<10} {'yes' if self.available else 'no':<4} {self.detail}"


class Backends(dict[str, BackendStatus]):
    """:func:`backends`' answer, by name; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(str(status) for status in self.values())


def _load_native() -> tuple[ModuleType | None, str]:
    try:
        from . import _native  # type: ignore[attr-defined]
    except ImportError as error:
        missing = "cannot import name '_native'" in str(error)
        why = "installed without compiled kernels" if missing else f"failed to load: {error}"
        return None, f"{why}; reinstall with a C++ compiler and without DDPM_FAST_NATIVE=0"
    isa = os.environ.get("DDPM_FAST_CPU_ISA")
    if isa:
        try:
            _native.set_isa(isa)
        except ValueError as error:
            raise ValueError(f"DDPM_FAST_CPU_ISA: {error}") from None
    return _native, ""


native, _why_no_native = _load_native()


def backends() -> Backends:
    """What can run here, and why the rest cannot.

    >>> backends()["reference"].available
    True
    """
    statuses = [
        BackendStatus("reference", True, f"plain PyTorch {torch.__version__}, any device"),
        _cpu_status(),
        _cuda_status(),
        BackendStatus("triton", False, "this version has no Triton kernels"),
    ]
    return Backends({status.name: status for status in statuses})


def _cpu_status() -> BackendStatus:
    if native is None:
        return BackendStatus("cpu", False, _why_no_native)
    threads = torch.get_num_threads() if native.openmp else 1
    others = [isa for isa in native.supported_isas() if isa != native.isa()]
    detail = f"{native.isa()} ({', '.join(others)} also run here), " if others else native.isa()
    return BackendStatus("cpu", True, f"{detail}{threads} threads, {native.compiler}")


def _cuda_status() -> BackendStatus:
    if native is None:
        return BackendStatus("cuda", False, _why_no_native)
    built = ", ".join(native.cuda_archs) or "none"
    return BackendStatus("cuda", False, f"no CUDA kernels; architectures built: {built}")


_default: str = os.environ.get("DDPM_FAST_BACKEND", "auto")
if _default not in get_args(Backend):
    raise ValueError(
        f"DDPM_FAST_BACKEND: backend must be one of {', '.join(map(repr, get_args(Backend)))}; "
        f"got {_default!r}"
    )
_chosen: ContextVar[str] = ContextVar("ddpm_fast_backend", default=_default)


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Runs the calls inside on one backend; "auto" leaves the choice to each tensor's device.

    The choice holds for the thread (or task) that made it.

    Raises:
        ValueError: no such backend.
        RuntimeError: it cannot run here; the message says why.
    """
    require(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def require(name: str) -> None:
    """Raises unless ``name`` is "auto" or a backend that runs here."""
    if name not in get_args(Backend):
        accepted = ", ".join(map(repr, get_args(Backend)))
        raise ValueError(f"backend must be one of {accepted}; got {name!r}")
    if name in ("auto", "reference") or (name == "cpu" and native is not None):
        return
    status = backends()[name]
    if not status.available:
        raise RuntimeError(f"backend '{name}' cannot run here: {status.detail}")


def select(device: torch.device) -> str:
    """The backend for tensors on ``device``: "reference" or one whose kernels take them."""
    name = _chosen.get()
    if name == "auto":
        return _automatic(device.type)
    require(name)
    if name == "cpu" and device.type != "cpu":
        raise RuntimeError(f"backend 'cpu' takes CPU tensors; got one on {device}")
    return name


def _automatic(device_type: str) -> str:
    if device_type == "cpu":
        if native is not None:
            return "cpu"
        _warn_once(f"ddpm_fast runs its slow reference implementation: {_why_no_native}")
        return "reference"
    raise RuntimeError(
        f"no ddpm_fast kernels for {device_type} tensors: {_cuda_status().detail}; "
        "DDPM_FAST_BACKEND=reference (or backend='reference') runs plain PyTorch on any device"
    )


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
