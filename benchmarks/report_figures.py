"""What each block of figures in the documents says, from the rows of one device. A row that was not
measured leaves its cell empty; where none was, the block says so."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence

from report_data import (
    Device,
    Row,
    baselines,
    by_stem,
    duration,
    images_of,
    latency_rows,
    longer,
    seconds_an_image,
    shown,
    significant,
)
from report_render import Table, markdown_table
from results import OURS

SMALL, MIDDLE = [1, 3, 32, 32], [16, 3, 32, 32]

# op, stem of its cases, and what README calls it.
KERNELS = (
    ("randn", "randn float32", "`randn`"),
    ("add_noise", "add_noise float32", "`add_noise`"),
    ("add_noise", "add_noise uint8", "`add_noise` from uint8"),
    ("reverse_step", "reverse_step float32", "`reverse_step`"),
    ("reverse_step", "reverse_step bfloat16", "`reverse_step`, bfloat16"),
    ("reverse_step", "reverse_step guidance", "`reverse_step`, guided"),
    ("denoising_loss", "training step float32", "training step: noise, loss, gradient"),
    ("hybrid_loss", "training step, hybrid loss, float32", "the same of the hybrid loss"),
    ("vlb_terms", "vlb_terms float32", "`vlb_terms`"),
    ("group_norm_silu", "group_norm_silu float32 channels_last", "`group_norm_silu`"),
)
PIPELINES = (
    ("schedulers", "scheduler ddpm", "diffusers' DDPM step"),
    ("schedulers", "scheduler ddpm generator", "the same, a generator passed"),
    ("schedulers", "scheduler ddim", "diffusers' DDIM step"),
    ("lucidrains", "lucidrains p_sample pred_v", "lucidrains' `p_sample`, pred_v"),
    ("lucidrains", "lucidrains p_losses pred_v", "lucidrains' `p_losses` and gradient"),
    ("openai", "OpenAI p_sample learned_range", "OpenAI's `p_sample`, learned_range"),
    ("openai", "OpenAI ddim_sample learned_range", "OpenAI's `ddim_sample`"),
    ("openai", "OpenAI training_losses learned_range", "OpenAI's `training_losses` and gradient"),
    ("openai", "OpenAI calc_bpd_loop learned_range", "OpenAI's `calc_bpd_loop`"),
)
NAMES = {
    OURS: "**ddpm_fast**",
    f"{OURS}, exact": "the same without Winograd",
    f"{OURS}, the network as it is": "the same, the network called as it is",
    "eager": "plain PyTorch",
    "eager, channels_last": "plain PyTorch, channels_last",
}


def written(head: Sequence[str], rows: Iterable[Sequence[str]], source: str) -> str:
    """A table and where it comes from."""
    table = Table(tuple(head), tuple(map(tuple, rows)), "")
    return "\n".join([*markdown_table(table), "", f"*{source}.*"])


def sentence(text: str, source: str) -> str:
    return f"{textwrap.fill(text, 100)}\n\n*{source}.*"


def end_to_end(device: Device) -> str:
    """Seconds an image of whole trajectories: a row for each system, a column for each case."""
    return systems(device, "sample", lambda row: f"{batch_of(row)} of {side_of(row)}")


def steps(device: Device) -> str:
    """A step of the CIFAR-10 network."""
    return systems(device, "sampling", lambda row: f"{batch_of(row)}")


def systems(device: Device, op: str, head: Callable[[Row], str]) -> str:
    """Ours in time an image, the others in ratios to it."""
    rows = [row for row in device.of(op) if row["shape"]]
    rows.sort(key=lambda row: (math.prod(row["shape"][1:]), images_of(row)))
    if not rows:
        return ""
    names = dict.fromkeys(name for row in rows for name in row["microseconds"])
    names = {OURS: None} | names
    per = "an image" if op == "sample" else "an image and step"
    body = [[f"{NAMES[OURS]}, {per}", *(duration(seconds_an_image(row)[OURS]) for row in rows)]]
    for name in list(names)[1:]:
        body.append([NAMES.get(name, name), *(peer_cell(row, name) for row in rows)])
    best = "; bold: the fastest of the others"
    count = {row["steps"] for row in rows if row.get("steps")}
    each = f"; {count.pop()} steps" if len(count) == 1 else ""
    return written(["", *map(head, rows)], body, device.source(rows) + each + best)


def batch_of(row: Row) -> str:
    count = images_of(row)
    return f"{count} image{'s' if count > 1 else ''}"


def side_of(row: Row) -> str:
    return "×".join(map(str, row["shape"][2:]))


def peer_cell(row: Row, name: str) -> str:
    """A ratio; the best of the baselines is what a reader looks for."""
    cell, others = ratio_cell(row, name), baselines(row)
    return f"**{cell}**" if others and name == min(others, key=others.__getitem__) else cell


def ratio_cell(row: Row, name: str) -> str:
    time = row["microseconds"].get(name)
    return longer(time / row["microseconds"][OURS]) if time else ""


def kernels(device: Device) -> str:
    """A row an op, at 16 images of CIFAR-10 and at the largest size."""
    body, used = [], []
    for op, stem, name in KERNELS:
        rows = by_stem(device.of(op)).get(stem, [])
        if not rows:
            continue
        usual = sized(rows, MIDDLE) or (rows[-2] if len(rows) > 1 else None)
        large = None if rows[-1] is usual else rows[-1]
        used += rows
        body.append(
            [
                name,
                timed(usual, MIDDLE),
                eager_cell(usual),
                timed(large, [1024, 3, 32, 32]),
                eager_cell(large),
                percent(rows[-1]),
                others(rows),
            ]
        )
    if not body:
        return ""
    head = [
        "",
        "16 images",
        "eager",
        "1,024 images",
        "eager",
        "of a copy's GB/s",
        "others",
    ]
    note = "Where the data stay in caches, GB/s can pass those of a copy, which is far larger."
    return written(head, body, f"{device.source(used)}. {note.removesuffix('.')}")


def sized(rows: Iterable[Row], shape: Sequence[int]) -> Row | None:
    return next((row for row in rows if row["shape"] == shape), None)


def timed(row: Row | None, usual: Sequence[int]) -> str:
    """Of ours, and the shape if it is another."""
    if row is None:
        return ""
    other = row["shape"] != list(usual)
    return duration(row["microseconds"][OURS] / 1e6) + f" {shown(row['shape'])}" * other


def eager_cell(row: Row | None) -> str:
    if row is None:
        return ""
    name = next((name for name in ("eager", "torch.randn") if name in row["microseconds"]), "")
    return ratio_cell(row, name) if name else ""


def percent(row: Row) -> str:
    share = row.get("percent_of_copy")
    return "" if share is None else f"{share:.0f} %"


def others(rows: Sequence[Row]) -> str:
    """Every other baseline, each at the largest size that it was measured at."""
    found = {}
    for row in rows:
        found |= {name: ratio for name, ratio in baselines(row).items() if name != "eager"}
    found.pop("torch.randn", None)
    return "; ".join(
        f"{name.removeprefix('eager, ')} {longer(ratio)}" for name, ratio in found.items()
    )


def pipelines(device: Device) -> str:
    """The stock code's time by ours, for one image, 16, and the largest."""
    body, used = [], []
    for op, stem, name in PIPELINES:
        rows = [row for row in by_stem(device.of(op)).get(stem, []) if row["shape"]]
        if not rows:
            continue
        used += rows
        large = max(rows, key=lambda row: math.prod(row["shape"]))
        at = [
            next((row for row in rows if row["shape"] == shape), None) for shape in (SMALL, MIDDLE)
        ]
        body.append([name, *map(stock_cell, at), stock_cell(large, shape=True)])
    if not body:
        return ""
    head = ["against the stock code", shown(SMALL), shown(MIDDLE), "large"]
    return written(head, body, device.source(used))


def stock_cell(row: Row | None, shape: bool = False) -> str:
    """How many times as long the stock code takes, and what ours takes."""
    ratios = baselines(row) if row else {}
    if row is None or not ratios:
        return ""
    inside = [shown(row["shape"])] if shape else []
    count = (row.get("elements") or 0) // math.prod(row["shape"])
    if count > 1:
        inside.append(f"T = {count}")
    inside.append(duration(row["microseconds"][OURS] / 1e6))
    return f"{longer(next(iter(ratios.values())))} ({', '.join(inside)})"


def rewrites(device: Device) -> str:
    """What each rewrite of a plan brings to a step, and what it costs in error."""
    rows = sorted(device.of("rewrites"), key=images_of)
    if not rows:
        return ""
    names = [name for name in rows[0]["microseconds"] if name not in (OURS, "eager")]
    labels = {"eager": "the model itself, eager", "none": "the plan without a rewrite"}
    labels[OURS] = "+ `winograd`: all"
    errors = rows[0].get("relative_error") or {}
    body = []
    for name in ["eager", *names, OURS]:
        label = labels.get(name) or f"+ `{name.removeprefix('+ ')}`"
        share = errors[name] / errors["eager"] if name in errors and errors.get("eager") else None
        cells = [time_cell(row, name) for row in rows]
        body.append([label, *cells, "" if share is None else f"{share:.2f}"])
    head = ["computed by", *(f"batch {images_of(row)}" for row in rows), "error, of eager's"]
    absolute = f"; eager's error is {errors['eager']:.1e}" if errors.get("eager") else ""
    return written(head, body, device.source(rows) + absolute)


def time_cell(row: Row, name: str) -> str:
    time = row["microseconds"].get(name)
    return duration(time / 1e6) if time else ""


def sessions(device: Device) -> str:
    """Latencies of requests at random, in flight and a batch at a time."""
    rows = latency_rows(device)
    if not rows:
        return ""
    rows.sort(key=lambda row: row["case"].startswith("samples of 50"))  # as they come, else
    names = list(rows[0]["microseconds"])
    heads = {OURS: "in flight, median (p95)"}
    body = []
    for row in rows:
        kind, _, rest = row["case"].removeprefix("samples of ").partition(", load ")
        rate = significant(row.get("arrivals_per_second", 0), 2)
        load = f"{rest.partition(',')[0]}, {rate} a second"
        cells = [
            f"{duration(row['microseconds'][name] / 1e6, 2)} "
            f"({duration(row['p95_milliseconds'][name] / 1e3, 2)})"
            for name in names
        ]
        ratios = [ratio_cell(row, name) for name in names if name != OURS]
        body.append([kind, load, *cells, *ratios])
    head = [
        "requests for",
        "load",
        *(heads.get(name, name) for name in names),
        "its median, by ours",
    ]
    return written(head, body, device.source(rows))


def session_steps(device: Device) -> str:
    """What a session itself takes of a step."""
    rows = [row for row in device.of("session") if "sample" in row["microseconds"]]
    if not rows:
        return ""
    rows.sort(key=images_of)
    ours = {images_of(row): row["microseconds"] for row in rows}
    told = "; ".join(
        f"{count} at a time {duration(us[OURS] / 1e6)}, {us[OURS] / us['sample']:.2f}× `sample`'s"
        for count, us in ours.items()
    )
    return sentence(f"A step in a session: {told}.", device.source(rows))


def requests(device: Device) -> str:
    """The same in a sentence."""
    rows = [row for row in latency_rows(device) if "10 to 100" in row["case"]]
    if not rows:
        return ""
    told = "; ".join(
        f"at {row['case'].partition('load ')[2].partition(',')[0]} load "
        f"{duration(row['microseconds'][OURS] / 1e6, 2)}, and a batch at a time "
        + " and ".join(longer(ratio) for ratio in baselines(row).values())
        + " that"
        for row in rows
    )
    return sentence(
        "Requests that come at random, for 10 to 100 steps each of the digits network: the median "
        f"latency of a session is, {told}.",
        device.source(rows),
    )


def trainer(device: Device) -> str:
    """What the trainer adds to the model's time."""
    rows = device.of("training_overhead")
    bare = "the model, its optimiser"
    if not rows or bare not in rows[0]["microseconds"]:
        return ""
    ours, theirs = (rows[0]["microseconds"][name] for name in (OURS, bare))
    return sentence(
        f"Training the digits preset, a step takes {duration(ours / 1e6)}, {longer(ours / theirs)} "
        "what the model, its loss and its optimiser take alone: data, averages and the log "
        "included.",
        device.source(rows),
    )


BLOCKS: dict[str, Callable[[Device], str]] = {
    "end-to-end": end_to_end,
    "steps": steps,
    "kernels": kernels,
    "pipelines": pipelines,
    "requests": requests,
    "rewrites": rewrites,
    "sessions": sessions,
    "session-steps": session_steps,
    "trainer": trainer,
}
