"""What the documents show runs: every block of code, by its language, and docstrings' examples."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import warnings
from itertools import groupby
from pathlib import Path

import lucidrains_package
import openai_diffusion
import pytest
import torch
from command_line_page import PAGE, page
from documented_commands import check
from documented_files import prepare_files
from documents import DOCS, ROOT, Block, all_blocks, commands, documents
from test_quick_start import QUICK_START

import ddpm_fast
from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig
from ddpm_fast.kernels import support

MODULES = [
    info.name
    for info in pkgutil.walk_packages(ddpm_fast.__path__, "ddpm_fast.")
    if not info.name.endswith("_native")
]
# What is done with a block of each language; one without a rule here is an error.
RUN, PARSED, EXCERPT = ["python"], ["json", "nginx"], ["py", "cpp"]
SHELL, TEXT = ["sh", "console"], ["text"]


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


def functions() -> list[tuple[str, object]]:
    """Public functions, classes (their constructors) and public methods of classes, by name."""
    found: list[tuple[str, object]] = []
    for name in ddpm_fast.__all__:
        value = getattr(ddpm_fast, name)
        if inspect.isclass(value):
            members = vars(value).items()
            found += [(f"{name}.{k}", v) for k, v in members if not k.startswith("_")]
        found.append((name, value))
    found = [(name, getattr(value, "__func__", value)) for name, value in found]
    return [(name, value) for name, value in found if callable(value)]


@pytest.mark.parametrize(("name", "value"), functions(), ids=[name for name, _ in functions()])
def test_documented_arguments_are_those_of_the_signature(name, value):
    text = inspect.cleandoc(value.__doc__ or "")
    section = re.search(r"^Args:\n((?: .*\n|\n)*)", text + "\n", re.M)
    if not section:
        return
    lines = re.findall(r"^    (\S[^:]*): ", section[1], re.M)
    documented = [argument.strip("* ") for line in lines for argument in line.split(",")]
    assert documented
    unknown = set(documented) - set(inspect.signature(value).parameters)
    assert not unknown


def test_blocks_are_of_a_known_language():
    known = {*RUN, *PARSED, *EXCERPT, *SHELL, *TEXT}
    for block in all_blocks():
        in_root = block.path.parent == ROOT  # there, commands may be set in without a fence
        assert block.language in known or (block.language == "indented" and in_root), (
            f"{block} is {block.language or 'of no language'}: tests/test_docs.py has rules for "
            f"{', '.join(sorted(known))}"
        )


def sections() -> list[list[Block]]:
    """The blocks of Python below a heading of the second level: they are read one after the
    other. (The quick start is read as a whole, in tests/test_quick_start.py.)"""
    found = [block for block in all_blocks(*RUN) if block.path != QUICK_START]
    return [list(blocks) for _, blocks in groupby(found, lambda b: (b.path, b.section))]


@pytest.mark.parametrize(
    "blocks", sections(), ids=lambda blocks: f"{blocks[0].path.relative_to(ROOT)}-{blocks[0].line}"
)
def test_blocks_run(blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "document"}
    for block in blocks:
        prepare_files(block.code, tmp_path)
        if "denoising_diffusion_pytorch" in block.code:
            lucidrains_package.package_or_skip()
        if "guided_diffusion" in block.code:
            for name, module in openai_diffusion.as_package().items():
                monkeypatch.setitem(sys.modules, name, module)
        exec(compile("\n" * block.line + block.code, str(block.path), "exec"), names)


@pytest.mark.parametrize("block", all_blocks(*SHELL, "indented"), ids=str)
def test_commands_could_be_given(block):
    found = commands(block)
    assert found, "no command in it"
    for words in found:
        check(words)


@pytest.mark.parametrize(
    "line",
    [
        "ddpm-fast train --data digits --out run --stpes 3",
        "ddpm-fast smaple run --num 1 --out images",
        "pip install -e '.[trian]'",
        "pip install 'ddpm_fast[nothing]'",
        "pip instal torch",
        "make tset",
        "make demo ON=x",
        "python examples/nothing.py",
        "python examples/openai_sampling.py --stps 3",
        "torchrun --nproc-per-node 2 -m ddpm_fast.cli -- sample run --nmu 3 --out images",
        "python -m pytest benchmarks --benchmrak-only",
        "pyhton -m pytest",
    ],
)
def test_wrong_commands_are_found(line):
    block = Block(ROOT / "README.md", 1, "sh", "", "", line + "\n")
    (words,) = commands(block)
    with pytest.raises((AssertionError, KeyError, SystemExit)):
        check(words)


def test_commands_are_read_as_a_shell_reads_them():
    text = "A=1 B=$C \\\n  ddpm-fast info  # says what\n\nmake a && make b\n# nothing\n"
    block = Block(ROOT / "README.md", 1, "sh", "", "", text)
    assert commands(block) == [["A=1", "B=$C", "ddpm-fast", "info"], ["make", "a"], ["make", "b"]]
    block = Block(ROOT / "README.md", 1, "console", "", "", "$ ddpm-fast info\ncpu  yes\n")
    assert commands(block) == [["ddpm-fast", "info"]]


@pytest.mark.parametrize("block", all_blocks(*PARSED), ids=str)
def test_configurations_are_well_formed(block):
    if block.language == "json":
        json.loads(block.code)
        return
    code = re.sub(r"\s*#.*", "", block.code)
    directive, opened, closed = r"[a-z_]+( [^{};]+)?;", r"[a-z_]+( [^{};]+)? \{", r"\}"
    lines = [line.strip() for line in code.splitlines() if line.strip()]
    assert all(re.fullmatch(f"{directive}|{opened}|{closed}", line) for line in lines)
    assert code.count("{") == code.count("}")


CURLS = [words for block in all_blocks(*SHELL) for words in commands(block) if words[0] == "curl"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl is installed")
@pytest.mark.usefixtures("one_thread")
def test_curl_gets_what_the_page_says(tmp_path):
    """From a server with classes and guidance, at its own address."""
    serving = pytest.importorskip("ddpm_fast.serving")
    config = UNetConfig(
        8, 1, channels=(8,), attention_resolutions=(), norm_groups=4, num_classes=10
    )
    sampler = Sampler(UNet(config).eval(), NoiseSchedule.linear(), method="ddim", num_steps=50)
    app = serving.create_app(sampler, [1, 8, 8], classes=10, guidance=True)
    assert CURLS
    with serving.serving(app) as url:
        for words in CURLS:
            here = [word.replace("http://127.0.0.1:8000", url) for word in words]
            subprocess.run([*here, "--fail", "--silent"], cwd=tmp_path, check=True, timeout=60)
            if "-o" in words:
                file = tmp_path / words[words.index("-o") + 1]
                assert file.read_bytes().startswith(b"\x89PNG")


def test_excerpts_stand_in_their_files():
    excerpts = all_blocks(*EXCERPT)
    named = [block for block in excerpts if re.fullmatch(r"`[^`\s]+`", block.lead)]
    assert excerpts == named, "an excerpt says its file in the line before"
    assert len(excerpts) >= 8
    for block in excerpts:
        path = block.lead.strip("`")
        assert block.code in (ROOT / path).read_text(), f"{block} is not in {path}"


@pytest.mark.parametrize("block", all_blocks(*TEXT), ids=str)
def test_text_is_no_code(block):
    """Diagrams, formulas, and what programs answer: no command and no Python escapes as such."""
    for line in block.code.splitlines():
        word = line.split(" ")[0]
        assert word not in ("ddpm-fast", "pip", "make", "torchrun", "curl", "import", "from"), line
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(block.code, str(block), "exec")
        except SyntaxError:
            return
    raise AssertionError(f"{block} is Python: say so, and it is run")


def test_marked_lines_are_those_that_are_new():
    """The smallest change to the stock code: each of its lines has a name of the package."""
    marked = [block for block in all_blocks() if block.marked]
    assert len(marked) >= 6
    for block in marked:
        lines = block.code.splitlines()
        for number in block.marked:
            line = lines[number - 1]
            assert re.search("accelerate|ddpm_fast|step_table|reverse_step|loss_of|Loss", line), (
                f"{block}: {line}"
            )


def test_the_command_lines_page_is_the_parsers():
    assert PAGE.read_text() == page(), "python tests/command_line_page.py --write"


def slugs(path: Path) -> set[str]:
    """The anchors of a document's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!http)([^)\s]+)", path.read_text()):
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), f"there is no {target}"
        if anchor and found.suffix == ".md" and found.parts[-2] != "api":
            assert anchor in slugs(found), f"{file or path.name} has no heading {anchor}"


def test_documents_that_the_code_names_are_there():
    folders = ("ddpm_fast", "kernels", "csrc", "benchmarks", "examples", "tests")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.*")):
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
            for name in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text(encoding="utf-8")):
                assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"


def test_the_reference_has_every_public_name():
    text = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^::: (\S+)$", text, re.M)
    assert len(documented) == len(set(documented))
    missing = {f"ddpm_fast.{name}" for name in ddpm_fast.__all__} - set(documented)
    assert not missing
    for name in documented:
        module, _, member = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ImportError:
            assert hasattr(importlib.import_module(module), member), name
