"""Sources as git would clone them, environments to install into, and what is built of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def tracked_files() -> list[str]:
    """What git tracks, symbolic links among it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if os.path.lexists(ROOT / name)]


def copy_of_sources(tmp_path: Path) -> Path:
    """The tree as git would clone it, in another folder."""
    target = tmp_path / "ddpm_fast"
    for name in tracked_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def fresh_environment(tmp_path: Path) -> Path:
    """The Python of a virtual environment that sees this one's packages, so that torch is not
    installed again."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    here = [p for p in sys.path if p.endswith("site-packages")]
    (site_packages(tmp_path / "env") / "outer.pth").write_text("\n".join(here) + "\n")
    return tmp_path / "env" / "bin" / "python"


def empty_environment(folder: Path) -> Path:
    """The Python of a virtual environment with torch, numpy and what these need, and no pip."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = site_packages(folder)
    for name in closure(["torch", "numpy"]):
        distribution = metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or [] if path.parts[0] != ".."}:
            source, target = Path(str(distribution.locate_file(top))), site / top
            if source.exists() and not target.exists() and top != "__pycache__":
                target.symlink_to(source)
    return folder / "bin" / "python"


def site_packages(environment: Path) -> Path:
    return next((environment / "lib").glob("python*/site-packages"))


def closure(names: list[str]) -> set[str]:
    """Installed distributions that these need, they included."""
    found: set[str] = set()
    while names:
        name = names.pop()
        if name in found:
            continue
        found.add(name)
        needed = [Requirement(line) for line in metadata.requires(name) or []]
        names += [
            requirement.name
            for requirement in needed
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ]
    return found


def build(source: Path, out: Path, *kinds: str, **environment: str) -> list[Path]:
    """`python -m build`, which makes the wheel of what it packed into the source distribution."""
    pytest.importorskip("build")
    run = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *kinds,
         str(source)],
        env={**os.environ, **environment}, capture_output=True, text=True, cwd=out.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return sorted(out.iterdir())


def compiled_already(folder: Path, module: Path) -> str:
    """A PATH on which `cmake` installs a module that was compiled before."""
    folder.mkdir()
    stand_in = folder / "cmake"
    stand_in.write_text(
        f'#!/bin/sh\nif [ "$1" = --install ]; then mkdir -p "$4" && cp "{module}" "$4"; fi\n'
    )  # as setup.py calls it: --install BUILD --prefix TARGET
    stand_in.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def install(wheel: Path, python: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps",
         "--no-index", str(wheel)],
        env=environment, check=True,
    )  # fmt: skip
