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


def sections() -> list[tuple[str, list[str]]]:
    """The blocks of Python under each second-level heading: they are read one after the other."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for section in re.split(r"^## ", path.read_text(), flags=re.M):
            blocks = re.findall(r"```python\n(.*?)```", section, re.S)
            if blocks:
                found.append((f"{path.name}-{section.splitlines()[0]}", blocks))
    return found


@pytest.mark.parametrize("blocks", [b for _, b in sections()], ids=[n for n, _ in sections()])
def test_blocks_run(blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in blocks:
        if "denoising_diffusion_pytorch" in code:
            lucidrains_package.package_or_skip()
        if "guided_diffusion" in code:
            for name, module in openai_diffusion.as_package().items():
                monkeypatch.setitem(sys.modules, name, module)
        exec(compile(code, "README", "exec"), names)


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
