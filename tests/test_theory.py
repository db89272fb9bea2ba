"""docs/theory.md and its Russian translation: every place that a formula is said to be computed at
exists and cites the same equation, every formula is one that browsers can be given, and both pages
have the same formulas, code and order. That the code is right, tests/test_docs.py runs."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

import ddpm_fast

ROOT = Path(__file__).parent.parent
PAGES = {"en": ROOT / "docs" / "theory.md", "ru": ROOT / "docs" / "ru" / "theory.md"}
TEXT = {language: path.read_text() for language, path in PAGES.items()}

BLOCK = re.compile(r"^\$\$\n(.*?)\n\$\$$", re.M | re.S)
INLINE = re.compile(r"\$([^$]+)\$")
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
HEADING = re.compile(r"^(#+) (.+)$", re.M)
# How the pages, the docstrings and the headers of the kernels name a paper.
PAPERS = {
    "Ho": r"\bHo\b(?! & Salimans)",
    "ND": r"\bND\b|Nichol & Dhariwal",
    "Song": r"\bSong\b",
    "SH": r"\bSH\b|Salimans & Ho",
    "CFG": r"Ho & Salimans 2022",
    "Kingma": r"\bKingma\b(?! & )",
}


class Note(NamedTuple):
    """What is said to compute a formula, and the equations that it cites."""

    spans: list[str]  # what stands in backticks
    citations: list[tuple[str, str]]  # paper, number of the equation or ""


def without_code(text: str) -> str:
    return CODE.sub("", text)


def sections(text: str) -> list[str]:
    return re.split(r"^#+ .*$", without_code(text), flags=re.M)[1:]


def notes(text: str) -> list[Note]:
    """One for each citation, of what stands before it, and for what follows the last."""
    found = []
    for quote in re.findall(r"(?:^> .*\n)+", without_code(text), re.M):
        words = re.sub(r"\n> ", " ", quote.removeprefix("> ")).replace("\u00a0", " ")
        assert words.startswith(("**Computed by**", "**Вычисля")), words
        parts = re.split(r"\[([^]]+)\]", words)
        for said, bracket in zip(parts[::2], [*parts[1::2], ""], strict=True):
            spans = re.findall(r"`([^`]+)`", said)
            citations = [c.partition(", ")[::2] for c in bracket.split("; ") if c]
            if spans:
                found.append(Note(spans, [(p, n.split(" ")[-1]) for p, n in citations]))
    return found


NOTES = notes(TEXT["en"])


def documented(name: str) -> str:
    """The docstring of what has this dotted name, imported."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            thing = getattr(thing, part)
        return thing.__doc__ or ""
    raise AssertionError(name)


def comments(source: str) -> str:
    return " ".join(re.findall(r"// ?(.*)", source))


def cites(text: str, paper: str, number: str) -> bool:
    """Whether a comment or docstring names this equation of this paper: numbers belong to the paper
    that was named last before them."""
    text = re.sub(r"\s*\n\s*", " ", text)
    of_paper = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in PAPERS.items()))
    mentions = list(of_paper.finditer(text))
    for i, mention in enumerate(mentions):
        if mention.lastgroup != paper:
            continue
        end = mentions[i + 1].start() if i + 1 < len(mentions) else len(text)
        numbers = re.findall(
            r"(?:eqs?\.|appendix) ((?:[A-Z]\b|\d+)(?:(?:,| and) \d+)*)", text[mention.end() : end]
        )
        if not number or number in re.findall(r"\w+", " ".join(numbers)):
            return True
    return False


@pytest.mark.parametrize("note", NOTES, ids=lambda note: note.spans[0])
def test_what_computes_a_formula_exists_and_cites_it(note):
    citing: dict[str, str] = {}  # place: what its docstring or its file's comments say
    path, source = "", ""
    for span in note.spans:
        if span.startswith("ddpm_fast."):
            docstring, path = documented(span), ""
            if span.startswith(("ddpm_fast.reference.", "ddpm_fast.NoiseSchedule")):
                citing[span] = docstring
        elif "/" in span:
            path, source = span, (ROOT / span).read_text()
            says = (
                ast.get_docstring(ast.parse(source)) if path.endswith(".py") else comments(source)
            )
            citing[path] = says or ""
        elif path:
            place = rf"(?:struct|class) {span}\b|^DDPM_FAST_HD .*\b{span}\(|^def {span}\("
            assert re.search(place, source, re.M), f"{path} has no {span}"
            if path.endswith(".py"):
                tree = ast.parse(source).body
                function = next(
                    n for n in tree if isinstance(n, ast.FunctionDef) and n.name == span
                )
                citing[path] += f"; {ast.get_docstring(function)}"
    assert citing
    for paper, number in note.citations:
        without = [name for name, text in citing.items() if not cites(text, paper, number)]
        assert not without, f"{without} do not cite {paper}, {number}"


def test_every_public_op_of_the_method_is_named():
    named = {span for note in NOTES for span in note.spans}
    ops = {
        "add_noise",
        "reverse_step",
        "denoising_loss",
        "vlb_terms",
        "bits_per_dim",
        "DenoisingLoss",
    }
    assert ops <= set(ddpm_fast.__all__)
    assert {f"ddpm_fast.{op}" for op in ops} <= named


@pytest.mark.parametrize("language", PAGES)
def test_formulas_are_mathml(language):
    """No macro that the converter does not know, nothing that GitHub's Markdown would take away."""
    converter = pytest.importorskip("latex2mathml.converter")
    text = without_code(TEXT[language])
    blocks = BLOCK.findall(text)
    rest = BLOCK.sub("", text)
    assert rest.count("$") % 2 == 0
    assert "$$" not in rest
    for display, formulas in (("block", blocks), ("inline", INLINE.findall(rest))):
        for formula in formulas:
            drawn = converter.convert(formula, display=display)
            assert not re.search(r"\\[A-Za-z]", drawn), formula
            ElementTree.fromstring(drawn)
            assert not re.search(r"\\[,;:!{}|]|\\tag|\\operatorname", formula), formula
            assert display == "block" or "\n" not in formula, formula
            assert formula == formula.strip(), formula
    assert len(blocks) >= 40


def test_tables_have_no_formula_with_a_bar():
    for text in TEXT.values():
        for line in text.splitlines():
            if line.startswith("|"):
                assert all("|" not in formula for formula in INLINE.findall(line)), line


def test_the_translation_has_the_same_formulas_code_and_order():
    english, russian = TEXT["en"], TEXT["ru"]
    assert CODE.findall(english) == CODE.findall(russian)
    assert BLOCK.findall(without_code(english)) == BLOCK.findall(without_code(russian))
    levels = [
        [len(marks) for marks, _ in HEADING.findall(without_code(t))] for t in (english, russian)
    ]
    assert levels[0] == levels[1]
    for ours, theirs in zip(sections(english), sections(russian), strict=True):
        # The order of words differs; what they say of each section does not.
        assert Counter(INLINE.findall(BLOCK.sub("", ours))) == Counter(
            INLINE.findall(BLOCK.sub("", theirs))
        ), ours
        spans = [Counter(re.findall(r"`([^`\n]+)`", t)) for t in (ours, theirs)]
        assert spans[0] == spans[1], ours
        assert ours.count("\n|") == theirs.count("\n|"), ours
    assert notes(russian) == NOTES


def test_the_translation_is_russian():
    for title in (title for _, title in HEADING.findall(without_code(TEXT["ru"]))):
        assert re.search("[а-я]", title) or title in ("DDPM", "DDIM"), title
    for part in sections(TEXT["ru"]):
        words = re.sub(r"`[^`]*`|\$[^$]*\$", "", BLOCK.sub("", part))
        assert " —" not in words.replace("\n", " "), "a dash is not parted from the word before it"
        assert not re.search(r'"\w', words), "quotation marks are « »"
        for paragraph in words.split("\n\n"):
            if not paragraph.startswith("|") and len(paragraph) > 200 and "arXiv" not in paragraph:
                assert len(re.findall("[А-Яа-яё]", paragraph)) > 0.5 * len(paragraph), paragraph


def test_timesteps_are_shifted_as_said():
    schedule = ddpm_fast.NoiseSchedule.linear(10)
    for name in re.findall(r"^\| \$.*?\$ \| `(\w+)`", TEXT["en"], re.M):
        assert getattr(schedule, name).shape == (10,)
    assert schedule.alphas_cumprod_prev[0] == 1
    assert schedule.alphas_cumprod[0] == schedule.alphas[0]


@pytest.mark.parametrize("page", ["kernels", "limits", "noise", "theory"])
def test_files_that_a_page_names_exist(page):
    text = without_code((ROOT / "docs" / f"{page}.md").read_text())
    folders = r"(?:csrc|kernels|ddpm_fast|tests|docs|benchmarks|ops|nn)/"
    named = re.findall(rf"`({folders}[\w./*-]+\.\w+)`", text)
    assert named
    for path in named:
        places = [ROOT, ROOT / "ddpm_fast"]
        assert any(any(place.glob(path)) for place in places), path
