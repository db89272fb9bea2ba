"""Builds for the GPU that is here, tests, watches with compute-sanitizer and measures: `make
gpu-check OUT=folder`. Needs no network and installs nothing: the interpreter that runs it has torch
with CUDA, pytest, pytest-benchmark and pybind11, and nvcc, cmake and ninja are on PATH.

Leaves two files in the folder, named after the GPU: a JSON and a table for people. PART=build,
test, sanitize, bench, sampling, trajectory or sessions runs that part alone. Ends with 1 if any
part failed, with 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from results import file_name, table, write

ROOT = Path(__file__).resolve().parent.parent
# At most; in `sanitize` for each tool.
SECONDS = {"build": 90, "test": 120, "sanitize": 70, "bench": 540, "sampling": 540,
           "trajectory": 540, "sessions": 300}  # fmt: skip

Result = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder for results")
    parser.add_argument("--part", choices=list(PARTS), help="run this part alone")
    arguments = parser.parse_args()
    gpu = find_gpu()
    if gpu is None:
        print("gpu-check: no NVIDIA GPU here (nvidia-smi lists none)", file=sys.stderr)
        return 2
    report: Result = {
        "device": gpu["name"],
        "compute_capability": gpu["compute_cap"],
        "driver": gpu["driver_version"],
        "date": datetime.date.today().isoformat(),
        "python": sys.version.split()[0],
        "parts": {},
    }
    path = arguments.out / f"{file_name(gpu['name'])}.json"
    if arguments.part and path.exists():  # the other parts, of the same GPU and driver
        before = json.loads(path.read_text())
        if before["driver"] == report["driver"] and before["python"] == report["python"]:
            report["parts"] = before["parts"]
    parts = [arguments.part] if arguments.part else list(PARTS)
    for part in parts:
        print(f"gpu-check: {part}", flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            result = PARTS[part](Path(folder), gpu)
        result["seconds"] = round(time.monotonic() - start, 1)
        result["date"] = datetime.date.today().isoformat()
        report["parts"][part] = result
        # After every part: what was found is there even if a later one takes the machine down.
        write(path, report)
        path.with_suffix(".txt").write_text("\n".join(lines_of(report)) + "\n")
        if part == "build" and not result["ok"]:
            break
    print("\n".join(lines_of(report)))
    return 0 if all(report["parts"].get(part, {}).get("ok") for part in parts) else 1


def find_gpu() -> dict[str, str] | None:
    """Name, driver and compute capability of the first GPU."""
    keys = ["name", "driver_version", "compute_cap"]
    if shutil.which("nvidia-smi") is None:
        return None
    run = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"],
        capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode != 0 or not run.stdout.strip():
        return None
    values = [value.strip() for value in run.stdout.splitlines()[0].split(",")]
    return dict(zip(keys, values, strict=True))


def build(folder: Path, gpu: dict[str, str]) -> Result:
    """The native module for this interpreter and this GPU alone, into the source tree."""
    import pybind11

    arch = gpu["compute_cap"].replace(".", "")
    steps = [
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DDDPM_FAST_CUDA=ON",
         f"-DDDPM_FAST_CUDA_ARCHS={arch}", f"-DPYTHON_EXECUTABLE={sys.executable}",
         f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
        ["cmake", "--build", folder],
        ["cmake", "--install", folder, "--prefix", ROOT / "ddpm_fast"],
    ]  # fmt: skip
    steps.append([sys.executable, "-c", "import ddpm_fast; print(ddpm_fast.backends())"])
    deadline = time.monotonic() + SECONDS["build"]
    for step in steps:
        shown = execute(step, max(1.0, deadline - time.monotonic()))
        if not shown["ok"]:
            return shown
    return {"ok": shown["ok"], "backends": shown["output"].splitlines()}


# Each a part of its own
SAMPLING = "benchmarks/bench_sampling.py"
SAMPLE = "benchmarks/bench_sample.py"  # with the part before
TRAJECTORY = "benchmarks/bench_trajectory.py"
SESSIONS = "benchmarks/bench_session.py"
GPU_TESTS = [
    "tests/test_gpu.py",
    "tests/test_gpu_streams.py",
    "tests/test_gpu_objective.py",
    "tests/test_gpu_integrations.py",
    "tests/test_gpu_group_norm_silu.py",
    "tests/test_gpu_engine.py",
    "tests/test_gpu_engine_rows.py",
    "tests/test_gpu_session.py",
    "tests/test_gpu_graph.py",
]
# Triton compiles one kernel after the other, for minutes in all: side by side it is one.
GROUPS = [
    "cuda and group_norm_silu",
    "cuda and gpu_graph",
    "cuda and not (group_norm_silu or gpu_graph)",
    "triton and test_randn",
    "triton and test_add_noise and (float32 or uint8)",
    "triton and test_add_noise and not (float32 or uint8)",
    "triton and test_reverse_step and channels_last",
    "triton and test_reverse_step and not channels_last",
    "triton and objective",
    "triton and group_norm_silu and test_forward",
    "triton and group_norm_silu and test_gradients",
    "triton and group_norm_silu and not (test_forward or test_gradients)",
    "triton and gpu_graph",
    "triton and not (test_randn or test_add_noise or test_reverse_step or objective"
    " or group_norm_silu or gpu_graph)",
]


def test(folder: Path, gpu: dict[str, str]) -> Result:
    """The tests marked gpu, each backend that runs here."""

    def run(group: tuple[int, str]) -> Result:
        place = folder / str(group[0])
        place.mkdir()
        return tests(place, ["-m", "gpu", "-k", group[1]], SECONDS["test"], [])

    with ThreadPoolExecutor(len(GROUPS)) as pool:
        results = list(pool.map(run, enumerate(GROUPS)))
    return merged(results)


def merged(results: list[Result]) -> Result:
    """Of groups of tests: well if none failed and at least one test ran."""
    failed = [result for result in results if not result["ok"]]
    found: Result = {
        "ok": not failed and any(result.get("passed") for result in results),
        "passed": sum(result.get("passed", 0) for result in results),
        "failed": [name for result in results for name in result.get("failed", [])],
        "skipped": sorted({why for result in results for why in result.get("skipped", [])}),
    }
    if not found["ok"]:
        found["output"] = "\n".join(result["output"] for result in failed or results)
    return found


def tests(folder: Path, selection: list[str], seconds: int, under: list[str]) -> Result:
    """Runs pytest over the tests for GPUs and reads its report."""
    log = folder / "junit.xml"
    pytest = [sys.executable, "-m", "pytest", *GPU_TESTS, "-q", "--no-header",
              "-p", "no:cacheprovider", f"--junitxml={log}", *selection]  # fmt: skip
    result = execute([*under, *pytest], seconds)
    if log.exists():
        cases = list(ElementTree.parse(log).getroot().iter("testcase"))
        outcomes = [(case.get("name"), {child.tag: child for child in case}) for case in cases]
        failed = [name for name, found in outcomes if found.keys() & {"failure", "error"}]
        reasons = [found["skipped"].get("message") for _, found in outcomes if "skipped" in found]
        result["passed"] = len(cases) - len(failed) - len(reasons)
        result["failed"] = failed
        result["skipped"] = sorted({str(reason) for reason in reasons})
    return result


# Parts of the mangled names of our kernels alone: CUDA's namespace, Triton's functions. Torch's
# kernels are torch's.
KERNELS = ("9ddpm_fast4cuda", "_tile_kernel")


def sanitize(folder: Path, gpu: dict[str, str]) -> Result:
    """memcheck and racecheck over the tests marked sanitize, each tensor in memory of its own."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return {"ok": True, "not run": "compute-sanitizer is not on PATH"}
    offered = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    result: Result = {"ok": True}
    for tool in ("memcheck", "racecheck"):
        under = [sanitizer, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
        if "--kernel-regex" in offered:
            for part_of_name in KERNELS:  # it watches what any of these filters lets through
                under += ["--kernel-regex", f"kns={part_of_name}"]
        (folder / tool).mkdir()
        found = tests(folder / tool, ["-m", "sanitize"], SECONDS["sanitize"], under)
        result[tool] = merged([found])
        result["ok"] = result["ok"] and result[tool]["ok"]
    del os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"]
    return result


def bench(folder: Path, gpu: dict[str, str]) -> Result:
    """The benchmarks of the kernels, on the GPU."""
    others = [
        word for path in (SAMPLING, SAMPLE, TRAJECTORY, SESSIONS) for word in ("--ignore", path)
    ]
    return measured(folder, ["benchmarks", *others], SECONDS["bench"])


def sampling(folder: Path, gpu: dict[str, str]) -> Result:
    """Whole steps, against what torch.compile makes of the network when it tries everything, and
    whole trajectories of a smaller one."""
    return measured(folder, [SAMPLING, SAMPLE], SECONDS["sampling"])


def trajectory(folder: Path, gpu: dict[str, str]) -> Result:
    """Trajectories that are captured, against loops that are not."""
    return measured(folder, [TRAJECTORY], SECONDS["trajectory"])


def sessions(folder: Path, gpu: dict[str, str]) -> Result:
    """In-flight batching, against a batch at a time."""
    return measured(folder, [SESSIONS], SECONDS["sessions"])


def measured(folder: Path, selection: list[str], seconds: int) -> Result:
    command = [sys.executable, "-m", "pytest", *selection, "--benchmark-only", "-q",
               "--benchmark-disable-gc", "--device", "cuda", "--results", folder,
               "-p", "no:cacheprovider"]  # fmt: skip
    result = execute(command, seconds)
    reports = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    result["ok"] = result["ok"] and bool(reports)
    for found in reports:
        result.update(found)
    if result["ok"]:
        del result["output"]
    return result


PARTS: dict[str, Callable[[Path, dict[str, str]], Result]] = {
    "build": build,
    "test": test,
    "sanitize": sanitize,
    "bench": bench,
    "sampling": sampling,
    "trajectory": trajectory,
    "sessions": sessions,
}


def execute(command: list[Any], seconds: float) -> Result:
    """Runs a command in the root, the package importable; whether it went well, and its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    try:
        process = subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
    except FileNotFoundError as missing:
        return {"ok": False, "output": f"{missing.filename} is not on PATH"}
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
        output, _ = process.communicate()
        return {"ok": False, "output": f"{output[-4000:]}\nstopped after {seconds:.0f} s"}
    return {"ok": process.returncode == 0, "output": output[-4000:]}


def lines_of(report: Result) -> list[str]:
    """The report as people read it."""
    lines = [
        f"{report['device']} (compute capability {report['compute_capability']}), "
        f"driver {report['driver']}, {report['date']}, Python {report['python']}",
        "",
    ]
    for part, result in report["parts"].items():
        verdict = result.get("not run") and f"not run: {result['not run']}"
        verdict = verdict or ("ok" if result["ok"] else "FAILED")
        lines.append(f"{part:<10}{verdict:<8}{result['seconds']:>8.1f} s")
        for name, found in [(part, result), *((n, r) for n, r in result.items() if n in TOOLS)]:
            if "passed" in found:
                failed = ", ".join(found["failed"]) or "none"
                lines.append(f"  {name}: {found['passed']} passed, failed: {failed}")
                lines += [f"  skipped: {reason}" for reason in found["skipped"]]
            if not found["ok"] and "output" in found:
                lines += [f"  | {line}" for line in found["output"].splitlines()[-25:]]
        lines += [f"  {line}" for line in result.get("backends", [])]
        if "rows" in result:
            lines += ["", *table(result)]
    return lines


TOOLS = ("memcheck", "racecheck")


if __name__ == "__main__":
    sys.exit(main())
