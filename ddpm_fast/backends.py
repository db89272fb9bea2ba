"""Which implementation runs: the compiled kernels, or plain PyTorch.

``auto`` takes the kernels made for a tensor's device: on a GPU those of CUDA C++ where they run,
else Triton's. A backend asked for by name that cannot run raises with the reason; where ``auto``
finds none for a CPU tensor it says so once and takes the reference implementation.

Environment variables:
    DDPM_FAST_BACKEND: the backend of calls that do not name one ("auto" if unset), read on import.
    DDPM_FAST_CPU_ISA: "avx512", "avx2" or "portable" in place of the widest that runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, cast, get_args

import torch  # before the native module: both then share torch's OpenMP runtime

from .kernels import support

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
    return Backends({name: status() for name, status in _STATUSES.items()})


def _reference_status() -> BackendStatus:
    return BackendStatus("reference", True, f"plain PyTorch {torch.__version__}, any device")


def _cpu_status() -> BackendStatus:
    if native is None:
        return BackendStatus("cpu", False, _why_no_native)
    threads = torch.get_num_threads() if native.openmp else 1
    others = [isa for isa in native.supported_isas() if isa != native.isa()]
    detail = f"{native.isa()} ({', '.join(others)} also run here), " if others else native.isa()
    return BackendStatus("cpu", True, f"{detail}{threads} threads, {native.compiler}")


def _cuda_status() -> BackendStatus:
    problem = _cuda_problem()
    if problem:
        return BackendStatus("cuda", False, problem)
    cuda = native.cuda  # type: ignore[union-attr]
    built = (
        f"built for {', '.join(cuda.targets)}; driver for CUDA {_version(cuda.driver_version())}"
    )
    return _gpu_status("cuda", device_problem, built)


def _gpu_status(name: str, problem_of: Callable[[int], str], detail: str) -> BackendStatus:
    """What each GPU is called that runs the backend, and why the others do not."""
    found = [problem_of(i) for i in range(torch.cuda.device_count())]
    names = [torch.cuda.get_device_name(i) for i, problem in enumerate(found) if not problem]
    parts = [", ".join(names), *filter(None, found), detail]
    return BackendStatus(name, bool(names), "; ".join(filter(None, parts)))


def _triton_status() -> BackendStatus:
    problem = _triton_problem()
    if not problem:
        return _gpu_status("triton", triton_device_problem, f"Triton {support.triton_version()}")
    if _interprets_on_the_host():
        how = "interpreted on the host, slowly, as TRITON_INTERPRET says: CPU tensors only"
        return BackendStatus("triton", True, f"Triton {support.triton_version()}, {how}")
    return BackendStatus("triton", False, problem)


_STATUSES = {
    "reference": _reference_status,
    "cpu": _cpu_status,
    "cuda": _cuda_status,
    "triton": _triton_status,
}


@functools.cache
def _cuda_problem() -> str:
    """Why no GPU at all can run the CUDA kernels; "" if nothing is known to prevent it."""
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is for AMD's GPUs, and these kernels for NVIDIA's"
    if native is None:
        return _why_no_native
    if native.cuda is None:
        return (
            "installed without the CUDA kernels (no nvcc was found, or DDPM_FAST_CUDA=OFF was "
            "set); put the CUDA toolkit's nvcc on PATH, or name it in CUDACXX, and reinstall with "
            "DDPM_FAST_CUDA=ON"
        )
    if torch.version.cuda is None:
        return torch_problem()
    problem = driver_problem(native.cuda.driver_version(), native.cuda.runtime_version())
    return problem or torch_problem()


def torch_problem() -> str:
    """Why torch has no CUDA device; "" if it has one."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    return "torch finds no CUDA device"


def driver_problem(driver: int, runtime: int) -> str:
    """Why a driver for CUDA ``driver`` does not run kernels built with CUDA ``runtime``, or "".

    Versions as CUDA counts them: 1000 major + 10 minor. Machine code runs on any driver of the same
    major version or a later one (CUDA's minor version compatibility).
    """
    if driver == 0:
        return "no NVIDIA driver was found"
    if driver // 1000 < runtime // 1000:
        return (
            f"the driver is too old: it runs CUDA {_version(driver)} at most, the kernels were "
            f"built with CUDA {_version(runtime)}; update the driver, or reinstall with an nvcc of "
            f"CUDA {driver // 1000}"
        )
    return ""


def ptx_problem(capability: tuple[int, int], driver: int, runtime: int) -> str:
    """Why a GPU that only PTX serves does not run it, or "": its driver has to be as new."""
    if driver >= runtime:
        return ""
    major, minor = capability
    return (
        f"compute capability {major}.{minor}, which was not built, and the driver, for CUDA "
        f"{_version(driver)}, does not compile the PTX of CUDA {_version(runtime)}; reinstall with "
        f'DDPM_FAST_CUDA_ARCHS="{major}{minor}", or update the driver'
    )


def target_problem(capability: tuple[int, int], targets: Sequence[str]) -> str:
    """Why kernels built for ``targets`` do not run on a GPU of a compute capability, or "".

    "sm_86" is machine code, for 8.6 and later minor versions; "compute_86" is PTX, which the driver
    compiles for any later GPU.
    """
    major, minor = capability
    for target in targets:
        kind, _, number = target.partition("_")
        if not number.isdigit():  # 90a: that GPU and no other
            if number[:-1] == f"{major}{minor}":
                return ""
        elif kind == "compute":
            if int(number) <= 10 * major + minor:
                return ""
        elif int(number) // 10 == major and int(number) % 10 <= minor:
            return ""
    if major < 8:
        return f"compute capability {major}.{minor}, and the kernels need 8.0 or later"
    return (
        f"compute capability {major}.{minor}, and the kernels were built for {', '.join(targets)}; "
        f'reinstall with DDPM_FAST_CUDA_ARCHS="{major}{minor}"'
    )


@functools.cache
def device_problem(index: int) -> str:
    """Why the CUDA kernels do not run on GPU ``index``; "" if they do."""
    problem = _cuda_problem()
    if not problem:
        cuda = native.cuda  # type: ignore[union-attr]
        capability = torch.cuda.get_device_capability(index)
        problem = target_problem(capability, cuda.targets)
        machine_code = [target for target in cuda.targets if target.startswith("sm_")]
        if not problem and target_problem(capability, machine_code):
            problem = ptx_problem(capability, cuda.driver_version(), cuda.runtime_version())
        if problem:
            problem = f"cuda:{index}, {torch.cuda.get_device_name(index)}, has {problem}"
    return problem


def _triton_problem() -> str:
    """Why no GPU at all can run the Triton kernels; "" if nothing is known to prevent it."""
    return support.gpu_problem(torch_problem())


def _interprets_on_the_host() -> bool:
    """Whether Triton's interpreter is meant; beside a GPU it is an accident."""
    return support.interpreted() and not torch.cuda.is_available()


def triton_device_problem(index: int) -> str:
    """Why the Triton kernels do not run on GPU ``index``; "" if they do."""
    return _triton_problem() or support.device_problem(index)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


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


def chosen() -> Backend:
    """The backend of calls that do not name one, in this thread or task; perhaps "auto"."""
    return cast(Backend, _chosen.get())


def require(name: str) -> None:
    """Raises unless ``name`` is "auto" or a backend that runs here."""
    if name not in get_args(Backend):
        accepted = ", ".join(map(repr, get_args(Backend)))
        raise ValueError(f"backend must be one of {accepted}; got {name!r}")
    if name in ("auto", "reference") or (name == "cpu" and native is not None):
        return
    if name == "cuda" and not _cuda_problem() and not device_problem(torch.cuda.current_device()):
        return  # without a look at every GPU: a Sampler asks at each step
    if (
        name == "triton"
        and not _triton_problem()
        and not triton_device_problem(torch.cuda.current_device())
    ):
        return
    status = _STATUSES[name]()
    if not status.available:
        raise RuntimeError(f"backend '{name}' cannot run here: {status.detail}")


def select(device: torch.device) -> str:
    """The backend for tensors on ``device``: "reference" or one whose kernels take them."""
    name = _chosen.get()
    if name == "auto":
        return _automatic(device)
    if name in _ON_GPUS and device.type == "cuda":
        problem = _ON_GPUS[name](device)
        if problem:
            raise RuntimeError(
                f"backend '{name}' cannot run on {device}: {problem}; {_USE_REFERENCE}"
            )
    elif name == "triton" and device.type == "cpu" and _interprets_on_the_host():
        pass
    elif name != "reference" and not (name == "cpu" == device.type and native is not None):
        require(name)
        on_host = name == "cpu" or (name == "triton" and _interprets_on_the_host())
        wanted = "CPU" if on_host else "CUDA"
        raise RuntimeError(f"backend '{name}' takes {wanted} tensors; got one on {device}")
    return name


def kernels_for(device: torch.device) -> bool:
    """Whether compiled kernels take tensors on ``device``, without a word where none do."""
    if device.type == "cpu":
        return native is not None and _chosen.get() in ("auto", "cpu")
    try:
        return select(device) != "reference"
    except RuntimeError:
        return False


def _automatic(device: torch.device) -> str:
    if device.type == "cpu":
        if native is not None:
            return "cpu"
        _warn_once(f"ddpm_fast runs its slow reference implementation: {_why_no_native}")
        return "reference"
    if device.type == "cuda":
        problems = {}
        for name, problem_of in _ON_GPUS.items():
            problems[name] = problem_of(device)
            if not problems[name]:
                return name
        why = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise RuntimeError(f"no ddpm_fast kernels for {device}: {why}; {_USE_REFERENCE}")
    raise RuntimeError(f"no ddpm_fast kernels for {device.type} tensors; {_USE_REFERENCE}")


_USE_REFERENCE = (
    "DDPM_FAST_BACKEND=reference (or backend='reference') runs plain PyTorch on any device"
)


def _problem_of_cuda(device: torch.device) -> str:
    return _cuda_problem() if device.index is None else device_problem(device.index)


def _problem_of_triton(device: torch.device) -> str:
    return _triton_problem() if device.index is None else triton_device_problem(device.index)


# In the order in which auto asks them.
_ON_GPUS: dict[str, Callable[[torch.device], str]] = {
    "cuda": _problem_of_cuda,
    "triton": _problem_of_triton,
}

Kernel = Callable[..., None]


def kernel_of(op: str, backend: str, device: torch.device) -> tuple[Kernel, tuple[int, ...]]:
    """An op's kernel, and where it runs: what follows the checked arguments of csrc/arguments.h.

    On the CPU that is a number of threads, on a GPU the stream that is current there. Nothing waits
    for a GPU's kernel; a launch that fails raises RuntimeError in CUDA's words.
    """
    if backend == "cpu":
        # As many threads as torch uses; the kernels take fewer where there is little to do.
        return getattr(native, op), (torch.get_num_threads(),)
    index = device.index
    kernel: Kernel = getattr(native.cuda, op)  # type: ignore[union-attr]
    if torch._C._cuda_getDevice() != index:
        kernel = functools.partial(_on_device, index, kernel)
    # torch.cuda.current_stream(index).cuda_stream makes two objects on its way to this number.
    return kernel, (index, torch._C._cuda_getCurrentRawStream(index))


def triton_launcher(op: str, device: torch.device) -> Kernel:
    """launch_<op> of kernels/<op>.py, for tensors on ``device`` and the stream current there."""
    launch = _import_launcher(op)
    if device.type == "cuda" and torch._C._cuda_getDevice() != device.index:
        return functools.partial(_on_device, device.index, launch)
    return launch


@functools.cache
def _import_launcher(op: str) -> Kernel:
    module = importlib.import_module(f".kernels.{op}", __package__)
    launch: Kernel = getattr(module, f"launch_{op}")
    return launch


def _on_device(index: int, kernel: Kernel, *arguments: Any) -> None:
    with torch.cuda.device(index):
        kernel(*arguments)


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
