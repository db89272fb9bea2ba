"""The site that MkDocs makes of docs/: it builds without a warning, and what it makes is whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from documents import DOCS, ROOT

import ddpm_fast

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings_handlers.python")

LOADS = {"script", "img", "iframe", "source", "video", "audio", "embed", "object", "input"}
CODE = {"code", "pre", "script", "style", "math", "svg"}  # where a dollar is a dollar
PAGES = sorted(
    str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if path.parts[-2] != "_hooks"
)
HERE = ("contributing.md", "changelog.md")  # made of the files in the root


def build(folder: Path) -> str:
    """The site; what MkDocs has said."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "SOURCE_DATE_EPOCH": "1000000000"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Read(HTMLParser):
    """A page: what it loads, where it leads, its anchors, and its text outside of code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.language, self.translations = "", set[tuple[str, str]]()
        self.text, self.formulas = "", 0
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.formulas += tag == "math"
        if tag == "html":
            self.language = values.get("lang", "")
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
            if "hreflang" in values:
                self.translations.add((values["hreflang"], values["href"]))
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(values["href"])
        if tag in LOADS:
            self.loads += [values[name] for name in ("src", "data", "poster") if name in values]
        self.loads += re.findall(r"url\(([^)]+)\)", values.get("style", ""))
        if tag in CODE:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._open:
            self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: a link that leads nowhere, a page that no menu has, a docstring that cannot
    be read, or any other warning is an error here."""
    folder = tmp_path_factory.mktemp("site")
    said = build(folder)
    assert "WARNING" not in said
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Read]:
    """Each page, by its address."""
    return {
        str(path.relative_to(site)): Read(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
    }


def test_every_page_is_there_and_in_the_menu(pages):
    made = {path.removesuffix(".html") + ".md" for path in pages} - {"404.md"}
    assert made == {*PAGES, *HERE}
    home = {urlsplit(link).path for link in pages["index.html"].links}
    # What tabs fold away stands in the menu of the tab's own pages.
    menus = home.union(*({*_from(path, read.links)} for path, read in pages.items()))
    assert {path for path in pages if path != "404.html"} <= menus | {"index.html"}


def _from(path: str, links: list[str]) -> list[str]:
    """Links of a page as addresses from the root."""
    folder = os.path.dirname(path)
    return [
        os.path.normpath(os.path.join(folder, unquote(urlsplit(link).path)))
        for link in links
        if not urlsplit(link).scheme and urlsplit(link).path
    ]


def test_nothing_comes_from_elsewhere(site, pages):
    for path, read in pages.items():
        for address in read.loads:
            assert not urlsplit(address).scheme or address.startswith("data:"), (path, address)
            assert not address.startswith("//"), (path, address)
        # The theme fetches a script for these, so there are none.
        assert "mermaid" not in read.text.lower(), path
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", text), style


def test_links_and_anchors_are_there(site, pages):
    for path, read in pages.items():
        if path == "404.html":  # shown at any address
            continue
        for link in read.links:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                continue
            (target,) = _from(path, [link]) or [path]
            if target.endswith(".html"):
                assert target in pages, (path, link)
                assert unquote(parts.fragment) in {*pages[target].anchors, "__top"}, (path, link)
            else:
                assert (site / target).exists(), (path, link)


def test_formulas_are_mathml(pages):
    for path, read in pages.items():
        assert "$" not in read.text, (path, re.findall(r".{0,40}\$.{0,40}", read.text))
        assert not re.search(r"\\[([a-zA-Z]", read.text), path
    for path in ("theory.html", "ru/theory.html"):
        assert pages[path].formulas > 20, path


def test_formulas_are_found_that_were_left():
    """By the test before: what is no MathML has dollars or backslashes."""
    read = Read(r"<p>\(x_t\) and <code>$HOME</code> <math>$</math></p>")
    assert re.search(r"\\[([a-zA-Z]", read.text)
    assert "$" not in read.text
    assert "$" in Read("<p>$x_t$</p>").text


@pytest.mark.parametrize(
    ("latex", "display", "expected"),
    [
        (r"-\log p", "inline", 'log</mi><mspace width="0.17em" /><mi>p'),
        (r"\log(x)", "inline", "log</mi><mo"),
        (r"\log_2 x", "inline", '</msub><mspace width="0.17em" /><mi>x'),
        ("[-1, 1]", "inline", '[</mo><mo form="prefix">'),
        ("a - 1", "inline", "a</mi><mo>"),
        ("N(x; y)", "inline", "<mo>;</mo>"),
        (r"\left[\sum_{t=1}^T x\right]", "block", "<munderover><mo>∑"),
        (r"\left[\sum_{t=1}^T x\right]", "inline", "<msubsup><mo>∑"),
        (
            r"x_t = \sqrt{\bar\alpha_t} x_0 + z",
            "inline",
            '<mo form="infix">=</mo></math><wbr><math',
        ),
        (r"x_t = \sqrt{\bar\alpha_t} x_0 + z", "block", "<mo>=</mo><msqrt>"),
        ("a < b", "inline", 'alttext="a &lt; b"'),
        (
            r"\lVert x \rVert^2",
            "block",
            '<mo stretchy="false" form="prefix">‖</mo><mi>x</mi>'
            '<msup><mo stretchy="false" form="postfix">‖</mo><mn>2</mn></msup>',
        ),
    ],
)
def test_formulas_are_set_as_tex_sets_them(monkeypatch, latex, display, expected):
    monkeypatch.syspath_prepend(str(DOCS / "_hooks"))
    from formulas import mathml

    assert expected in mathml(latex, display)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("в\u00a0{} —", r'<span class="tied">в\u00a0<math.*</math></span> —'),
        ("is {}\u00a0— so", r'is <span class="tied"><math.*</math>\u00a0—</span> so'),
        ("({}), and", r"\(<math.*</math>\), and"),
    ],
)
def test_a_no_break_space_ties_a_formula(monkeypatch, text, expected):
    monkeypatch.syspath_prepend(str(DOCS / "_hooks"))
    from formulas import on_page_content

    short, long = "x_t", r"x_t = \sqrt{\bar\alpha_t} x_0 + z = 0"
    content = on_page_content(text.format(rf'<span class="arithmatex">\({short}\)</span>'))
    assert re.fullmatch(expected, content)
    content = on_page_content(text.format(rf'<span class="arithmatex">\({long}\)</span>'))
    assert content.count("<wbr>") == 2
    assert all(tied.count("<math") == 1 for tied in re.findall(r"<span.*?</span>", content))


def test_the_search_shows_no_half_of_a_formula(site):
    """Its text, without the root over it, would be another formula."""
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "rounded once, and draw" in index
    assert "1−" not in index
    assert "α¯" not in index


def test_languages(pages):
    for path, read in pages.items():
        assert read.language == ("ru" if path.startswith("ru/") else "en"), path
    english, russian = pages["theory.html"], pages["ru/theory.html"]
    assert ("ru", "ru/theory.html") in english.translations
    assert ("en", "../theory.html") in russian.translations
    assert "Содержание" in russian.text  # the theme speaks the language, too


def test_the_reference_has_every_public_name(pages):
    anchors = set().union(
        *(read.anchors for path, read in pages.items() if path.startswith("api/"))
    )
    missing = {name for name in ddpm_fast.__all__ if f"ddpm_fast.{name}" not in anchors}
    assert not missing
    ours = {a for a in pages["api/operations.html"].anchors if re.fullmatch(r"ddpm_fast[\w.]+", a)}
    assert len(ours) == 7, ours  # the ops, and nothing that stands beside them in their files


def test_docstrings_are_rendered(pages):
    """No role and no example is left as it was written."""
    for path, read in pages.items():
        if path.startswith("api/"):
            found = re.search(r":(class|func|meth|mod|attr):|^\s*>>> ", read.text, re.M)
            assert not found, (path, found)


CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_it_is_read_and_searched_offline(site):
    """In a browser, opened as files: no page fails, nothing is fetched, the search finds."""
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        tab = browser.new_page(viewport={"width": 360, "height": 740})
        fetched, errors = [], []
        tab.on("request", lambda request: fetched.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        for path in ("index.html", "quickstart.html", "api/sampling.html", "ru/theory.html"):
            tab.goto(f"{site.as_uri()}/{path}")
            wide = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{path} is {wide} pixels wider than a phone"
        for words, found in (("reverse_step", "api/operations.html"), ("апостериор", "ru/")):
            tab.goto(f"{site.as_uri()}/index.html?q={words}")
            link = tab.locator(f".md-search-result__item a[href*='{found}']").first
            link.wait_for(state="attached", timeout=20_000)
        browser.close()
    assert not errors
    assert all(url.startswith(("file:", "data:", "blob:", "about:")) for url in fetched)


@pytest.mark.slow
def test_the_same_documents_make_the_same_site(site, tmp_path):
    build(tmp_path / "again")
    for path in sorted(site.rglob("*")):
        if path.is_file():
            other = tmp_path / "again" / path.relative_to(site)
            assert path.read_bytes() == other.read_bytes(), path.relative_to(site)
