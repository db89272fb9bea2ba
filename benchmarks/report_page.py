"""What stands on the page of numbers, whatever it is written as."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import report_charts as charts
from report_data import KERNELS, OPS, OPS_OF_GPUS, PIPELINES, Device, by_stem, latency_rows
from report_figures import KERNELS as TABLE_OF_KERNELS
from report_figures import PIPELINES as TABLE_OF_PIPELINES
from report_render import Figure, Heading, Part, Side, Text, figures
from report_tables import every_row, overview, side_by_side

TITLE = "Numbers"
STEPPING, LOSSES = KERNELS[:3], KERNELS[3:]
TAKEN = """
`make bench` takes them again, and `python benchmarks/report.py` writes this page from what it left
in benchmarks/results: a file a device, every row with the date of the run that took it.

In a case each candidate is checked first, by what the timed call returns: a wrong result is a
failure, as a crash is, and has no speed. Then the
candidates are timed in turn within one run, each in blocks of calls after one that does not count,
until time is up. The figures are medians, and a ratio is of two medians of one run. On a CPU they
are timed by the clock, with what Python takes of a call; on a GPU by events on the device, with
cold caches.

GB/s are the bytes that a call has to move at the least, by the time it took: reads and writes of
the state and the model's output, once each. They are held against what `Tensor.copy_` moves of
tensors far larger than any cache, in the same run. What fits into a cache can pass it.

`torch.compile` is there in its fastest form: on a CPU with PyTorch's own noise, since Inductor
draws its own number by number (`fallback_random`), and around a network with frozen weights; on a
GPU a network in max-autotune. “channels_last” is a network, and its images, in that layout of
memory.

“eager” is plain PyTorch as the field writes it, in the same dtype, its noise included
(`torch.randn` for `randn`); “in place by hand” the same with numbers for tables and no
temporaries; “reference” this package's specification, whose addressed noise takes PyTorch hundreds
of operations: the charts leave it out. “diffusers”, “lucidrains” and “OpenAI” are the stock code
(for OpenAI's, code of the same operations), around a model that costs nothing unless the case is a
whole step or trajectory.
"""


def describe(devices: Sequence[Device]) -> list[Part]:
    """The whole page."""
    if not any(device.rows for device in devices):
        return [Text("There are no results yet: `make bench` takes them.")]
    devices = [device for device in devices if device.rows]
    parts: list[Part] = [
        Text(
            "How long the kernels, a step, whole trajectories and the pipelines take, against "
            "plain PyTorch, `torch.compile` and the libraries that people use. Every figure names "
            "its device and the days on which it was measured."
        ),
        overview(devices),
    ]
    if not any("NVIDIA" in device.name for device in devices):
        parts.append(Text("Nothing here was measured on a GPU."))
    for title, section in (
        ("End to end", trajectories),
        ("Scaling", scaling),
        ("Memory traffic", rooflines),
        ("The kernels against PyTorch", kernels),
        ("In the pipelines", pipelines),
        ("Requests that come at any time", sessions),
    ):
        parts += [Heading(title), *gathered(section(devices))]
    if len(devices) > 1:
        parts += [Heading("Device by device"), *side_by_side(devices)]
    parts += [Heading("How they were taken"), *map(Text, TAKEN.strip().split("\n\n"))]
    parts += [Heading("Every row"), *unmeasured(devices), *every_row(devices)]
    return parts


def unmeasured(devices: Sequence[Device]) -> list[Part]:
    """Of each device the ops without a speed, and the cases that README's tables would have."""
    parts: list[Part] = []
    for device in devices:
        expected = [op for op in OPS if "NVIDIA" in device.name or op not in OPS_OF_GPUS]
        said = [OPS[op] for op in expected if not device.of(op)]
        said += [f"`{stem}`" for op, stem in figures_of_tables() if misses(device, op, stem)]
        if said:
            parts.append(absent([device.title], ", ".join(said)))
    return parts


def figures_of_tables() -> list[tuple[str, str]]:
    return [(op, stem) for op, stem, _ in (*TABLE_OF_KERNELS, *TABLE_OF_PIPELINES)]


def misses(device: Device, op: str, stem: str) -> bool:
    """That case of an op that it has else."""
    return bool(device.of(op)) and stem not in by_stem(device.of(op))


def gathered(parts: Sequence[Part]) -> list[Part]:
    """All figures of a section beside each other, then what is said."""
    drawn = tuple(figures(parts))
    said = [part for part in parts if isinstance(part, Text)]
    return [Side(drawn), *said] if drawn else [*said]


def compared(
    devices: Sequence[Device],
    name: str,
    title: str,
    what: str,
    ops: Sequence[str],
    build: Callable[[Device], charts.Chart | None],
) -> list[Part]:
    """A chart of each device that has one, and which have none."""
    found, missing = [], []
    for device in devices:
        chart = build(device)
        if chart is None:
            missing.append(device.title)
        else:
            source = device.source(device.of(*ops))
            found.append(Figure(f"numbers-{name}-{device.slug}", chart, title, source))
    parts: list[Part] = [Side(tuple(found))] if found else []
    if missing:
        parts.append(absent(missing, what))
    return parts


def absent(devices: Sequence[str], what: str) -> Text:
    return Text(f"Not measured on {'; '.join(devices)}: {what}.")


def trajectories(devices: Sequence[Device]) -> list[Part]:
    whole = compared(
        devices,
        "trajectories",
        "Time an image of whole trajectories, by system",
        "whole trajectories (`sample`)",
        ("sample",),
        lambda device: charts.end_to_end(device.of("sample"), "time an image"),
    )
    step = compared(
        devices,
        "step",
        "Time an image of one step, network and reverse step, by system",
        "a step with its network (`sampling`)",
        ("sampling",),
        lambda device: charts.end_to_end(device.of("sampling"), "time an image and step"),
    )
    return [*whole, *step]


def scaling(devices: Sequence[Device]) -> list[Part]:
    parts: list[Part] = []
    for name, variable, build in (
        ("batch", "the size of the batch", charts.scaling_with_batch),
        ("size", "the size of images", charts.scaling_with_size),
    ):
        found, missing = [], []
        for device in devices:
            of_device = [
                (f"numbers-{name}-{op}", f"{title}: time an image by {variable}", chart, op)
                for op in ("sample", "sampling")
                for title, chart in build(device.of(op), "time an image").items()
            ]
            found += [
                Figure(f"{stem}-{i}-{device.slug}", chart, title, device.source(device.of(op)))
                for i, (stem, title, chart, op) in enumerate(of_device, 1)
            ]
            if not of_device:
                missing.append(device.title)
        if found:
            parts.append(Side(tuple(found)))
        if missing:
            parts.append(
                Text(f"Not measured on {'; '.join(missing)}: several values of {variable}.")
            )
    return parts


def rooflines(devices: Sequence[Device]) -> list[Part]:
    bandwidth = compared(
        devices,
        "bandwidth",
        "GB/s at the floor of memory traffic, of a copy's, against the elements, float32",
        "two sizes of an op or more",
        KERNELS,
        charts.bandwidth,
    )
    intensity = compared(
        devices,
        "intensity",
        "Arithmetic against memory, of cases whose operations are known",
        "cases whose floating-point operations and bytes are both known",
        tuple(OPS),
        charts.intensity,
    )
    return [*bandwidth, *intensity]


def kernels(devices: Sequence[Device]) -> list[Part]:
    parts: list[Part] = []
    for name, title, ops in (
        ("stepping", "Noise and steps: how many times as long the others take", STEPPING),
        ("losses", "Losses, the bound, the norm: how many times as long the others take", LOSSES),
    ):

        def build(device: Device, ops: tuple[str, ...] = ops) -> charts.Chart | None:
            return charts.speedups(device.of(*ops))

        parts += compared(devices, name, title, ", ".join(f"`{op}`" for op in ops), ops, build)
    note = "float16 and contiguous images, where a sibling is shown, are in the tables below."
    return [*parts, Text(f"Bars begin at 1×, as long as ddpm_fast takes; {note}")]


def pipelines(devices: Sequence[Device]) -> list[Part]:
    parts: list[Part] = []
    for op, whose in PIPELINES.items():

        def build(device: Device, op: str = op) -> charts.Chart | None:
            return charts.speedups(device.of(op), fewest=3)

        title = f"Stock code of {whose}: how many times as long as accelerated"
        parts += compared(devices, op, title, f"the code of {whose}", (op,), build)
    return parts


def sessions(devices: Sequence[Device]) -> list[Part]:
    return compared(
        devices,
        "sessions",
        "Latency of requests that come at random, in flight and a batch at a time",
        "sessions",
        ("session",),
        lambda device: charts.latencies(latency_rows(device)),
    )
