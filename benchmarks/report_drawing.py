"""Charts as SVG: text stays text, colours are variables that follow the reader's light or dark, and
the same chart gives the same bytes."""

from __future__ import annotations

import io
import math
import re
import textwrap
from typing import Any

from report_charts import Bars, Chart, Lines, digest
from report_data import duration, significant
from report_style import ROTATION, colour, light, themed
from results import OURS

DASHES = {"channels_last": (4, 1.5), "exact": (1.5, 1.5)}
MARKERS = "osD^vPX"

WIDTH = 5.4  # inches: text of 9 points is still read on a phone
LETTER = 0.068  # inches, of the widest font that a reader may have
BAR, LINE, GAP, HEAD, FOOT = 0.155, 0.15, 0.11, 0.30, 0.46
TICKS = 0.22
LABEL = 24  # letters


def svg(chart: Chart, description: str) -> str:
    """A file of its own.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            'drawing takes matplotlib: pip install "ddpm_fast[demo]", or give --no-plots'
        ) from error
    mark = digest(chart)
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": mark,
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": light("ink"),
        "axes.edgecolor": light("grid"),
        "axes.labelcolor": light("muted"),
        "xtick.color": light("muted"),
        "ytick.color": light("muted"),
        "axes.linewidth": 0.8,
    }
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **settings, "backend": "svg"}):
        figure = draw_bars(chart) if isinstance(chart, Bars) else draw_lines(chart)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return themed(text.getvalue(), mark, description)


def new_figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), facecolor=light("paper"))


def draw_bars(chart: Bars) -> Any:
    """Panels below each other, ratios on one axis and times each on their own; each bar says at its
    end what it is."""
    panels, ticks_below = chart.panels, 0.0 if chart.log else TICKS
    heights = [
        sum(tall(group) for group in panel.groups) + GAP * (len(panel.groups) + 1)
        for panel in panels
    ]
    total = sum(heights) + (HEAD + ticks_below) * len(panels) - ticks_below + FOOT
    figure = new_figure(total)
    groups = [group for panel in panels for group in panel.groups]
    left = 0.12 + LETTER * max(len(line) for group in groups for line in wrapped(group.label))
    width = WIDTH - left - 0.1
    top = total
    for panel, height in zip(panels, heights, strict=True):
        top -= HEAD + height
        shown = groups if chart.log else panel.groups
        low, high = limits([bar for group in shown for bar in group.bars], width, chart.log)
        axes = figure.add_axes((left / WIDTH, top / total, width / WIDTH, height / total))
        figure.text(
            0.1 / WIDTH, (top + height + 0.07) / total, panel.title, weight="bold", va="baseline"
        )
        draw_panel(axes, panel, chart.log, height)
        axes.set_xscale("log" if chart.log else "linear")
        axes.set_xlim(low, high)
        named = panel is panels[-1] or not chart.log
        ticks = ratio_ticks(low, high) if chart.log else linear_ticks(high)
        labels = [f"{tick:g}×" if chart.log else duration(tick, 0) for tick in ticks]
        axes.set_xticks(ticks, labels if named else [""] * len(ticks))
        axes.minorticks_off()
        axes.grid(axis="x", color=light("grid"), linewidth=0.7)
        top -= ticks_below
    middle = (left + width / 2) / WIDTH
    figure.text(middle, 0.07 / total, chart.axis, color=light("muted"), ha="center")
    return figure


def tall(group: Any) -> float:
    """Inches: of its bars, or of its label."""
    return max(BAR * len(group.bars), LINE * len(wrapped(group.label)))


def draw_panel(axes: Any, panel: Any, log: bool, height: float) -> None:
    axes.set_ylim(height, 0)  # in inches
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=3)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.axvline(1 if log else 0, color=light("muted"), linewidth=0.9)
    y, middles = GAP, []
    for group in panel.groups:
        middles.append(y + tall(group) / 2)
        end = y + tall(group)
        y = middles[-1] - BAR * len(group.bars) / 2
        for index, bar in enumerate(group.bars):
            start = 1 if log else 0
            axes.barh(
                y + BAR / 2,
                bar.value - start,
                BAR * 0.84,
                left=start,
                color=colour(bar.name, index),
                linewidth=0,
            )
            axes.annotate(
                bar.text,
                (max(bar.value, start), y + BAR / 2),
                (3, 0),
                textcoords="offset points",
                va="center_baseline",
                fontsize=8,
                weight="bold" if bar.name == OURS else "normal",
            )
            y += BAR
        y = end + GAP
    axes.set_yticks(middles, ["\n".join(wrapped(group.label)) for group in panel.groups])


def wrapped(label: str) -> list[str]:
    """Lines of a label; the numbers of a shape stay together."""
    kept = re.sub(r"\[[^]]*\]", lambda found: found[0].replace(" ", "\xa0"), label)
    return [line.replace("\xa0", " ") for line in textwrap.wrap(kept, LABEL)] or [""]


def limits(bars: list[Any], width: float, log: bool) -> tuple[float, float]:
    """Of an axis that leaves room for the words at the end of each bar."""
    rooms = [min(0.85, (LETTER * len(bar.text) + 0.06) / width) for bar in bars]
    if not log:
        return 0.0, max(bar.value / (1 - room) for bar, room in zip(bars, rooms, strict=True))
    low = min(0.9, *(0.9 * bar.value for bar in bars))
    spans = [
        math.log10(max(bar.value, 1.0) / low) / (1 - room)
        for bar, room in zip(bars, rooms, strict=True)
    ]
    return low, low * 10 ** max([*spans, 0.5])


def ratio_ticks(low: float, high: float) -> list[float]:
    digits = (1, 2, 5) if high / low < 150 else (1, 3) if high / low < 1000 else (1,)
    return [k * 10.0**e for e in range(-7, 9) for k in digits if low <= k * 10.0**e <= high]


def linear_ticks(high: float) -> list[float]:
    step = 10 ** math.floor(math.log10(high / 2))
    step *= next(k for k in (1, 2, 5, 10) if high / (k * step) <= 5)
    return [step * i for i in range(int(high / step) + 1)]


def draw_lines(chart: Lines) -> Any:
    """Each line is named at its end, in its colour."""
    height = 3.4
    figure = new_figure(height)
    longest = max(len(line.name) for line in chart.lines)
    left, right = 0.62, 0.25 + LETTER * min(longest, 30)
    width, tall = WIDTH - left - right, height - FOOT - 0.42
    axes = figure.add_axes((left / WIDTH, FOOT / height, width / WIDTH, tall / height))
    axes.set_xscale("log")
    axes.set_axisbelow(True)
    if chart.y_log:
        axes.set_yscale("log")
    values = [y for line in chart.lines for _, y in line.points]
    xs = [x for line in chart.lines for x, _ in line.points]
    axes.set_xlim(min(xs) / 1.3, max(xs) * 1.15)
    if not chart.y_log:
        top = max([*values, *([chart.level[1]] if chart.level else [])])
        axes.set_ylim(0, 1.12 * top)
    else:
        reached = [*values, *([chart.slope[1] * max(xs)] if chart.slope else [])]
        low, high = min(values) / 1.5, max(reached) * 1.5
        axes.set_ylim(low, high)
        axes.set_yticks(ratio_ticks(low, high))
    ends = []
    for index, line in enumerate(chart.lines):
        shade = line_colour(chart, index)
        axes.plot(
            *zip(*line.points, strict=True),
            color=shade,
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linewidth=2.2 if line.name == OURS else 1.5 if chart.joined else 0,
            dashes=next((d for word, d in DASHES.items() if word in line.name), (None, None)),
        )
        ends.append((*line.points[-1], line.name, shade))
    across(axes, chart)
    name_ends(axes, ends, tall)
    axes.set_xticks([x for x, _ in chart.x_ticks], [label for _, label in chart.x_ticks])
    axes.minorticks_off()
    axes.set_xlim(min(xs) / 1.3, max(xs) * 1.15)
    if chart.y_axis.startswith("time"):
        axes.yaxis.set_major_formatter(lambda value, _: duration(value, 0))
    else:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color=light("grid"), linewidth=0.7)
    axes.tick_params(length=0, pad=4)
    axes.set_xlabel(chart.x_axis)
    figure.text(0.1 / WIDTH, 1 - 0.2 / height, chart.y_axis, color=light("muted"), va="center")
    return figure


def line_colour(chart: Lines, index: int) -> str:
    names = [line.name for line in chart.lines]
    return colour(names[index], index) if OURS in names else light(ROTATION[index % len(ROTATION)])


def across(axes: Any, chart: Lines) -> None:
    """What the lines are held against: all of it, and a half."""
    dashed = {"color": light("muted"), "linewidth": 1, "linestyle": (0, (4, 3))}
    if chart.level is not None:
        name, value = chart.level
        for share in (1.0, 0.5):
            axes.axhline(share * value, **dashed)
            label = f"{name}: 100 %" if share == 1 else "50 %"
            axes.annotate(
                label,
                (0, share * value),
                (3, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                color=light("muted"),
                fontsize=8,
            )
    if chart.slope is not None:
        name, factor = chart.slope
        ends = axes.get_xlim()
        axes.plot(ends, [factor * x for x in ends], **dashed)
        axes.set_xlim(ends)
        x = ends[0] * (ends[1] / ends[0]) ** 0.75
        axes.annotate(
            f"{name}, {significant(factor)} GB/s",
            (x, factor * x),
            (-6, 6),
            textcoords="offset points",
            color=light("muted"),
            fontsize=8,
            ha="right",
        )


def name_ends(axes: Any, ends: list[tuple[float, float, str, str]], tall: float) -> None:
    """To the right of the axes, pushed apart, in the order of the lines' last points."""
    to_axes = axes.transScale + axes.transLimits
    placed = [(to_axes.transform((x, y)), name, shade) for x, y, name, shade in ends]
    placed.sort(key=lambda end: end[0][1])
    gap = 0.15 / tall
    heights = [float(point[1]) for point, _, _ in placed]
    for _ in range(100):  # to where none lies on another
        for i in range(1, len(heights)):
            overlap = gap - (heights[i] - heights[i - 1])
            if overlap > 1e-9:
                heights[i] += overlap / 2
                heights[i - 1] -= overlap / 2
    for (point, name, shade), height in zip(placed, heights, strict=True):
        axes.annotate(
            name,
            tuple(map(float, point)),
            (1.03, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=shade,
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": light("grid"), "linewidth": 0.7, "shrinkA": 0},
        )
