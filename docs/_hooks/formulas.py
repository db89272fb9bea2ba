"""Formulas, written as ``$…$`` and ``$$…$$``, become MathML when the site is built.

Browsers draw MathML by themselves, so that a page needs no script, no font and no other server.
What Markdown leaves for a script (``span.arithmatex``, ``div.arithmatex``) is replaced here.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree as Tree

from latex2mathml.converter import convert

MATHML = "http://www.w3.org/1998/Math/MathML"
# With the words that no-break spaces tie to it, which browsers do not heed beside a formula.
INLINE = re.compile(
    r'(?P<before>[^\s<>]*\u00a0)?<span class="arithmatex">\\\((?P<latex>.*?)\\\)</span>'
    r"(?P<after>\u00a0[^\s<>]*)?",
    re.S,
)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)
# It scrolls where the formula is wider than a phone, and the search would show it as no formula.
FRAME = '<div class="formula" tabindex="0" data-search-exclude>{}</div>'
TIED = '<span class="tied">{}</span>'
LONG, RELATIONS = 24, "=≤≥<>∼≈→"
THIN_SPACE = {"width": "0.17em"}  # TeX's, after the name of a function
Tree.register_namespace("", MATHML)


def on_page_content(content: str, **kwargs: Any) -> str:
    """MkDocs' hook: a page's HTML, before it is put into the theme."""
    content = INLINE.sub(_in_line, content)
    return BLOCK.sub(lambda found: FRAME.format(mathml(found[1], "block")), content)


def _in_line(found: re.Match[str]) -> str:
    before, after = found["before"] or "", found["after"] or ""
    parts = mathml(found["latex"], "inline").split("<wbr>")
    if len(parts) == 1 and (before or after):
        return TIED.format(before + parts[0] + after)
    if before:
        parts[0] = TIED.format(before + parts[0])
    if after:
        parts[-1] = TIED.format(parts[-1] + after)
    return "<wbr>".join(parts)


def mathml(latex: str, display: str) -> str:
    """One formula; its LaTeX stays with it, as the text that is read where MathML is not."""
    latex = " ".join(html.unescape(latex).split())
    root = Tree.fromstring(convert(latex, display=display))
    _fence(root)
    for row in _rows(root):
        _space(row)
        if display == "block":
            _put_limits_below(row)
    parts = _parts(root) if display == "inline" and len(latex) > LONG else [root]
    parts[0].set("alttext", latex)
    if display == "inline":
        for part in parts:  # as words it would lose its roots and bars
            part.set("data-search-exclude", "")
    return "<wbr>".join(Tree.tostring(part, encoding="unicode") for part in parts)


def _parts(root: Tree.Element) -> list[Tree.Element]:
    """A formula within a line, cut where the line may be broken: after its relations."""
    (row,) = root
    parts = [Tree.Element(root.tag, root.attrib)]
    for child in list(row):
        parts[-1].append(child)
        if _name(child) == "mo" and child.text in RELATIONS and child is not row[-1]:
            child.set("form", "infix")  # not what it would be at an end
            parts.append(Tree.Element(root.tag, root.attrib))
    return parts


def _rows(root: Tree.Element) -> Iterator[Tree.Element]:
    """What holds any number of things side by side."""
    wanted = {f"{{{MATHML}}}{name}" for name in ("math", "mrow", "mtd", "mstyle")}
    return (element for element in root.iter() if element.tag in wanted)


def _name(element: Tree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _space(row: Tree.Element) -> None:
    """As TeX has it: a thin space after log, none after a sign, some after a semicolon."""
    children = list(row)
    for child in children:
        if child.text == ";":
            child.tag = f"{{{MATHML}}}mo"
    for before, child in zip([None, *children], children, strict=False):
        after_operator = before is not None and _name(before) == "mo" and before.text not in ")]|"
        if child.text == "−" and after_operator:
            child.set("form", "prefix")
    for i, child in reversed(list(enumerate(children[:-1]))):
        base = child[0] if _name(child) in ("msub", "msup", "msubsup") else child
        is_function = (
            _name(base) == "mi" and len(base.text or "") > 1 and (base.text or "").isascii()
        )
        if is_function and children[i + 1].text not in ("(", ")", "]", ","):
            row.insert(i + 1, Tree.Element(f"{{{MATHML}}}mspace", THIN_SPACE))


def _fence(root: Tree.Element) -> None:
    """Norms, whose lines neither grow nor tell a browser which is the left one."""
    norms = (e for e in root.iter() if _name(e) == "mo" and e.text == "‖")
    for i, line in enumerate(norms):
        line.set("stretchy", "false")
        line.set("form", "postfix" if i % 2 else "prefix")


def _put_limits_below(row: Tree.Element) -> None:
    """Those of a sum or a product, also where it stands in brackets."""
    for child in row:
        if _name(child) == "msubsup" and child[0].text in ("∑", "∏"):
            child.tag = f"{{{MATHML}}}munderover"
