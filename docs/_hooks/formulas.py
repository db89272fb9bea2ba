"""Formulas, written as ``$…$`` and ``$$…$$``, become MathML when the site is built.

Browsers draw MathML by themselves, so that a page needs no script, no font and no other server.
What Markdown leaves for a script (``span.arithmatex``, ``div.arithmatex``) is replaced here.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)


def mathml(latex: str, display: str) -> str:
    """One formula; its LaTeX stays with it, as the text that is read where MathML is not."""
    latex = " ".join(html.unescape(latex).split())
    drawn = convert(latex, display=display)
    return drawn.replace("<math ", f'<math alttext="{html.escape(latex)}" ', 1)


def on_page_content(content: str, **kwargs: Any) -> str:
    """MkDocs' hook: a page's HTML, before it is put into the theme."""
    content = INLINE.sub(lambda found: mathml(found[1], "inline"), content)
    return BLOCK.sub(
        # a frame of its own, which scrolls where the formula is wider than a phone
        lambda found: (
            f'<div class="formula" tabindex="0" role="group">{mathml(found[1], "block")}</div>'
        ),
        content,
    )
