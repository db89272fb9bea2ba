"""Which charts a device's rows make: what is in them, not how they are drawn."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from report_data import (
    KERNELS,
    Device,
    Row,
    baselines,
    by_stem,
    duration,
    images_of,
    longer,
    seconds_an_image,
    shown,
)
from results import OURS

DRAWN = 3  # raised when drawings of the same chart change


@dataclass(frozen=True)
class Bar:
    name: str  # whose it is: its colour
    value: float
    text: str


@dataclass(frozen=True)
class Group:
    label: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Panel:
    title: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Bars:
    """Horizontal bars: of times, from zero; of ratios, from 1 on a logarithmic axis."""

    panels: tuple[Panel, ...]
    axis: str
    log: bool = False


@dataclass(frozen=True)
class Line:
    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Lines:
    """Lines of points, the x axis logarithmic; ``level`` is drawn across: (name, value)."""

    lines: tuple[Line, ...]
    x_axis: str
    y_axis: str
    x_ticks: tuple[tuple[float, str], ...] = ()
    y_log: bool = False
    joined: bool = True
    level: tuple[str, float] | None = None
    slope: tuple[str, float] | None = None  # y = value · x, as well


Chart = Bars | Lines


def digest(chart: Chart) -> str:
    """Of what is in a chart: a drawing that bears another is an old one."""
    return hashlib.sha256(f"{DRAWN} {chart!r}".encode()).hexdigest()[:16]


def bandwidth(device: Device) -> Lines | None:
    """What the floor of memory traffic takes of a copy's GB/s in the same run, in per cent, against
    the size, of each op the plain case."""
    lines = []
    for op in KERNELS:
        rows = [row for row in device.of(op) if row.get("percent_of_copy") and row.get("elements")]
        stems = by_stem(row for row in rows if row["dtype"] == "float32")
        # max keeps the first of equals: the plain case, before its variants.
        stem = max(stems, key=lambda stem: len({r["elements"] for r in stems[stem]}), default=None)
        if stem is None or len(stems[stem]) < 2:
            continue
        points = {row["elements"]: row["percent_of_copy"] for row in stems[stem]}
        lines.append(Line(op, tuple(points.items())))
    if not lines:
        return None
    ticks = tuple((10.0**k, power(k)) for k in range(3, 10))
    level = "a copy beyond all caches", 100.0
    return Lines(tuple(lines), "elements of the state", "% of a copy's GB/s", ticks, level=level)


def power(exponent: int) -> str:
    return f"{10 ** (exponent % 3)}{'kMG'[exponent // 3 - 1]}"


def intensity(device: Device) -> Lines | None:
    """GFLOP/s against the floating-point operations a byte, where both are known."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in device.measured:
        if row.get("flops") and row.get("bytes"):
            rate = row["flops"] / row["microseconds"][OURS] / 1e3
            found.setdefault(row["op"], []).append((row["flops"] / row["bytes"], rate))
    if not found or not device.copy:
        return None
    return Lines(
        tuple(Line(op, tuple(sorted(points))) for op, points in found.items()),
        "floating-point operations a byte",
        "GFLOP/s",
        tuple((float(f"{k}e{e}"), f"{float(f'{k}e{e}'):g}") for e in range(-2, 6) for k in (1, 3)),
        y_log=True,
        joined=False,
        slope=("memory's limit", device.copy[-1]),
    )


def speedups(rows: Iterable[Row], fewest: int = 1) -> Bars | None:
    """How many times as long the baselines take, by op and size; of cases that were measured at
    ``fewest`` sizes (or where none were, at as many as there are)."""
    panels, single = [], []
    stems = by_stem(rows)
    fewest = min(fewest, max(map(len, stems.values()), default=0))
    stems = {stem: each for stem, each in stems.items() if len(each) >= fewest}
    for stem, each in stems.items():
        if left_out(stem, stems):
            continue
        groups = [speedup_group(row, shown(row["shape"])) for row in each if baselines(row)]
        if len(groups) > 1:
            panels.append(Panel(stem, tuple(groups)))
        elif groups:
            single.append(speedup_group(each[0], f"{stem} {shown(each[0]['shape'])}"))
    if single:
        panels.append(Panel("at one size" if panels else "", tuple(single)))
    return Bars(tuple(panels), "times as long as ddpm_fast", log=True) if panels else None


def left_out(stem: str, stems: Iterable[str]) -> bool:
    """Beside its sibling it says little; the tables have it."""
    return any(
        own in stem and stem.replace(own, sibling) in stems
        for own, sibling in (("float16", "bfloat16"), (" contiguous", " channels_last"))
        if sibling not in stem
    )


def speedup_group(row: Row, label: str) -> Group:
    bars = [Bar(name, ratio, f"{name} {longer(ratio)}") for name, ratio in baselines(row).items()]
    return Group(label, tuple(sorted(bars, key=lambda bar: bar.value)))


def end_to_end(rows: Iterable[Row], axis: str) -> Bars | None:
    """Seconds an image by system: a panel for each network and size of images."""
    panels = []
    for title, each in by_image(rows).items():
        groups = []
        for row in each:
            seconds = seconds_an_image(row)
            bars = [
                Bar(name, value, f"{name} {duration(value)}{suffix(value / seconds[OURS], name)}")
                for name, value in seconds.items()
            ]
            bars.sort(key=lambda bar: (bar.name != OURS, bar.value))
            groups.append(Group(batch(images_of(row)), tuple(bars)))
        panels.append(Panel(title, tuple(groups)))
    return Bars(tuple(panels), axis) if panels else None


def suffix(ratio: float, name: str) -> str:
    return "" if name == OURS else f", {longer(ratio)}"


def batch(count: int) -> str:
    return f"{count} at a time"


def by_image(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of one network and one size of images, by both."""
    found: dict[str, list[Row]] = {}
    for stem, each in by_stem(rows).items():
        for row in each:
            found.setdefault(f"{stem}, {image_size(row['shape'])}", []).append(row)
    return found


def image_size(shape: Sequence[int] | None) -> str:
    return "×".join(map(str, (shape or [])[1:])) or "size not known"


def scaling_with_batch(rows: Iterable[Row], axis: str) -> dict[str, Lines]:
    """Time an image against the images of a batch."""
    charts = {}
    for title, each in by_image(rows).items():
        counts = sorted({images_of(row) for row in each})
        if len(counts) > 1:
            ticks = tuple((float(count), str(count)) for count in counts)
            charts[title] = Lines(
                lines_of({images_of(row): row for row in each}), "images in a batch", axis, ticks
            )
    return charts


def scaling_with_size(rows: Iterable[Row], axis: str) -> dict[str, Lines]:
    """Time an image against its pixels, at one batch each."""
    charts = {}
    for stem, each in by_stem(rows).items():
        for count in sorted({images_of(row) for row in each}):
            sized = {
                math.prod(row["shape"][2:]): row
                for row in each
                if images_of(row) == count and row["shape"]
            }
            if len(sized) > 1:
                ticks = tuple(
                    (float(pixels), "×".join(map(str, row["shape"][2:])))
                    for pixels, row in sorted(sized.items())
                )
                charts[f"{stem}, {batch(count)}"] = Lines(
                    lines_of(sized), "pixels", axis, ticks, y_log=True
                )
    return charts


def lines_of(rows: dict[int, Row]) -> tuple[Line, ...]:
    """By system, its seconds an image at each x."""
    found: dict[str, dict[float, float]] = {}
    for x in sorted(rows):
        for name, value in seconds_an_image(rows[x]).items():
            found.setdefault(name, {})[float(x)] = value
    return tuple(Line(name, tuple(points.items())) for name, points in found.items())


def latencies(rows: Iterable[Row]) -> Bars | None:
    """Of requests, from arrival to image: medians, and the 95th percentile in words."""
    groups = []
    for row in rows:
        bars = []
        for name, us in row["microseconds"].items():
            late = duration(row["p95_milliseconds"][name] / 1e3)
            bars.append(Bar(name, us / 1e6, f"{name} {duration(us / 1e6)}, p95 {late}"))
        label = row["case"].removeprefix("samples ").removesuffix(", median latency")
        groups.append(Group(label.replace("load ", "load\xa0"), tuple(bars)))
    return Bars((Panel("", tuple(groups)),), "median latency") if groups else None
