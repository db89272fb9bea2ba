"""The documents that people read, and the blocks of code in them."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^( *)(```+|~~~+)(.*)$")
_SET_IN = re.compile(r"([*+-]|\d+\.|!!!|\?\?\?|===|\[\^|: )")  # what indented lines belong to


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: "indented" of one that no fence says it of.
        section: the second-level heading above it, or the title.
        lead: the line before it.
        marked: numbers of lines that the site sets off.
    """

    path: Path
    line: int
    language: str
    section: str
    lead: str
    code: str
    marked: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def documents() -> list[Path]:
    """README and its like, and the pages."""
    return [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def blocks(path: Path) -> Iterator[Block]:
    """All blocks of code of a document, in order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    section, above, i = "", "", 0  # above: the last line that is not set in
    while i < len(lines):
        line, lead = lines[i], lines[i - 1] if i else ""
        if line.startswith(("# ", "## ")):
            section = line.lstrip("# ")
        opened = _FENCE.match(line)
        if opened:
            indent, marks, info = opened.groups()
            end = next(
                (j for j in range(i + 1, len(lines)) if lines[j] == f"{indent}{marks}"), len(lines)
            )
            assert end < len(lines), f"{path.name}:{i + 1}: a block without an end"
            code = "".join(f"{inner.removeprefix(indent)}\n" for inner in lines[i + 1 : end])
            language = info.strip().split(" ")[0].split("{")[0]
            marked = tuple(map(int, re.findall(r"\d+", info.partition("hl_lines")[2])))
            yield Block(path, i + 1, language, section, lead.strip(), code, marked)
            i = end + 1
        elif line.startswith("    ") and not lead.strip() and not _SET_IN.match(above):
            end = i
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            code = textwrap.dedent("\n".join(lines[i:end])).strip() + "\n"
            yield Block(path, i + 1, "indented", section, lead, code)
            i = end
        else:
            above = line if line.strip() and not line.startswith(" ") else above
            i += 1


def all_blocks(*languages: str) -> list[Block]:
    """Of all documents, those in these languages."""
    found = [block for path in documents() for block in blocks(path)]
    return [block for block in found if block.language in languages] if languages else found


def commands(block: Block) -> list[list[str]]:
    """The commands of a block for the shell, a list of words each; where a line begins with "$ ",
    those that do not are what was answered."""
    code = block.code.replace("\\\n", " ")
    lines = [line for line in code.splitlines() if line.strip()]
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found: list[list[str]] = []
    for line in lines:
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.wordchars += "@%:[]{}=,+^$!"
        words.commenters = "#" if not re.search(r"\S#", line) else ""
        command: list[str] = []
        for word in [*words, ";"]:
            if word in (";", "&", "&&", "||", "|"):
                found += [command] if command else []
                command = []
            else:
                command.append(word)
    return found
