"""One page of numbers from the results of benchmarks of any number of devices: Markdown with
drawings beside it, and a self-contained HTML. Keeps the figures that documents quote as the results
have them.

    python benchmarks/report.py             # docs/numbers.md, docs/images/numbers-*.svg, the HTML
    python benchmarks/report.py --update    # the same, and the blocks of figures in the documents
    python benchmarks/report.py --check     # writes nothing; 1, and the difference, if there is any

The blocks quote one device: of those with at least half as many rows as the fullest, the newest."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from report_blocks import documents, rewritten
from report_charts import digest
from report_data import Device, read_devices
from report_page import TITLE, describe
from report_render import Figure, Part, figures, html_page, markdown

ROOT = Path(__file__).resolve().parent.parent
PAGE, IMAGES = Path("docs/numbers.md"), Path("docs/images")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    add = found.add_argument
    add("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of JSON files")
    add("--root", type=Path, default=ROOT, help="folder with README.md and docs (default: here)")
    add("--html", type=Path, help="the self-contained page (default: build/numbers.html)")
    add("--quick", action="store_true", help="show the results of quick runs, too")
    act = found.add_mutually_exclusive_group()
    act.add_argument("--update", action="store_true", help="write the documents' figures, too")
    act.add_argument("--check", action="store_true", help="compare only")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        devices = read_devices(options.results, options.quick)
        if options.check:
            return check(options.root, devices)
        for path in written(options.root, devices, options.html):
            print(path)
        if options.update:
            for path in changed(options.root, devices):
                print(path)
    except (ImportError, OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


def drawer() -> Callable[[Figure], str]:
    """Draws each figure once. What draws is imported here: checks need none of it."""
    from report_drawing import svg

    drawn: dict[str, str] = {}

    def draw(figure: Figure) -> str:
        if figure.name not in drawn:
            drawn[figure.name] = svg(figure.chart, f"{figure.title}. {figure.caption}")
        return drawn[figure.name]

    return draw


def written(root: Path, devices: Sequence[Device], html: Path | None) -> list[Path]:
    """Writes the page both ways, and its drawings; those of pages before go."""
    parts, draw = describe(devices), drawer()
    html = root / "build/numbers.html" if html is None else html
    texts = {root / PAGE: page(parts), html: html_page(TITLE, parts, draw)}
    texts |= {drawing(root, figure): draw(figure) for figure in figures(parts)}
    for path, text in texts.items():
        write_text(path, text)
    for path in (root / IMAGES).glob("numbers-*.svg"):
        if path not in texts:
            path.unlink()
    return [root / PAGE, html, root / IMAGES]


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def page(parts: Sequence[Part]) -> str:
    return markdown(TITLE, parts, IMAGES.relative_to(PAGE.parent).as_posix())


def drawing(root: Path, figure: Figure) -> Path:
    return root / IMAGES / f"{figure.name}.svg"


def changed(root: Path, devices: Sequence[Device]) -> list[Path]:
    """Writes the blocks that differ. All are made first: a block that cannot be changes nothing."""
    texts = {path: path.read_text() for path in documents(root)}
    new = {path: in_document(path, text, devices) for path, text in texts.items()}
    paths = [path for path in texts if texts[path] != new[path]]
    for path in paths:
        write_text(path, new[path])
    return paths


def in_document(path: Path, text: str, devices: Sequence[Device]) -> str:
    try:
        return rewritten(text, devices)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check(root: Path, devices: Sequence[Device]) -> int:
    """0 where the page, its drawings and all blocks are what the results make them."""
    differences = disagreements(root, devices)
    for line in differences:
        print(line)
    if differences:
        print("\nresults and documents disagree: python benchmarks/report.py --update")
    return 1 if differences else 0


def disagreements(root: Path, devices: Sequence[Device]) -> list[str]:
    """Lines of differences, from what is written to what should be. Of a drawing it is the data
    that count, which it names: another matplotlib draws other lines."""
    parts = describe(devices)
    expected = {path: in_document(path, path.read_text(), devices) for path in documents(root)}
    expected[root / PAGE] = page(parts)
    lines: list[str] = []
    for path, text in expected.items():
        found = path.read_text() if path.exists() else ""
        name = path.relative_to(root).as_posix()
        lines += difflib.unified_diff(
            found.splitlines(), text.splitlines(), name, f"{name}, by the results", lineterm="", n=1
        )
    drawings = {drawing(root, figure): digest(figure.chart) for figure in figures(parts)}
    for path in sorted({*drawings, *(root / IMAGES).glob("numbers-*.svg")}):
        name = path.relative_to(root).as_posix()
        if path not in drawings:
            lines.append(f"{name}: of results that are not there")
        elif not path.exists():
            lines.append(f"{name}: missing")
        elif drawings[path] not in re.findall('data-chart="(.*?)"', path.read_text()[:1000]):
            lines.append(f"{name}: drawn from other results")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
