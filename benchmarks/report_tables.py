"""The tables of the page of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from report_data import (
    KERNELS,
    OPS,
    Device,
    Row,
    baselines,
    duration,
    images_of,
    longer,
    seconds_an_image,
    significant,
    succeeded,
)
from report_render import Heading, Part, Table, Text
from results import OURS

# Of a row, what a table of all rows shows elsewhere or not at all.
KNOWN = {
    "op", "case", "shape", "dtype", "elements", "bytes", "flops", "microseconds", "ratio", "date",
    "torch", "ddpm_fast", "quick", "copy_gigabytes_per_second", "gigabytes_per_second",
    "percent_of_copy", "failed", "test",
}  # fmt: skip


def overview(devices: Sequence[Device]) -> Table:
    rows = []
    for device in devices:
        days = device.source().removeprefix(device.title + ", ")
        copy = " to ".join(dict.fromkeys(map(significant, device.copy[:1] + device.copy[-1:])))
        rows.append((device.title, device.backend, device.torch, days, copy))
    head = ("device", "ddpm_fast's kernels", "torch", "measured", "copy, GB/s")
    return Table(head, tuple(rows), "Where it was measured")


def side_by_side(devices: Sequence[Device]) -> list[Part]:
    """Cases that more than one device has."""
    ops = ("sample", "sampling", *KERNELS)
    tables = [{row["case"]: row for row in device.of(*ops)} for device in devices]
    cases = [
        case
        for case in dict.fromkeys(case for table in tables for case in table)
        if sum(case in table for table in tables) > 1
    ]
    if not cases:
        return [Text("No case was measured on more than one device.")]
    rows = tuple((case, *(brief(table.get(case)) for table in tables)) for case in cases)
    head = ("", *(device.title for device in devices))
    sources = "; ".join(device.source(device.of(*ops)) for device in devices)
    return [
        Table(head, rows, f"Time of ddpm_fast, and how many times as long eager takes: {sources}")
    ]


def brief(row: Row | None) -> str:
    if row is None:
        return ""
    others = baselines(row)
    name = next((name for name in ("eager", "reference") if name in others), next(iter(others), ""))
    against = f", {name} {longer(others[name])}" if name else ""
    return duration(row["microseconds"][OURS] / 1e6) + against


def every_row(devices: Sequence[Device]) -> list[Part]:
    parts: list[Part] = [
        Text(
            "Microseconds of a call or a step, medians; behind them how many times as long as "
            "ddpm_fast."
        )
    ]
    for device in devices:
        parts.append(Heading(device.title, 3))
        ops = dict.fromkeys([*OPS, *(row["op"] for row in device.rows)])
        for op in ops:
            rows = [row for row in device.rows if row["op"] == op]
            if rows:
                parts.append(full_table(device, op, rows))
    return parts


def full_table(device: Device, op: str, rows: Sequence[Row]) -> Table:
    """All of an op's, a column for each candidate and for whatever else the rows hold."""
    names = dict.fromkeys(name for row in rows for name in row.get("microseconds") or {})
    names = {OURS: None} | names
    moved = any(row.get("gigabytes_per_second") for row in rows)
    counted = any(row.get("flops") for row in rows)
    more = dict.fromkeys(key for row in rows for key in row if key not in KNOWN)
    dated = len({row["date"] for row in rows}) > 1
    head = ["case", *names]
    head += ["GB/s", "% of copy"] * moved + ["GFLOP/s"] * counted
    head += ["ms an image"] * (op == "sample")
    head += [key.replace("_", " ") for key in more] + ["date"] * dated
    body = []
    for row in rows:
        cells = [row["case"], *(time_cell(row, name) for name in names)]
        if moved:
            cells += [plain(row.get(key)) for key in ("gigabytes_per_second", "percent_of_copy")]
        if counted:
            cells.append(rate(row))
        if op == "sample":
            known = succeeded(row) and images_of(row)
            cells.append(f"{1e3 * seconds_an_image(row)[OURS]:,.1f}" if known else "")
        cells += [plain(row.get(key)) for key in more] + [str(row["date"])] * dated
        body.append(tuple(cells))
    title = OPS.get(op, op)
    caption = f"{title}: {device.source(rows)}"
    return Table(tuple(head), tuple(body), caption, f"{title}, {len(rows)} rows")


def time_cell(row: Row, name: str) -> str:
    if not succeeded(row):
        return f"failed: {row.get('failed', 'no time')}" if name == OURS else ""
    microseconds = row["microseconds"].get(name)
    if microseconds is None:
        return ""
    ratio = microseconds / row["microseconds"][OURS]
    shown = f"{microseconds:,.{0 if microseconds >= 1e4 else 1}f}"
    return shown if name == OURS else f"{shown} ({longer(ratio)})"


def rate(row: Row) -> str:
    if not (row.get("flops") and succeeded(row)):
        return ""
    return f"{row['flops'] / row['microseconds'][OURS] / 1e3:,.1f}"


def plain(value: Any) -> str:
    """What a row holds, as it is."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return "; ".join(f"{name} {plain(each)}" for name, each in value.items())
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        return f"{value:.1e}"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(plain, value))
    return f"{value}"
