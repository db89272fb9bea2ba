"""The figures that documents quote: blocks between two comments, written from the results.

    <!-- figures: NAME -->            of the device that report_data.quoted_device takes
    <!-- figures: NAME of DEVICE -->  of that one

What stands between them, up to ``<!-- end figures -->``, is this module's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from report_data import Device, quoted_device
from report_figures import BLOCKS

BLOCK = re.compile(
    r"(?P<begin>^<!-- figures: (?P<name>[\w-]+)(?: of (?P<device>[^>]+?))? -->\n)"
    r"(?P<body>.*?)"
    r"(?P<end>^<!-- end figures -->$)",
    re.M | re.S,
)


def documents(root: Path) -> list[Path]:
    """Those that may hold blocks."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def body(name: str, device: Device | None) -> str:
    """A block's lines, between its comments.

    Raises:
        ValueError: no block has that name.
    """
    if name not in BLOCKS:
        raise ValueError(f"figures: {name}: no such block; there are {', '.join(BLOCKS)}")
    if device is None:
        return "Not measured yet.\n"
    written = BLOCKS[name](device)
    return f"{written}\n" if written else f"Not measured on this device ({device.title}).\n"


def rewritten(text: str, devices: Sequence[Device]) -> str:
    """A document, every block in it as the results have it.

    Raises:
        ValueError: a block begins and does not end, or names what is not there.
    """
    begun = text.count("<!-- figures:")
    if begun != len(BLOCK.findall(text)) or begun != text.count("<!-- end figures -->"):
        raise ValueError("blocks of figures have to begin and end on lines of their own")

    def block(found: re.Match[str]) -> str:
        device = quoted_device(devices)
        if found["device"]:
            named = [each for each in devices if each.name == found["device"]]
            if not named:
                raise ValueError(f"figures: {found['name']}: no results of {found['device']}")
            device = named[0]
        # Blank lines: without them Markdown takes what follows a comment for a part of it.
        return f"{found['begin']}\n{body(found['name'], device)}\n{found['end']}"

    return BLOCK.sub(block, text)
