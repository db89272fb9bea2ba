"""Distributions: what is in them, and that a wheel runs with nothing but torch and numpy.

The wheel here holds the module that the tests run with: packing is tried, not compiling.
`test_build.py` has that.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packages import (
    ROOT,
    build,
    compiled_already,
    copy_of_sources,
    empty_environment,
    install,
    tracked_files,
)
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

import ddpm_fast
from ddpm_fast.backends import native

VERSION = ddpm_fast.__version__
LOADERS = ("ld-linux-x86-64", "ld-linux-aarch64")
GENERATED = {"PKG-INFO", "setup.cfg"}  # and *.egg-info, by setuptools


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The tracked tree, with what lies about in a tree that is worked in."""
    tree = copy_of_sources(tmp_path_factory.mktemp("sources"))
    for litter in (
        "ddpm_fast/_native.cpython-399-x86_64-linux-gnu.so",
        "ddpm_fast/__pycache__/cli.cpython-311.pyc",
        "tests/__pycache__/helpers.cpython-311.pyc",
        "build/cmake-cpython-311/CMakeCache.txt",
        "build/lib/ddpm_fast/removed.py",
        "demo-out/samples.png",
    ):
        (tree / litter).parent.mkdir(parents=True, exist_ok=True)
        (tree / litter).write_text("litter")
    return tree


@pytest.fixture(scope="module")
def distributions(sources, tmp_path_factory) -> dict[str, Path]:
    """A source distribution, and the wheel that was made of it, by their suffixes."""
    if native is None:
        pytest.skip("installed without compiled kernels")
    folder = tmp_path_factory.mktemp("distributions")
    path = compiled_already(folder / "bin", Path(native.__file__))
    built = build(sources, folder / "dist", PATH=path)
    return {file.suffix: file for file in built}


def files_of_the_package() -> set[str]:
    """Tracked ones as they are installed: kernels/ is ddpm_fast/kernels."""
    tracked = tracked_files()
    own = {name for name in tracked if name.startswith("ddpm_fast/")} - {"ddpm_fast/kernels"}
    return own | {f"ddpm_fast/{name}" for name in tracked if name.startswith("kernels/")}


def test_source_distribution_is_what_git_tracks(distributions):
    with tarfile.open(distributions[".gz"]) as archive:
        members = archive.getmembers()
    assert {member.name.split("/")[0] for member in members} == {f"ddpm_fast-{VERSION}"}
    assert all(member.isfile() or member.isdir() for member in members), "links"
    files = {m.name.partition("/")[2] for m in members if m.isfile()}
    packed = {f for f in files if f not in GENERATED and not f.startswith("ddpm_fast.egg-info/")}
    assert packed == (set(tracked_files()) - {"ddpm_fast/kernels"}) | files_of_the_package()


def test_wheel_is_the_package_and_the_module(distributions):
    with zipfile.ZipFile(distributions[".whl"]) as archive:
        files = set(archive.namelist())
    info = f"ddpm_fast-{VERSION}.dist-info/"
    described = {f.removeprefix(info) for f in files if f.startswith(info)}
    assert described == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"
    }  # fmt: skip
    module = f"ddpm_fast/{Path(native.__file__).name}"
    assert {f for f in files if not f.startswith(info)} == files_of_the_package() | {module}


def test_wheel_is_for_this_python_and_machine(distributions):
    *_, tags = parse_wheel_filename(distributions[".whl"].name)
    assert tags <= set(sys_tags())
    assert all(tag.abi != "none" and tag.platform != "any" for tag in tags)


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f"ddpm_fast-{VERSION}.dist-info/METADATA"))


def test_metadata(distributions):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = metadata_of(distributions[".whl"])
    assert found["Version"] == VERSION
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == project["requires-python"]
    assert set(found.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    needed = found.get_all("Requires-Dist")
    assert sorted(r for r in needed if "extra ==" not in r) == sorted(project["dependencies"])
    assert "# ddpm_fast" in found.get_payload()


def test_wheel_runs_in_an_empty_environment(distributions, tmp_path):
    """No compiler, no CMake and none of the optional packages are to be found."""
    python = empty_environment(tmp_path / "env")
    install(distributions[".whl"], python)
    environment = {"PATH": str(python.parent), "OMP_NUM_THREADS": "2", "HOME": str(tmp_path)}
    run = subprocess.run(
        [python, ROOT / "tests" / "smoke_wheel.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith(f"ok {VERSION}, ")

    for name in ("PIL", "pytest", "pip", "safetensors"):
        present = subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode
        assert present != 0, f"the environment is not empty: it has {name}"


def test_wheel_without_the_compiled_part(sources, tmp_path):
    """DDPM_FAST_NATIVE=0: for any Python and machine, and no module of an earlier build in it."""
    (wheel,) = build(sources, tmp_path / "dist", "--wheel", DDPM_FAST_NATIVE="0")
    assert wheel.name == f"ddpm_fast-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    package = {f for f in files if not f.startswith(f"ddpm_fast-{VERSION}.dist-info/")}
    assert package == files_of_the_package()


def test_no_library_is_named_that_a_machine_without_a_compiler_lacks(distributions, tmp_path):
    """Those that manylinux lets a wheel rely on: an OpenMP runtime is not among them."""
    if sys.platform != "linux" or shutil.which("readelf") is None or not native.openmp:
        pytest.skip("needs Linux, readelf and a module with OpenMP")
    with zipfile.ZipFile(distributions[".whl"]) as archive:
        module = archive.extract(f"ddpm_fast/{Path(native.__file__).name}", tmp_path)
    shown = subprocess.run(["readelf", "-d", module], capture_output=True, text=True).stdout
    needed = {name.split(".so")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", shown)}
    assert needed <= {
        "libstdc++", "libm", "libgcc_s", "libc", "libdl", "libpthread", "librt", *LOADERS
    }  # fmt: skip


def test_version_stands_in_one_place():
    assert re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}((a|b|rc|\.dev)\d+)?", VERSION)
    literal = f'"{VERSION}"'
    holders = [
        name
        for name in tracked_files()
        if name.endswith((".py", ".toml", ".txt", ".cfg"))
        and re.search(rf"version\w*\s*=\s*{re.escape(literal)}", (ROOT / name).read_text())
    ]
    assert holders == ["ddpm_fast/__init__.py"]


def test_package_is_written_for_the_oldest_python():
    """By ruff's parser: syntax of a later version is an error (E999, target-version)."""
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = settings["project"]["requires-python"].removeprefix(">=")
    target = "py" + oldest.replace(".", "")
    assert settings["tool"]["ruff"]["target-version"] == target
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--quiet", "--isolated", "--select", "F821",
         "--target-version", target, "ddpm_fast", "kernels"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    if "No module named ruff" in run.stderr:
        pytest.skip("needs ruff")
    assert "SyntaxError" not in run.stdout + run.stderr, run.stdout
    assert "invalid-syntax" not in run.stdout + run.stderr, run.stdout
