"""What the compiler made of the CUDA kernels, for every architecture, read without a GPU.

python tests/machine_code.py        prints instructions an element and registers of each kernel
python tests/machine_code.py --write    and makes them the budgets that the tests hold
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUDGETS = ROOT / "tests" / "data" / "cuda_instructions.json"
ARCHS = ["80", "86", "89", "90", "100", "120"]
OPS = [
    "randn", "add_noise", "reverse_step", "denoising_loss", "vlb_terms", "group_norm_silu",
    "group_norm_silu_bwd",
]  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """One kernel on one architecture."""

    op: str
    body: str  # RandnTile<Float32, Contiguous<4>>
    arch: str
    registers: int
    stack: int  # bytes, spills included
    instructions: tuple[str, ...]

    @property
    def elements(self) -> int:
        """Of one lane: what its instructions are shared among."""
        vectors = re.search(r"WholeVectors<(\w+), ", self.body)
        if vectors is not None:
            held = 8 if self.body.startswith("GroupNormSiluWhole") else 4
            return held * (4 if vectors[1] == "Float32" else 8)
        layout = re.search(r"(Contiguous|ChannelsLast)<([\d, ]+)>", self.body)
        if layout is None:
            return 4
        numbers = [int(number) for number in layout[2].split(",")]
        return 16 if layout[1] == "Contiguous" else numbers[0] * numbers[1]

    @property
    def per_element(self) -> float:
        """Instructions from the first to the last, whether or not a branch skips them."""
        return len(self.instructions) / self.elements

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.instructions)


def find_tool(name: str) -> str | None:
    """On PATH, beside nvcc, or in Triton's wheel."""
    found = shutil.which(name)
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if found is None and nvcc is not None:
        beside = Path(nvcc).resolve().parent / name
        found = str(beside) if beside.exists() else None
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        inside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(inside) if inside.exists() else None
    return found


def find_nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def missing_tool() -> str:
    """The name of the first tool that is not here, or ""."""
    if find_nvcc() is None:
        return "nvcc"
    if find_tool("cuobjdump") is None:
        return "cuobjdump"
    return "" if shutil.which("c++filt") else "c++filt"


def compile_cubin(source: Path, arch: str, target: Path) -> str:
    """Compiles to machine code, any warning an error; returns the assembler's report."""
    run = subprocess.run(
        [find_nvcc(), "-std=c++17", f"-arch=sm_{arch}", "--fmad=false", "-Werror", "all-warnings",
         "-Xptxas", "-v", "-cubin", str(source), "-o", str(target)],
        capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode != 0:
        raise RuntimeError(f"{source.name} for sm_{arch}:\n{run.stderr}")
    return run.stderr


def functions_of(cubin: Path) -> dict[str, tuple[str, ...]]:
    """The instructions of each function, without the padding at its end."""
    run = subprocess.run(
        [find_tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True
    )
    functions = {}
    for part in run.stdout.split("Function : ")[1:]:
        lines = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*(?:[&?].*)?;", part, re.M)
        functions[part.split()[0]] = tuple(line for line in lines if not line.startswith("NOP"))
    return functions


def kernels_of(op: str, arch: str) -> list[Machine]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        report = compile_cubin(ROOT / "csrc" / "cuda" / f"{op}.cu", arch, cubin)
        functions = functions_of(cubin)
    resources = {
        name: (int(registers), int(stack) + int(stores) + int(loads))
        for name, stack, stores, loads, registers in re.findall(
            r"entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers",
            report,
            re.S,
        )
    }
    kernels = []
    for name, instructions in functions.items():
        body = _demangled(name)
        registers, stack = resources[name]
        kernels.append(Machine(op, body, arch, registers, stack, instructions))
    return kernels


def _demangled(name: str) -> str:
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    body = re.search(r"\w+_kernel<(.*), [\w:]+Params>", plain)
    assert body is not None, plain
    short = body[1].replace("ddpm_fast::", "").replace("cuda::", "").replace("> >", ">>")
    return re.sub(r"(\d)u>", r"\1>", short)


def known_archs() -> list[str]:
    """Those of ARCHS that this nvcc compiles for."""
    listed = subprocess.run(
        [find_nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True
    )
    return [arch for arch in ARCHS if f"sm_{arch}" in listed.stdout.split()]


@functools.cache
def all_kernels(archs: tuple[str, ...] = tuple(ARCHS)) -> list[Machine]:
    """Every kernel for those of the architectures that this nvcc knows."""
    jobs = [(op, arch) for op in OPS for arch in known_archs() if arch in archs]
    run: Callable[[tuple[str, str]], list[Machine]] = lambda job: kernels_of(*job)  # noqa: E731
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [kernel for found in pool.map(run, jobs) for kernel in found]


def budgets_of(kernels: list[Machine]) -> dict[str, int]:
    """Instructions an element by body, of the architecture that takes most, rounded up."""
    budgets: dict[str, int] = {}
    for kernel in kernels:
        budgets[kernel.body] = max(budgets.get(kernel.body, 0), math.ceil(kernel.per_element))
    return dict(sorted(budgets.items()))


if __name__ == "__main__":
    if missing_tool():
        sys.exit(f"needs {missing_tool()}")
    found = all_kernels()
    for kernel in sorted(found, key=lambda k: (k.body, ARCHS.index(k.arch))):
        print(
            f"{kernel.body:<64} sm_{kernel.arch:<4}{kernel.per_element:7.1f} an element"
            f"{kernel.registers:5} registers{kernel.stack:5} bytes of stack"
        )
    if "--write" in sys.argv:
        BUDGETS.write_text(json.dumps(budgets_of(found), indent=1) + "\n")
