"""A page's description as Markdown, and as one HTML file that loads nothing."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from report_charts import Chart
from report_style import style


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` and **bold** are known in it."""

    text: str


@dataclass(frozen=True)
class Figure:
    name: str  # of its file, without the ending
    chart: Chart
    title: str
    caption: str  # the device and the dates of what it shows


@dataclass(frozen=True)
class Table:
    """The first column names its row; the others are numbers, to the right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    folded: str = ""  # in HTML behind this line


@dataclass(frozen=True)
class Side:
    """Figures of the same kind, of several devices: beside each other where there is room."""

    figures: tuple[Figure, ...]


Part = Heading | Text | Figure | Table | Side
WRITTEN = "<!-- written by `python benchmarks/report.py` from benchmarks/results: not by hand -->"


def figures(parts: Iterable[Part]) -> list[Figure]:
    found: list[Figure] = []
    for part in parts:
        if isinstance(part, Figure):
            found.append(part)
        elif isinstance(part, Side):
            found += part.figures
    return found


def markdown_table(table: Table) -> list[str]:
    width = len(table.head)
    lines = [table.head, ("---", *["--:"] * (width - 1)), *table.rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def markdown(title: str, parts: Iterable[Part], images: str) -> str:
    """``images``: where the page finds its drawings."""
    blocks = [f"# {title}", WRITTEN]
    for part in parts:
        if isinstance(part, Heading):
            blocks.append(f"{'#' * part.level} {part.text}")
        elif isinstance(part, Text):
            blocks.append(textwrap.fill(part.text, 100, break_on_hyphens=False))
        elif isinstance(part, Table):
            blocks += ["\n".join(markdown_table(part)), f"*{part.caption}.*"]
        else:
            blocks += [
                f"![{each.title}; {each.caption}]({images}/{each.name}.svg)\n"
                f"*{each.title}. {each.caption}.*"
                for each in figures([part])
            ]
    return "\n\n".join(blocks) + "\n"


PAGE_STYLE = """
:root{color-scheme:light dark}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem clamp(.75rem,3vw,2rem) 4rem;background:var(--paper);
color:var(--ink);font:16px/1.5 system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}
h1{font-size:1.9rem;line-height:1.2}h2{margin-top:2.5rem;border-top:1px solid var(--grid);
padding-top:1.2rem}h3{margin-top:1.8rem}p,figcaption{max-width:46rem}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem}a{color:var(--blue)}
.side{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1rem}
figure{margin:1rem 0;max-width:36rem}figure svg{display:block;width:100%;height:auto}
figcaption,caption{color:var(--muted);font-size:.85rem;text-align:left;caption-side:bottom;
padding-top:.4rem}
.scroll{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;font-size:.875rem;
font-variant-numeric:tabular-nums}th,td{padding:.25rem .6rem;border-bottom:1px solid var(--grid);
text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}
thead th{vertical-align:bottom}summary{cursor:pointer;padding:.35rem 0}
code{font:.9em ui-monospace,Menlo,Consolas,monospace}
"""


def inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def anchor(text: str) -> str:
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{inline(cell)}</th>' for cell in table.head)
    body = "".join(
        "<tr>" + "".join(f"<td>{inline(cell)}</td>" for cell in row) + "</tr>\n"
        for row in table.rows
    )
    inside = (
        f'<div class="scroll" tabindex="0"><table><caption>{inline(table.caption)}.</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )
    if not table.folded:
        return inside
    return f"<details><summary>{inline(table.folded)}</summary>{inside}</details>"


def html_figure(figure: Figure, draw: Callable[[Figure], str]) -> str:
    drawing = re.sub(r"<style>.*?</style>", "", draw(figure), count=1, flags=re.S)
    return (
        f"<figure>{drawing}<figcaption>{inline(figure.title)}. {inline(figure.caption)}."
        "</figcaption></figure>"
    )


def html_page(title: str, parts: Sequence[Part], draw: Callable[[Figure], str]) -> str:
    """``draw`` gives a figure's SVG, which goes into the page."""
    links = "".join(
        f'<a href="#{anchor(part.text)}">{inline(part.text)}</a>'
        for part in parts
        if isinstance(part, Heading) and part.level == 2
    )
    body = []
    for part in parts:
        if isinstance(part, Heading):
            level = part.level
            body.append(f'<h{level} id="{anchor(part.text)}">{inline(part.text)}</h{level}>')
        elif isinstance(part, Text):
            body.append(f"<p>{inline(part.text)}</p>")
        elif isinstance(part, Table):
            body.append(html_table(part))
        else:
            drawn = "".join(html_figure(each, draw) for each in figures([part]))
            body.append(f'<div class="side">{drawn}</div>')
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{inline(title)}</title>\n<style>{style()}{PAGE_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{inline(title)}</h1>\n<nav>{links}</nav>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )
