"""The CPU's native code under sanitizers: `make sanitize`; tests/test_sanitized.py runs a part.

    python tests/sanitize.py              all that follows but the last
    python tests/sanitize.py memory       random calls, without Python: AddressSanitizer (out of
                                          bounds, use after free), UBSan, LeakSanitizer
    python tests/sanitize.py threads      the same calls: ThreadSanitizer
    python tests/sanitize.py python       the tests of the native ops, in a Python with
                                          AddressSanitizer and UBSan
    python tests/sanitize.py cuda         those of the CUDA kernels' bodies on the host, the same

Needs g++ with its sanitizers' libraries, cmake, ninja and pybind11. All is built in
build/sanitize/, and again only where a source has changed; the package's own module stays.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
MEMORY, THREADS = "address,undefined", "thread"
ROUNDS = 400  # of random calls of each op

# What calls a native kernel; the rest of the suite does so through the same ops and plans.
TESTS = [
    "test_randn.py",
    "test_noise.py",
    "test_add_noise.py",
    "test_reverse_step.py",
    "test_reverse_step_interface.py",
    "test_denoising_loss.py",
    "test_vlb_terms.py",
    "test_hybrid_terms.py",
    "test_group_norm_silu.py",
    "test_group_norm_silu_interface.py",
    "test_native_layers.py",
    "test_native_plan.py",
    "test_properties_noise.py",
    "test_properties_steps.py",
    "test_properties_objectives.py",
    "test_properties_norms.py",
]
_PLANT = """
import torch
from ddpm_fast import _native
out = torch.empty(1023)
_native.randn(out.data_ptr(), 0, 1, 1, 1024, False, 0, 0, 0, 0, 0, 0, 1)
"""


def missing() -> str:
    """What this machine lacks, in words; "" if nothing."""
    gcc = shutil.which("g++")
    if gcc is None:
        return "needs g++"
    for library in ("libasan.so", "libubsan.so", "libtsan.so"):
        if not Path(_library(library)).is_absolute():
            return f"needs g++ with {library}"
    for tool in ("cmake", "ninja"):
        if _tool(tool) is None:
            return f"needs {tool}"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "needs pybind11"
    return ""


def build(folder: str, sanitizers: str, *targets: str) -> Path:
    """Builds CMake's targets under sanitizers; where they are."""
    import pybind11

    path = BUILD / folder
    cmake, ninja = str(_tool("cmake")), str(_tool("ninja"))
    options = {
        "CMAKE_BUILD_TYPE": "None",  # the sanitizers' options alone
        "CMAKE_CXX_COMPILER": shutil.which("g++"),
        # Checks by calls, not inline: compiled in less than two thirds of the time
        "CMAKE_CXX_FLAGS": "--param=asan-instrumentation-with-call-threshold=0",
        "CMAKE_MAKE_PROGRAM": ninja,
        "DDPM_FAST_CUDA": "OFF",
        "DDPM_FAST_SANITIZE": sanitizers,
        "PYTHON_EXECUTABLE": sys.executable,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    _run(cmake, "-S", str(ROOT), "-B", str(path), "-G", "Ninja", *definitions)
    _run(cmake, "--build", str(path), "--target", *targets)
    return path


def instruction_sets() -> list[str]:
    """Those of this processor, widest first."""
    from ddpm_fast.backends import native

    return ["portable"] if native is None else list(native.supported_isas())


def call(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a driver; any report of a sanitizer ends it with an error."""
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, env=environment
    )


def python_environment(package: Path) -> dict[str, str]:
    """Of a Python that imports the package there, with the sanitizers' libraries loaded first."""
    libraries = ":".join(_library(name) for name in ("libasan.so", "libubsan.so"))
    return os.environ | {
        "LD_PRELOAD": libraries,
        # Python keeps objects to its end, and torch does; leaks are the drivers' to find
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(package),
        "PYTHONSAFEPATH": "1",  # or else the folder that it is started in comes first
        "OMP_NUM_THREADS": "3",
        "DDPM_FAST_SANITIZED": str(package),
    }


def package(built: Path) -> Path:
    """A folder to import ddpm_fast from: links to its sources beside another native module."""
    folder = BUILD / "package" / "ddpm_fast"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for source in (ROOT / "ddpm_fast").iterdir():
        if not source.name.startswith("_native") and source.name != "__pycache__":
            (folder / source.name).symlink_to(source.resolve())
    for module in built.glob("_native*.so"):
        (folder / module.name).symlink_to(module)
    return folder.parent


def check_memory() -> None:
    sets = instruction_sets()
    built = build("memory", MEMORY, *(f"sanitize_{isa}" for isa in sets))
    for isa in sets:
        check_driver(built / f"sanitize_{isa}", "overflow", "leak", "misaligned")


def check_threads() -> None:
    sets = sorted({instruction_sets()[0], "portable"})
    built = build("threads", THREADS, *(f"sanitize_{isa}" for isa in sets))
    for isa in sets:
        check_driver(built / f"sanitize_{isa}", "race")


def check_driver(program: Path, *planted: str, rounds: int = ROUNDS) -> None:
    """A driver's calls pass, and it reports each planted error."""
    done = call(program, str(rounds))
    print(program.name, done.stdout.replace("\n", "; "), done.stderr, flush=True)
    if done.returncode != 0:
        raise SystemExit(f"{program} {rounds} failed with {done.returncode}")
    for kind in planted:
        if call(program, "--plant", kind).returncode == 0:
            raise SystemExit(f"{program} did not notice a planted error: {kind}")


def check_python() -> None:
    environment = _sanitized_python()
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    # Limits of the address space, which AddressSanitizer fills, and what reads no more of a kernel
    passed_over = "host or no_memory_for or compiles or opcheck or frozen_bits or accuracy"
    _run(sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-k", f"not ({passed_over})", "-m",
         "not slow", "-p", "no:cacheprovider", *tests, env=environment)  # fmt: skip


def check_cuda() -> None:
    environment = _sanitized_python()
    environment["TEST_CXXFLAGS"] = f"-g1 -fsanitize={MEMORY} -fno-sanitize-recover=all"
    tests = [str(path) for path in sorted((ROOT / "tests").glob("test_cuda_*on_host.py"))]
    tests += [str(ROOT / "tests" / name) for name in TESTS]
    _run(sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-k", "host", "-m", "not slow",
         "-p", "no:cacheprovider", *tests, env=environment)  # fmt: skip


def _sanitized_python() -> dict[str, str]:
    environment = python_environment(package(build("memory", MEMORY, "_native")))
    planted = subprocess.run(
        [sys.executable, "-c", _PLANT], env=environment, capture_output=True, text=True
    )
    if "AddressSanitizer" not in planted.stderr:
        raise SystemExit(f"a planted error was not noticed in Python: {planted.stderr}")
    return environment


def _library(name: str) -> str:
    """Its path, or its name alone where g++ has none."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    return found.stdout.strip()


def _tool(name: str) -> str | None:
    """Beside this Python, or on the path."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def _run(*command: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=env, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"failed with {done.returncode}: {' '.join(command[:8])} …")


PARTS: dict[str, Callable[[], None]] = {
    "memory": check_memory,
    "threads": check_threads,
    "python": check_python,
    "cuda": check_cuda,
}
USUAL = ["memory", "threads", "python"]  # cuda: by name


def main() -> None:
    parts = sys.argv[1:] or USUAL
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"no part {unknown.pop()!r}; there is {', '.join(PARTS)}")
    if why := missing():
        raise SystemExit(f"cannot run the sanitizers: {why}")
    for part in parts:
        start = time.perf_counter()
        PARTS[part]()
        print(f"{part}: nothing found, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
