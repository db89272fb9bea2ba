"""Names of the package in running text (`ddpm_fast.reverse_step`) lead to the reference."""

from __future__ import annotations

import re
from typing import Any

# not in a link that is one already, whose opening tag would stand right before
NAME = re.compile(r'(?<!">)<code>(ddpm_fast(?:\.\w+)+)(\(\))?</code>')


def on_page_content(content: str, **kwargs: Any) -> str:
    """MkDocs' hook: a page's HTML. A name that the reference does not have stays as it is."""
    return NAME.sub(r'<autoref optional identifier="\1">\g<0></autoref>', content)
