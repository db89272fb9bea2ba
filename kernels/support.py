"""Whether the Triton kernels run here, and if not, why. Triton is imported when that is asked."""

from __future__ import annotations

import functools
import importlib
import re

import torch

OPS = (
    "randn", "add_noise", "reverse_step", "denoising_loss", "vlb_terms", "group_norm_silu",
    "group_norm_silu_sums", "group_norm_silu_bwd",
)  # fmt: skip
OLDEST = (3, 5)  # which has all that the kernels ask of the language
_BRINGS = "torch's builds for GPUs bring it from torch 2.9 on"


@functools.cache
def triton_problem() -> str:
    """Why this Python has no Triton that compiles or interprets the kernels; "" if it has."""
    try:
        import triton
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return f"Triton is not installed; {_BRINGS}"
        return f"Triton failed to load: {error}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"Triton failed to load: {error}"
    if version_of(triton.__version__) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"Triton {triton.__version__} is too old: the kernels need {oldest}; {_BRINGS}"
    return ""


def version_of(text: str) -> tuple[int, ...]:
    """The numbers a version begins with."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in found[0].split(".")) if found else ()


def triton_version() -> str:
    import triton

    return str(triton.__version__)


@functools.cache
def interpreted() -> bool:
    """Whether Triton interprets the kernels on the host and compiles none of them.

    TRITON_INTERPRET decides when a kernel's module is imported: all are, here, so that it cannot
    change afterwards.
    """
    if triton_problem():
        return False
    from triton.runtime.jit import JITFunction

    kernels = [
        getattr(importlib.import_module(f".{op}", __package__), f"{op}_tile_kernel") for op in OPS
    ]
    return not all(isinstance(kernel, JITFunction) for kernel in kernels)


@functools.cache
def gpu_problem(torch_problem: str) -> str:
    """Why the kernels run on no GPU of this machine, given why torch has none; "" if nothing is
    known to prevent it."""
    if triton_problem():
        return triton_problem()
    if interpreted():
        return (
            "TRITON_INTERPRET is set, with which Triton interprets kernels on the host, for CPU "
            "tensors; unset it"
        )
    return torch_problem


@functools.cache
def device_problem(index: int) -> str:
    """Why a Triton that compiles does not run the kernels on GPU ``index``; "" if it does."""
    from triton.runtime import driver

    name = torch.cuda.get_device_name(index)
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            return (
                f"cuda:{index}, {name}, has compute capability {major}.{minor}, and Triton "
                "compiles for 8.0 or later"
            )
    try:  # loads the driver's part, which Triton compiles with the machine's C compiler
        driver.active.get_current_target()
    except Exception as error:
        return f"Triton finds no driver for {name}: {error}"
    return ""
