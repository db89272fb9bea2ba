"""add_noise: the forward process q(x_t | x_0) in one pass. Formula: csrc/core/add_noise.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import DTYPES, kernel_of, select, triton_launcher
from ..schedule import NoiseSchedule
from . import checks

STREAM = 2  # forward noise
X0_DTYPES = (*checks.FLOAT_DTYPES, torch.uint8)

checks.library.define(
    "add_noise(Tensor x0, SymInt t, Tensor? ts, Tensor weights, SymInt seed, Tensor? seeds, "
    "Tensor? sample_ids, SymInt stream, SymInt index, Tensor? indices, Tensor? noise, "
    "ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def add_noise(
    x0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int] | None = None,
    stream: int = STREAM,
    index: int | Tensor = 0,
    noise: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε, the noise ε drawn inside (Ho et al. 2020, eq. 4).

    ε is ``randn(x0.shape, seed=seed, sample_ids=sample_ids, stream=stream, index=index)`` and is
    never stored. With the defaults every call draws the same ε for a sample's place in the batch:
    in training give ``sample_ids`` that never repeat, or another ``index``.

    Args:
        x0: [N, …] in [-1, 1], float32, bfloat16 or float16; or uint8 pixels, taken as p/127.5 − 1.
            Contiguous and channels_last are read as they lie, other strides are copied first.
        t: int64 [N] in 0 … T−1, or one int for all. Values on a GPU are not read back: those past
            the ends are taken as T−1.
        schedule: gives ᾱ.
        seed: in [0, 2^64), or int64 [N].
        sample_ids: N non-negative integers; 0 … N−1 if None.
        stream: 0 … 255; docs/noise.md lists them.
        index: 0 … 2^24−1, another draw of the same sample; or int64 [N].
        noise: ε itself, of x0's shape; then seed and index do not matter.
        dtype: of x_t; x0's if None, float32 for pixels.

    Returns:
        x_t like x0. Differentiable in x0, not in noise.

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range.

    >>> x0 = torch.zeros(2, 1, 4, 4)
    >>> add_noise(x0, 999, NoiseSchedule.linear(), seed=0).shape
    torch.Size([2, 1, 4, 4])
    """
    checks.check_tensor("x0", x0, getattr(x0, "device", None), X0_DTYPES)
    checks.check_batch("x0", x0.shape)
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule; got {type(schedule).__name__}")
    device, samples = x0.device, x0.shape[0]
    ts = None
    if isinstance(t, Tensor):
        checks.per_sample_int("t", t, samples, device)
        ts, t = t.contiguous(), 0
    else:
        t = checks.as_int("t", t, len(schedule))
    seed, seeds, ids = checks.noise_address(seed, sample_ids, samples, device)
    stream, index, indices = checks.noise_draw(stream, index, samples, device)
    if noise is not None:
        checks.check_tensor("noise", noise, device, checks.FLOAT_DTYPES)
        checks.check_same_shape("noise", noise, x0.shape)
    if dtype is None:
        dtype = x0.dtype if x0.dtype in checks.FLOAT_DTYPES else torch.float32
    elif dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16; got {dtype}")
    weights = schedule.forward_weights(device)
    run = _add_noise if checks.runs_now(x0, noise) else torch.ops.ddpm_fast.add_noise.default
    out: Tensor = run(x0, t, ts, weights, seed, seeds, ids, stream, index, indices, noise, dtype)
    return out


@torch.library.impl(checks.library, "add_noise", "CompositeExplicitAutograd")
def _add_noise(
    x0: Tensor,
    t: int,
    ts: Tensor | None,
    weights: Tensor,
    seed: int,
    seeds: Tensor | None,
    sample_ids: Tensor | None,
    stream: int,
    index: int,
    indices: Tensor | None,
    noise: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    backend = select(x0.device)
    checks.check_ids_on_host(sample_ids)
    if ts is not None:
        checks.check_same_shape("t", ts, x0.shape[:1])
        checks.check_range_on_host("t", ts, weights.shape[0])
    else:
        checks.as_int("t", t, weights.shape[0])
    if indices is not None:
        checks.check_range_on_host("index", indices, checks.MAX_INDEX)
    x0, layout = checks.dense(x0)
    out = checks.empty_like_dense(x0, dtype)
    if noise is not None:
        noise = checks.laid_out(noise, layout[3])
    if backend == "reference":
        return out.copy_(
            _reference(x0, t, ts, weights, seed, seeds, sample_ids, stream, index, indices, noise)
        )
    if backend == "triton":
        launch = triton_launcher("add_noise", x0.device)
        launch(
            x0, noise, out, layout, seed, seeds, sample_ids, stream, index, indices, weights, t, ts
        )
        return out
    run, where = kernel_of("add_noise", backend, x0.device)
    run(
        x0.data_ptr(),
        DTYPES[x0.dtype],
        checks.address(noise),
        0 if noise is None else DTYPES[noise.dtype],
        out.data_ptr(),
        DTYPES[dtype],
        *layout,
        seed,
        checks.address(seeds),
        checks.address(sample_ids),
        stream,
        index,
        checks.address(indices),
        weights.data_ptr(),
        weights.shape[0],
        t,
        checks.address(ts),
        *where,
    )
    return out


def _reference(
    x0: Tensor,
    t: int,
    ts: Tensor | None,
    weights: Tensor,
    seed: int,
    seeds: Tensor | None,
    sample_ids: Tensor | None,
    stream: int,
    index: int,
    indices: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    samples, device = x0.shape[0], x0.device
    if noise is None:
        seeds, ids = checks.reference_address(seed, seeds, sample_ids, samples, device)
        draws = torch.full_like(ids, index) if indices is None else indices
        noise = reference.randn(x0.shape, seeds, ids, stream << 24 | draws)
    if ts is None:
        ts = torch.full((samples,), t, dtype=torch.int64, device=device)
    x0 = reference.unit_from_pixel(x0) if x0.dtype == torch.uint8 else x0.float()
    signal, sigma = (reference.at(weights[:, i], ts, x0) for i in (0, 1))
    return reference.fma(signal, x0, sigma * noise.float())


@torch.library.register_fake("ddpm_fast::add_noise", lib=checks.library)
def _add_noise_fake(
    x0: Tensor,
    t: int,
    ts: Tensor | None,
    weights: Tensor,
    seed: int,
    seeds: Tensor | None,
    sample_ids: Tensor | None,
    stream: int,
    index: int,
    indices: Tensor | None,
    noise: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return checks.empty_like_dense(x0, dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x0, t, ts, weights = inputs[:4]
    ctx.dtype, ctx.t = x0.dtype, t
    ctx.save_for_backward(ts, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ts, weights = ctx.saved_tensors
    signal = weights[ctx.t, 0] if ts is None else reference.at(weights[:, 0], ts, grad)
    return ((grad * signal).to(ctx.dtype), *[None] * 11)


torch.library.register_autograd(
    "ddpm_fast::add_noise", _backward, setup_context=_setup_context, lib=checks.library
)
