"""What the site has beside the pages in this folder, and what language each page is in.

CONTRIBUTING.md and CHANGELOG.md stay where people look for them in a repository, and stand on the
site as well. A page below ru/ is in Russian, with all that the theme adds to it; the page of the
same name without ru/ is its original, and each is told of the other.
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
LANGUAGES = {"en": "English", "ru": "Русский"}
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
    return first if first in LANGUAGES else "en"


def translations(uri: str, files: Files) -> dict[str, str]:
    """The page's own address and those of its translations, by language, where it has any."""
    own = language(uri)
    bare = uri if own == "en" else uri.removeprefix(f"{own}/")
    found = {code: bare if code == "en" else f"{code}/{bare}" for code in LANGUAGES}
    found = {code: other for code, other in found.items() if files.get_file_from_path(other)}
    return found if len(found) > 1 else {}


def on_page_markdown(markdown: str, page: Page, files: Files, **kwargs: Any) -> str:
    """MkDocs' hook: a page with translations names them below its title."""
    uri = page.file.src_uri
    own = language(uri)
    links = [
        f"[{LANGUAGES[code]}]({posixpath.relpath(other, posixpath.dirname(uri) or '.')})"
        f'{{ lang="{code}" hreflang="{code}" }}'
        for code, other in translations(uri, files).items()
        if code != own
    ]
    if not links:
        return markdown
    title, _, rest = markdown.partition("\n")
    return f"{title}\n\n{' · '.join(links)}\n{{ .translations }}\n\n{rest}"


def on_page_context(
    context: dict[str, Any], page: Page, config: MkDocsConfig, **kwargs: Any
) -> dict[str, Any]:
    """MkDocs' hook, before each page is put into the theme: the theme speaks its language."""
    config.theme["language"] = language(page.file.src_uri)
    files: Files = config.extra["files_of_the_site"]
    context["translations"] = {
        code: files.get_file_from_path(uri).url  # type: ignore[union-attr]
        for code, uri in translations(page.file.src_uri, files).items()
    }
    return context


def on_env(env: Any, config: MkDocsConfig, files: Files) -> Any:
    """MkDocs' hook: all files are known."""
    config.extra["files_of_the_site"] = files
    return env
