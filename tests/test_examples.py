"""Each example runs as a person runs it: a process of its own, in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lucidrains_package
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RUN = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
# Beside a build of torch that torchvision does not fit, the package of lucidrains needs a stand-in.
WITH_PACKAGE = f"import runpy, sys, lucidrains_package; lucidrains_package.import_package(); {RUN}"
# No package index has guided_diffusion.
WITH_OPENAI = f"import runpy, sys, openai_diffusion as o; sys.modules.update(o.as_package()); {RUN}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    arguments = [path]
    if path.stem.startswith("lucidrains"):
        lucidrains_package.package_or_skip()
        arguments = ["-c", WITH_PACKAGE, path]
    if path.stem.startswith("openai"):
        arguments = ["-c", WITH_OPENAI, path]
    if path.stem.startswith("diffusers"):
        pytest.importorskip("diffusers")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT / "tests"),
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


WITHOUT = {"lucidrains": "denoising_diffusion_pytorch", "openai": "guided_diffusion"}


@pytest.mark.parametrize("library", WITHOUT)
def test_what_is_missing_is_said(library, tmp_path):
    """In a line, with what to install: no traceback."""
    (path,) = (path for path in EXAMPLES if path.stem.startswith(library))
    missing = f"import runpy, sys; sys.modules[{WITHOUT[library]!r}] = None; {RUN}"
    done = subprocess.run(
        [sys.executable, "-c", missing, path], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"{WITHOUT[library]} cannot be imported")
    assert "pip install" in done.stderr
    assert len(done.stderr.splitlines()) == 1
