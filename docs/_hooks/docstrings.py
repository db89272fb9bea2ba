"""Docstrings are written for ``help()`` and doctest; here they become the Markdown of the site.

Names in roles (:class:`Sampler`) become links where the reference has the name, paths of documents
(docs/noise.md) links to the page, and examples (>>>) blocks of code.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import griffe

DOCS = Path(__file__).parent.parent
ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):`~?([\w.]+)`")
DOCUMENT = re.compile(r"(?<![\w/`(\[])docs/([\w/-]+\.md)")
LISTS = re.compile(r"^(?P<title>Attributes|Raises):\n(?P<entries>(?:    .*\n?|\n(?=    ))+)", re.M)
ENTRY = re.compile(r"^(?P<names>\S[^:]*): (?P<text>.*(?:\n .*)*)", re.M)
SIDE_BY_SIDE = re.compile(r"\](\s+)\[")  # a shape and a source, which are no link
EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?!\s*(?:\n|$)).*)*", re.M)


def markdown(text: str, of: griffe.Object) -> str:
    """The docstring of an object as Markdown."""
    text = LISTS.sub(_list, text)
    text = ROLE.sub(lambda found: _reference(found[1], of), text)
    text = DOCUMENT.sub(_document, text)
    text = SIDE_BY_SIDE.sub(lambda found: f"]{found[1]}\\[", text)
    return EXAMPLE.sub(_block, text)


def _list(found: re.Match[str]) -> str:
    """A section whose entries may name several things, which Griffe's parser has no form for."""
    lines = [f"**{found['title']}:**", ""]
    for entry in ENTRY.finditer(textwrap.dedent(found["entries"])):
        names = re.sub(r"(^|, )(\w+)", r"\1**`\2`**", entry["names"])
        lines.append(f"- {names} – {' '.join(entry['text'].split())}")
    return "\n".join([*lines, "", ""])


def _reference(name: str, of: griffe.Object) -> str:
    """A link to what has this name, seen from the docstring's place; the name alone where the
    reference leaves it out."""
    short = name.removeprefix("ddpm_fast.")
    place: griffe.Object | griffe.Alias | None = of
    while place is not None:
        if short.split(".")[0] in place.members:
            found = place[short] if short in place.members or "." in short else None
            if found is not None:
                path = found.target_path if found.is_alias else found.path
                return f'<autoref optional identifier="{path}"><code>{short}</code></autoref>'
        place = place.parent
    return f"`{short}`"


def _document(found: re.Match[str]) -> str:
    """A link to a page, for the pages of the reference, which lie one folder deeper."""
    return f"[{found[0]}](../{found[1]})" if (DOCS / found[1]).is_file() else found[0]


def _block(found: re.Match[str]) -> str:
    code = re.sub(r"[ ]*# doctest: .*", "", textwrap.dedent(found[0]))
    return textwrap.indent(f"```pycon\n{code}\n```", found["indent"])


class Docstrings(griffe.Extension):
    """Griffe's extension, which mkdocstrings loads."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """All of the package is read: its docstrings are rewritten."""
        if pkg.path == "ddpm_fast":
            self._name_functions(pkg)
            self._rewrite(pkg)

    def _name_functions(self, package: griffe.Module) -> None:
        """An op has the name of its module, which Griffe would show, with all that is within it."""
        for name, member in list(package.members.items()):
            if member.is_alias and (path := member.target_path).startswith("ddpm_fast."):
                found = package[path.removeprefix("ddpm_fast.")]
                if found.is_module and name in found.members:
                    package.members[name] = griffe.Alias(name, f"{path}.{name}", parent=package)

    def _rewrite(self, member: griffe.Object) -> None:
        if member.docstring:
            member.docstring.value = markdown(member.docstring.value, member)
        for child in member.members.values():
            if not child.is_alias:
                self._rewrite(child)  # type: ignore[arg-type]
