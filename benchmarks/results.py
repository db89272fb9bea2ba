"""A run's results: written as each case is measured, and shown. Nothing here needs the package."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OURS = "ddpm_fast"


def file_name(device: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "-", device).strip("-")


def write(path: Path, report: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    partial.rename(path)


def table(report: dict[str, Any]) -> Iterator[str]:
    """A report as lines of text."""
    yield f"{report['device']}; torch {report['torch']}; {report['backend']}"
    yield f"copy: {report['copy_gigabytes_per_second']:.1f} GB/s"
    yield f"{'case':<34}{'elements':>10}{'µs':>10}{'GB/s':>8}{'% copy':>8}  slower by"
    for row in report["rows"]:
        moved = [row.get(key) for key in ("gigabytes_per_second", "percent_of_copy")]
        shown = "".join(f"{'' if number is None else f'{number:.1f}':>8}" for number in moved)
        others = ", ".join(f"{name} {ratio:.1f}×" for name, ratio in row["ratio"].items())
        microseconds = row["microseconds"][OURS]
        yield f"{row['case']:<34}{row['elements']:>10}{microseconds:>10.1f}{shown}  {others}"
