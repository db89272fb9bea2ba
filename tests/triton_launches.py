"""Launches of the Triton kernels, on empty tensors: something to compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ddpm_fast import NoiseSchedule, vlb_table
from ddpm_fast.kernels.add_noise import launch_add_noise
from ddpm_fast.kernels.denoising_loss import launch_denoising_loss
from ddpm_fast.kernels.group_norm_silu import launch_group_norm_silu
from ddpm_fast.kernels.group_norm_silu_bwd import launch_group_norm_silu_bwd
from ddpm_fast.kernels.group_norm_silu_sums import launch_group_norm_silu_sums
from ddpm_fast.kernels.randn import launch_randn
from ddpm_fast.kernels.reverse_step import launch_reverse_step
from ddpm_fast.kernels.vlb_terms import launch_vlb_terms
from ddpm_fast.ops import checks

SCHEDULE = NoiseSchedule.cosine()
SHAPES = {
    "contiguous": (2, 3, 32, 32),
    "channels_last 3": (2, 3, 32, 32),
    "channels_last 4": (2, 4, 32, 32),
    "odd": (2, 3, 7, 9),
    "channels_last odd": (2, 5, 7, 9),
}
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Launch = Callable[[], None]


def empty(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> torch.Tensor:
    return checks.empty_laid_out(shape, "channels_last" in layout, dtype, torch.device("cpu"))


def step(
    layout: str = "contiguous",
    x: str = "float32",
    m: str = "float32",
    variance: str = "fixed_small",
    shape: tuple[int, ...] | None = None,
    row: int | torch.Tensor = 3,
    seed: int = 5,
    **options: Any,
) -> Launch:
    """A reverse step. Options: further tensors of its size, as dtypes; guidance, nan_step; ids,
    clip, scale, scales."""
    table = SCHEDULE.step_table(prediction="epsilon", variance=variance)
    shape = shape or SHAPES[layout]
    doubled = (shape[0], shape[1] * (1 + (table.model_variance != "none")), *shape[2:])
    state, output = empty(shape, layout, FLOATS[x]), empty(doubled, layout, FLOATS[m])
    names = ("x0", "noise", "out_x0", "out_lowp")
    others = {
        name: empty(shape, layout, FLOATS[options[name]]) if name in options else None
        for name in names
    }
    steps = row if isinstance(row, torch.Tensor) else None
    return lambda: launch_reverse_step(
        state,
        output,
        output if options.get("guidance") else None,
        others["x0"],
        others["noise"],
        torch.empty_like(state),
        others["out_x0"],
        others["out_lowp"],
        torch.zeros(1, dtype=torch.int32) if options.get("nan_step") else None,
        checks.layout_of(state),
        seed,
        None,
        options.get("ids"),
        1,
        table.rows,
        table.timesteps,
        0 if steps is not None else row,
        steps,
        table.model_variance,
        options.get("clip", (-1.0, 1.0)),
        options.get("scale", 1.5),
        options.get("scales"),
    )


def drawing(layout: str, dtype: str, seed: int = 5, index: int = 0, shape=None) -> Launch:
    out = empty(shape or SHAPES[layout], layout, FLOATS[dtype])
    return lambda: launch_randn(out, checks.layout_of(out), seed, None, None, 9, index, None)


def noising(layout: str, x0: torch.dtype, out: str, t: int = 3, ts=None) -> Launch:
    source, target = (empty(SHAPES[layout], layout, dtype) for dtype in (x0, FLOATS[out]))
    weights = SCHEDULE.forward_weights(source.device)
    return lambda: launch_add_noise(
        source, None, target, checks.layout_of(target), 5, None, None, 2, 0, None, weights, t, ts
    )


def regression(
    layout: str = "contiguous",
    m: str = "float32",
    prediction: str = "epsilon",
    doubled: bool = False,
    seed: int = 5,
    t: int = 3,
    ts: torch.Tensor | None = None,
    scale: float = 1.0,
    output: torch.Tensor | None = None,
    shape: tuple[int, ...] | None = None,
) -> Launch:
    """A denoising loss and its gradient. output: a part of a batch."""
    shape = shape or SHAPES[layout]
    if output is None:
        output = empty((shape[0], shape[1] * (1 + doubled), *shape[2:]), layout, FLOATS[m])
    x0 = None if prediction == "epsilon" else empty(shape, layout, torch.float32)
    samples, channels, *rest = checks.layout_of(output)
    return lambda: launch_denoising_loss(
        output,
        x0,
        None,
        torch.empty_like(output),
        torch.empty(samples),
        None,
        (samples, channels // (1 + doubled), *rest),
        doubled,
        (seed, None, None, 2, 0, None),
        SCHEDULE.forward_weights(output.device),
        t,
        ts,
        prediction,
        torch.empty(samples),
        scale,
    )


def bound(
    layout: str = "contiguous",
    m: str = "float32",
    variance: str = "fixed_small",
    cdf: str = "exact",
    hybrid: bool = False,
    x0: torch.dtype = torch.float32,
    seed: int = 5,
    t: int = 3,
    ts: torch.Tensor | None = None,
    shape: tuple[int, ...] | None = None,
) -> Launch:
    """The bound's terms and their gradient."""
    shape = shape or SHAPES[layout]
    doubled = (shape[0], shape[1] * (1 + variance.startswith("learned")), *shape[2:])
    output, target = empty(doubled, layout, FLOATS[m]), empty(shape, layout, x0)
    weights = torch.empty(shape[0])
    return lambda: launch_vlb_terms(
        output,
        target,
        None,
        torch.empty_like(output),
        torch.empty(shape[0]),
        torch.empty(3, shape[0]),
        None,
        checks.layout_of(target),
        (seed, None, None, 2, 0, None),
        vlb_table.vlb_rows(SCHEDULE, "epsilon", variance, output.device),
        t,
        ts,
        "epsilon",
        variance,
        (-1.0, 1.0),
        cdf,
        hybrid,
        weights,
        weights,
        1.0,
    )


def normalisation(
    layout: str = "channels_last",
    dtype: str = "bfloat16",
    shape: tuple[int, ...] = (2, 128, 16, 16),
    options: str = "",
    aside: int = 0,
    x: torch.Tensor | None = None,
) -> Launch:
    """Of 32 groups or all channels. options: which of emb, scale (and shift) and residual there
    are; aside: how many floats off a vector's address rows of channels begin."""
    x = empty(shape, layout, FLOATS[dtype]) if x is None else x
    samples, channels = x.shape[:2]
    groups = 32 if channels > 32 else channels // 3
    residual = torch.empty_like(x) if "residual" in options else None
    affine = rows_of_channels(samples, channels, options, aside)
    statistics = torch.empty(2, samples, groups)
    return lambda: launch_group_norm_silu(
        x,
        residual,
        None if residual is None else torch.empty_like(x),
        torch.empty_like(x),
        layout == "channels_last",
        groups,
        affine,
        1e-5,
        True,
        *statistics,
    )


def differentiation(
    layout: str = "channels_last",
    dtype: str = "bfloat16",
    shape: tuple[int, ...] = (2, 128, 16, 16),
    options: str = "",
    aside: int = 0,
) -> Launch:
    """Its gradient."""
    s, dy, dsum, dx = (empty(shape, layout, FLOATS[dtype]) for _ in range(4))
    affine = rows_of_channels(*shape[:2], options, aside)
    mean, rstd, *means = torch.empty(4, shape[0], 32)
    arguments = (layout == "channels_last", affine, True, mean, rstd)

    def launch() -> None:
        launch_group_norm_silu_sums(s, dy, *arguments, torch.empty(3, *shape[:2]))
        dsum_ = dsum if "residual" in options else None
        launch_group_norm_silu_bwd(s, dy, dsum_, dx, *arguments, torch.stack(means))

    return launch


def rows_of_channels(samples: int, channels: int, options: str, aside: int) -> tuple[Any, ...]:
    """weight, bias, emb, scale and shift, the last two halves of a tensor."""
    weight, bias = (torch.empty(channels + aside)[aside:] for _ in range(2))
    emb = torch.empty(samples, channels + 4)[:, :channels] if "emb" in options else None
    scale = shift = None
    if "scale" in options:
        scale, shift = torch.empty(samples, 2 * channels).chunk(2, 1)
    return weight, bias, emb, scale, shift
