"""What the documents show runs: README's Python, and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import lucidrains_package
import openai_diffusion
import pytest
import torch

import ddpm_fast
from ddpm_fast.kernels import support

ROOT = Path(__file__).parent.parent
MODULES = [
    info.name
    for info in pkgutil.walk_packages(ddpm_fast.__path__, "ddpm_fast.")
    if not info.name.endswith("_native")
]


@pytest.mark.parametrize("name", ["ddpm_fast", *MODULES])
def test_docstring_examples(name):
    if name.startswith("ddpm_fast.kernels.") and support.triton_problem():
        pytest.skip(support.triton_problem())
    module = importlib.import_module(name)
    names = {k: getattr(ddpm_fast, k) for k in ddpm_fast.__all__}
    result = doctest.testmod(module, extraglobs={"torch": torch, **names})
    assert result.failed == 0


@pytest.mark.parametrize("name", ddpm_fast.__all__)
def test_public_names_are_documented(name):
    documented = getattr(ddpm_fast, name)
    assert (documented.__doc__ or "").strip()


def python_blocks() -> list[tuple[str, str]]:
    blocks = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for i, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S)):
            blocks.append((f"{path.name}-{i}", code))
    return blocks


@pytest.mark.parametrize(
    "code", [c for _, c in python_blocks()], ids=[n for n, _ in python_blocks()]
)
def test_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "denoising_diffusion_pytorch" in code:
        lucidrains_package.package_or_skip()
    if "guided_diffusion" in code:
        for name, module in openai_diffusion.as_package().items():
            monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code, "README", "exec"), {})


def test_excerpts_stand_in_their_files():
    document = (ROOT / "docs" / "adding-an-op.md").read_text()
    excerpts = re.findall(r"^`(\S+)`\n```(?:py|cpp)\n(.*?)```", document, re.M | re.S)
    assert len(excerpts) == document.count("```") / 2 == 8
    for path, code in excerpts:
        assert code in (ROOT / path).read_text(), path


def test_links_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
