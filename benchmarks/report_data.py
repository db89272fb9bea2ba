"""What the report is made of: the results of each device, the rows of one kind, and how numbers
are written. Nothing here needs the package, torch or matplotlib."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import results
from results import OURS

Row = dict[str, Any]

# The order in which they are shown; what else there is comes after.
OPS = {
    "sample": "Whole trajectories",
    "sampling": "A step of sampling",
    "rewrites": "The rewrites of a plan",
    "randn": "randn",
    "add_noise": "add_noise",
    "reverse_step": "reverse_step",
    "denoising_loss": "denoising_loss",
    "hybrid_loss": "hybrid_loss",
    "vlb_terms": "vlb_terms",
    "group_norm_silu": "group_norm_silu",
    "schedulers": "diffusers' schedulers",
    "lucidrains": "lucidrains' GaussianDiffusion",
    "openai": "OpenAI's GaussianDiffusion",
    "session": "Sessions",
    "training_overhead": "The trainer",
    "trajectory": "Trajectories on a GPU",
    "launch": "What a launch costs",
    "triton_cuts": "Triton's cuts",
}
OPS_OF_GPUS = ("trajectory", "launch", "triton_cuts")
KERNELS = (
    "randn",
    "add_noise",
    "reverse_step",
    "denoising_loss",
    "hybrid_loss",
    "vlb_terms",
    "group_norm_silu",
)
PIPELINES = {"schedulers": "diffusers", "lucidrains": "lucidrains", "openai": "OpenAI"}
# Candidates that are this package, too, and no baselines. Its reference draws the addressed noise
# by hundreds of PyTorch's operations: nobody would use it for its speed.
OUR_OWN = re.compile(r"ddpm_fast|reference|our |torch's noise$|\+ |none$|sample$")


@dataclass(frozen=True)
class Device:
    """The rows that were measured on one device, each with the date of its own run."""

    name: str
    backend: str
    torch: str
    version: str
    quick: bool
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        return f"{self.name} (quick run)" if self.quick else self.name

    @property
    def slug(self) -> str:
        return results.file_name(self.title).lower()

    @property
    def newest(self) -> str:
        return max((str(row["date"]) for row in self.rows), default="")

    @cached_property
    def measured(self) -> tuple[Row, ...]:
        """Rows that have a speed: a wrong result has none."""
        return tuple(row for row in self.rows if succeeded(row))

    @property
    def copy(self) -> tuple[float, ...]:
        """GB/s that were copied in the runs, in ascending order."""
        found = {row.get("copy_gigabytes_per_second") for row in self.rows} - {None}
        return tuple(sorted(found))

    def of(self, *ops: str) -> tuple[Row, ...]:
        """In the order of ``ops``."""
        return tuple(row for op in ops for row in self.measured if row["op"] == op)

    def find(self, op: str, stem: str, shape: Sequence[int] | None = None) -> Row | None:
        """The row whose case, without its shape, is ``stem``."""
        for row in self.of(op):
            if stem_of(row) == stem and (shape is None or row["shape"] == list(shape)):
                return row
        return None

    def source(self, rows: Iterable[Row] | None = None) -> str:
        """Where figures come from: the device, and the dates of the rows."""
        days = sorted({str(row["date"]) for row in (self.rows if rows is None else rows)})
        span = " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "no date"
        return f"{self.title}, {span}"


def succeeded(row: Row) -> bool:
    return "failed" not in row and bool((row.get("microseconds") or {}).get(OURS))


def read_devices(folder: Path, quick: bool = False) -> list[Device]:
    """Of every results file in a folder, the newest first; quick runs only where they are wanted.

    Raises:
        ValueError: the folder is not there, or a file in it holds something else.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected one with results of benchmarks")
    found = []
    for path in sorted(folder.glob("*.json")):
        report = results.read(path)
        if report.get("quick") and not quick:
            continue
        for row in report["rows"]:
            if not well_formed(row):
                raise ValueError(f"{path}: the row {row.get('case')!r} is none of results.py's")
        try:
            device = Device(
                name=report["device"],
                backend=report.get("backend") or "",
                torch=report.get("torch") or "",
                version=report.get("ddpm_fast") or "",
                quick=bool(report.get("quick")),
                rows=tuple(report["rows"]),
            )
        except KeyError as error:
            raise ValueError(f"{path} holds no results of benchmarks: no {error}") from error
        found.append(device)
    return sorted(found, key=lambda device: device.newest, reverse=True)


def well_formed(row: Row) -> bool:
    """What all that follows takes for granted."""
    times, shape = row.get("microseconds"), row["shape"]
    numbers = [row.get(key) for key in ("elements", "flops", "bytes", "images")]
    return (
        isinstance(times, dict)
        and all(isinstance(us, (int, float)) for us in times.values())
        and (shape is None or all(isinstance(size, int) and size > 0 for size in shape))
        and all(number is None or isinstance(number, (int, float)) for number in numbers)
    )


def quoted_device(devices: Sequence[Device]) -> Device | None:
    """The device that documents quote: of full runs, those with at least half as many rows as the
    fullest, the newest; of one day's, the fullest."""
    full = [device for device in devices if not device.quick and device.rows]
    most = max((len(device.rows) for device in full), default=0)
    full = [device for device in full if 2 * len(device.rows) >= most]
    return max(full, key=lambda device: (device.newest, len(device.rows)), default=None)


def stem_of(row: Row) -> str:
    """A case without its shape or its batch: one for all sizes."""
    stem = re.sub(r",?\s*\[[\d, ]+\]", "", row["case"])
    return re.sub(r",? batch \d+", "", stem).strip()


def by_stem(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(stem_of(row), []).append(row)
    return {
        stem: sorted(each, key=lambda row: row.get("elements") or 0) for stem, each in found.items()
    }


def baselines(row: Row) -> dict[str, float]:
    """How many times as long the others take that are not this package."""
    times = row["microseconds"]
    return {
        name: times[name] / times[OURS] for name in times if times[name] and not OUR_OWN.match(name)
    }


def images_of(row: Row) -> int:
    """How many images a call draws, or takes a step of."""
    return row.get("images") or (row["shape"] or [1])[0]


def seconds_an_image(row: Row) -> dict[str, float]:
    """By candidate, of a trajectory or a step."""
    return {name: us / 1e6 / images_of(row) for name, us in row["microseconds"].items() if us}


def latency_rows(device: Device) -> list[Row]:
    """Of sessions' rows those of requests, whose 95th percentiles are known, too."""
    return [
        row
        for row in device.of("session")
        if set(row.get("p95_milliseconds") or ()) >= set(row["microseconds"])
    ]


def significant(value: float, digits: int = 3) -> str:
    """Three digits, and no exponent."""
    if not value:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # once it is rounded
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def duration(seconds: float, digits: int = 3) -> str:
    """With its unit; without digits as short as it can be said, as on an axis."""
    if seconds <= 0:
        return "0"
    units = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))
    unit, scale = next((u for u in units if seconds >= 0.9995 * u[1]), units[-1])
    value = seconds / scale
    return f"{significant(value, digits) if digits else format(value, '.4g')} {unit}"


def longer(ratio: float) -> str:
    """1.28×, 12.7×, 128×."""
    return f"{ratio:.{2 if ratio < 1.995 else 1 if ratio < 99.5 else 0}f}×"


def shown(shape: Sequence[int] | None) -> str:
    return "" if shape is None else str(list(shape))
