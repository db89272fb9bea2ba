"""What the site has beside the pages in this folder, and what language each page is in.

CONTRIBUTING.md and CHANGELOG.md stay where people look for them in a repository, and stand on the
site as well. A page below ru/ is in Russian, with all that the theme adds to it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
TRANSLATED = ("ru",)  # folders of pages in another language than English
LINK = re.compile(r"\[([^][]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
REPOSITORY = Path(__file__).parent.parent.parent


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """MkDocs' hook: the pages of the root are watched, too, by ``mkdocs serve``."""
    config.watch += [str(REPOSITORY / name) for name in ROOT_PAGES]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs' hook: adds the pages of the root."""
    for name, uri in ROOT_PAGES.items():
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=LINK.sub(_from_root, text)))
    return files


def _from_root(found: re.Match[str]) -> str:
    """A link of a page of the root: to a page of the site, or else the name of a file."""
    text, target, anchor = found[1], found[2], found[3] or ""
    if target in ROOT_PAGES:
        return f"[{text}]({ROOT_PAGES[target]}{anchor})"
    if target.startswith("docs/"):
        return f"[{text}]({target.removeprefix('docs/')}{anchor})"
    return text if text == target else f"{text} (`{target}`)"


def language(uri: str) -> str:
    """Of the page with this address below docs/."""
    first = uri.split("/")[0]
    return first if first in TRANSLATED else "en"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **kwargs: Any) -> str:
    """MkDocs' hook: a link to a page of the root leads to its place on the site, and one to a page
    in another language says which."""
    uri = page.file.src_uri
    folder = posixpath.dirname(uri)

    def marked(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        if target.removeprefix("../") in ROOT_PAGES:
            here = posixpath.relpath(ROOT_PAGES[target.removeprefix("../")], folder or ".")
            return f"[{found[1]}]({here}{found[3] or ''})"
        other = language(target)
        return found[0] + ("" if other == language(uri) else f'{{ hreflang="{other}" }}')

    return LINK.sub(marked, markdown)


def on_page_context(
    context: dict[str, Any], page: Page, config: MkDocsConfig, **kwargs: Any
) -> dict[str, Any]:
    """MkDocs' hook, before each page is put into the theme: the theme speaks its language."""
    config.theme["language"] = language(page.file.src_uri)
    return context
