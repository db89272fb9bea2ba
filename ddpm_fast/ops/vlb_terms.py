"""vlb_terms and hybrid_loss: terms of the variational bound, and their gradient, in one pass.
Formula: csrc/core/vlb_terms.h."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from .. import reference, vlb_table
from ..backends import DTYPES, kernel_of, select, triton_launcher
from ..reference import Cdf
from ..schedule import NoiseSchedule, Prediction, Variance, one_of
from . import checks, objective
from .add_noise import STREAM
from .denoising_loss import PREDICTIONS, denoising_loss
from .reverse_step import check_clip

# In the order of VlbVariance and Cdf in csrc/core/vlb_terms.h.
VARIANCES = get_args(Variance)
CDFS = get_args(Cdf)
# Rows of the second result: the unweighted terms that the first adds up, and an error.
SIMPLE, VLB, SQUARED_ERROR = range(3)

checks.library.define(
    "vlb_terms(Tensor model_output, Tensor x0, SymInt t, Tensor? ts, Tensor rows, int prediction, "
    "int variance, float lo, float hi, int cdf, SymInt seed, Tensor? seeds, Tensor? sample_ids, "
    "SymInt stream, SymInt index, Tensor? indices, Tensor? noise, bool hybrid, "
    "Tensor? simple_weights, Tensor? vlb_weights, bool with_gradient, float gradient_scale) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def vlb_terms(
    model_output: Tensor,
    x0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "fixed_small",
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int] | None = None,
    stream: int = STREAM,
    index: int | Tensor = 0,
    noise: Tensor | None = None,
    clip: tuple[float, float] | None = None,
    cdf: Cdf = "exact",
    weights: Tensor | None = None,
    return_mse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each sample's term of the variational bound, in bits per dimension, times a weight.

    KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)), and at t = 0 the discretised decoder's
    −log p_θ(x_0 | x_1) (Ho et al. 2020, eqs. 5 and 13), the mean over dimensions. x_t is made anew
    of x_0 and the ε that lies at the address. The gradient is made in the same pass. The sums take
    one order, whatever the number of threads and the batch.

    Args:
        model_output: [N, C, …] float32, bfloat16 or float16; [N, 2C, …] where ``variance`` is
            "learned" or "learned_range": what the mean follows from, then v.
        x0: [N, C, …] in [-1, 1], of 256 levels 2/255 apart, float or uint8 pixels.
        t: int64 [N] in 0 … T−1, or one int for all. Values on a GPU are not read back: those past
            the ends are taken as T−1.
        schedule: gives every coefficient.
        prediction: "epsilon", "sample" (x_0) or "v_prediction".
        variance: of p_θ: "fixed_small" β̃ or "fixed_large" β, both β̃ of t = 1 at t = 0; "learned"
            log σ²; "learned_range" v in [-1, 1] between log β̃ and log β (Nichol & Dhariwal 2021,
            eq. 15). log σ² counts as at most 87 away from log β̃.
        seed: in [0, 2^64), or int64 [N].
        sample_ids: N non-negative integers; 0 … N−1 if None.
        stream, index: of ε's draw, as ``add_noise``'s; index 0 … 2^24−1, or int64 [N].
        noise: ε itself; then the address does not matter.
        clip: bounds of x̂₀, or None.
        cdf: of the decoder: "exact", or "tanh", the approximation that improved-diffusion makes.
        weights: float32 [N]; 1 if None.
        return_mse: also return the mean of (x_0 − x̂₀)², unweighted; SNR times that is ε's.

    Returns:
        float32 [N], or two of them. The first is differentiable in model_output, once.

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range; a schedule whose
            terms have no float32 form, such as ε prediction where ᾱ is 0.

    >>> x0 = torch.zeros(2, 1, 4, 4)
    >>> eps = randn(x0.shape, seed=0, stream=2)
    >>> bool((vlb_terms(eps, x0, 10, NoiseSchedule.linear(), seed=0) < 1e-6).all())
    True
    """
    total, parts = _run(
        model_output, x0, t, schedule, prediction, variance, (seed, sample_ids, stream, index),
        noise, check_clip(clip), cdf, False, None, weights,
    )  # fmt: skip
    return (total, parts[SQUARED_ERROR]) if return_mse else total


def hybrid_loss(
    model_output: Tensor,
    x0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "learned_range",
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int] | None = None,
    stream: int = STREAM,
    index: int | Tensor = 0,
    noise: Tensor | None = None,
    cdf: Cdf = "exact",
    simple_weights: Tensor | None = None,
    vlb_weights: Tensor | None = None,
) -> Tensor:
    """w_s · L_simple + w_v · L_vlb of each sample, in one pass (Nichol & Dhariwal 2021, eq. 16).

    :func:`denoising_loss` and :func:`vlb_terms`, in whose gradient the mean is held fast, so that
    the bound trains the variance alone. The other arguments are those of :func:`vlb_terms`;
    ``variance`` is one that is learned.

    Args:
        simple_weights, vlb_weights: float32 [N]; 1 if None.

    Returns:
        float32 [N]. Differentiable in model_output, once.

    Raises:
        TypeError, ValueError: as :func:`vlb_terms`; a variance that is not learned.

    >>> x0 = torch.zeros(2, 1, 4, 4)
    >>> hybrid_loss(torch.zeros(2, 2, 4, 4), x0, 10, NoiseSchedule.linear(), seed=0).shape
    torch.Size([2])
    """
    _check_learned(variance)
    total, _ = _run(
        model_output, x0, t, schedule, prediction, variance, (seed, sample_ids, stream, index),
        noise, check_clip(None), cdf, True, simple_weights, vlb_weights,
    )  # fmt: skip
    return total


def hybrid_terms(
    model_output: Tensor,
    x0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "learned_range",
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int] | None = None,
    stream: int = STREAM,
    index: int | Tensor = 0,
    noise: Tensor | None = None,
    cdf: Cdf = "exact",
    vlb_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`hybrid_loss` and its two terms: L_simple + w_v · L_vlb, L_simple, w_v · L_vlb.

    Each may be differentiated, alone or with the others: the terms' gradients lie in one half of
    the model's output each.

    Returns:
        Three float32 [N], from one pass.

    >>> x0 = torch.zeros(2, 1, 4, 4)
    >>> terms = hybrid_terms(torch.zeros(2, 2, 4, 4), x0, 10, NoiseSchedule.linear(), seed=0)
    >>> [term.shape for term in terms]
    [torch.Size([2]), torch.Size([2]), torch.Size([2])]
    """
    _check_learned(variance)
    draw = (seed, sample_ids, stream, index)
    clip = check_clip(None)
    if not checks.is_eager(model_output, x0, noise):
        # Where an op is traced, one of its results is differentiated: here it takes two.
        m, v = model_output.chunk(2, 1)
        simple = denoising_loss(
            model_output, t, schedule, prediction=prediction, variance=variance, seed=seed,
            sample_ids=sample_ids, stream=stream, index=index, x0=x0, noise=noise,
        )  # fmt: skip
        vlb, _ = _run(
            torch.cat([m.detach(), v], 1), x0, t, schedule, prediction, variance, draw, noise, clip,
            cdf, False, None, vlb_weights,
        )  # fmt: skip
        return simple + vlb, simple, vlb
    total, simple, vlb = _run(
        model_output, x0, t, schedule, prediction, variance, draw, noise, clip, cdf, True, None,
        vlb_weights, kernel=_terms_and_gradient,
    )  # fmt: skip
    return total, simple, vlb


def _check_learned(variance: Variance) -> None:
    if variance not in ("learned", "learned_range"):
        raise ValueError(f"variance must be 'learned' or 'learned_range'; got {variance!r}")


def _run(
    model_output: Tensor,
    x0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    prediction: Prediction,
    variance: Variance,
    draw: tuple[int | Tensor, Tensor | Sequence[int] | None, int, int | Tensor],
    noise: Tensor | None,
    clip: tuple[float, float],
    cdf: Cdf,
    hybrid: bool,
    simple_weights: Tensor | None,
    vlb_weights: Tensor | None,
    kernel: Callable[..., tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor, ...]:
    """The weighted sum [N], and the parts [3, N] that the schema names.

    kernel: what runs instead of the op where nothing is traced, and gives results before the last
    that are differentiated by one half of the model's output each.
    """
    shape, _ = objective.check_model_output(model_output, prediction, variance)
    one_of("cdf", cdf, Cdf)
    device, samples = model_output.device, shape[0]
    t, ts = objective.timesteps(t, schedule, samples, device)
    objective.check_x0(x0, shape, device)
    objective.check_noise(noise, shape, device)
    simple_weights, vlb_weights = (
        objective.sample_weights(name, weights, samples, device)
        for name, weights in (
            ("simple_weights", simple_weights),
            ("vlb_weights" if hybrid else "weights", vlb_weights),
        )
    )
    *results, _ = objective.run_op(
        torch.ops.ddpm_fast.vlb_terms.default,
        _vlb_terms if kernel is None else kernel,
        model_output,
        (x0, noise),
        10,  # terms of small timesteps are steep
        x0,
        t,
        ts,
        vlb_table.vlb_rows(schedule, prediction, variance, device),
        PREDICTIONS.index(prediction),
        VARIANCES.index(variance),
        clip[0],
        clip[1],
        CDFS.index(cdf),
        *objective.noise_address(*draw, samples, device),
        noise,
        hybrid,
        simple_weights,
        vlb_weights,
        kept=objective.KeptGradient if kernel is None else objective.KeptHalves,
    )
    return tuple(results)


@torch.library.impl(checks.library, "vlb_terms", "CompositeExplicitAutograd")
def _vlb_terms(
    model_output: Tensor,
    x0: Tensor,
    t: int,
    ts: Tensor | None,
    rows: Tensor,
    prediction: int,
    variance: int,
    lo: float,
    hi: float,
    cdf: int,
    seed: int,
    seeds: Tensor | None,
    sample_ids: Tensor | None,
    stream: int,
    index: int,
    indices: Tensor | None,
    noise: Tensor | None,
    hybrid: bool,
    simple_weights: Tensor | None,
    vlb_weights: Tensor | None,
    with_gradient: bool,
    gradient_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = select(model_output.device)
    address = (seed, seeds, sample_ids, stream, index, indices)
    objective.check_values_on_host(address, t, ts, rows.shape[0])
    total, parts, gradient = _outputs(model_output, with_gradient)
    doubled = VARIANCES[variance].startswith("learned")
    model_output, layout = objective.model_layout(model_output, doubled)
    x0 = checks.laid_out(x0, layout[3])
    noise = None if noise is None else checks.laid_out(noise, layout[3])
    if backend == "reference":
        _reference(
            model_output, x0, t, ts, rows, PREDICTIONS[prediction], VARIANCES[variance], (lo, hi),
            CDFS[cdf], address, noise, hybrid, simple_weights, vlb_weights, gradient_scale,
            total, parts, gradient if with_gradient else None,
        )  # fmt: skip
        return total, parts, gradient
    scratch = objective.scratch(layout, 3, total.device)
    if backend == "triton":
        triton_launcher("vlb_terms", total.device)(
            model_output,
            x0,
            noise,
            gradient if with_gradient else None,
            total,
            parts,
            scratch,
            layout,
            address,
            rows,
            t,
            ts,
            PREDICTIONS[prediction],
            VARIANCES[variance],
            (lo, hi),
            CDFS[cdf],
            hybrid,
            simple_weights,
            vlb_weights,
            gradient_scale,
        )
        return total, parts, gradient
    run, where = kernel_of("vlb_terms", backend, total.device)
    run(
        model_output.data_ptr(),
        DTYPES[model_output.dtype],
        x0.data_ptr(),
        DTYPES[x0.dtype],
        checks.address(noise),
        0 if noise is None else DTYPES[noise.dtype],
        gradient.data_ptr() if with_gradient else 0,
        gradient_scale,
        total.data_ptr(),
        parts.data_ptr(),
        checks.address(scratch),
        *layout,
        seed,
        checks.address(seeds),
        checks.address(sample_ids),
        stream,
        index,
        checks.address(indices),
        rows.data_ptr(),
        rows.shape[0],
        t,
        checks.address(ts),
        prediction,
        variance,
        lo,
        hi,
        cdf,
        hybrid,
        checks.address(simple_weights),
        checks.address(vlb_weights),
        *where,
    )
    return total, parts, gradient


def _terms_and_gradient(model_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The sum, its two terms and the gradient of a hybrid whose first weight is 1."""
    total, parts, gradient = _vlb_terms(model_output, *arguments)
    weights = arguments[-3]
    vlb = parts[VLB].clone() if weights is None else parts[VLB] * weights
    return total, parts[SIMPLE].clone(), vlb, gradient


def _reference(
    model_output: Tensor,
    x0: Tensor,
    t: int,
    ts: Tensor | None,
    rows: Tensor,
    prediction: Prediction,
    variance: Variance,
    clip: tuple[float, float],
    cdf: Cdf,
    address: objective.Address,
    noise: Tensor | None,
    hybrid: bool,
    simple_weights: Tensor | None,
    vlb_weights: Tensor | None,
    gradient_scale: float,
    total: Tensor,
    parts: Tensor,
    gradient: Tensor | None,
) -> None:
    m, v = model_output.float(), None
    if variance.startswith("learned"):
        m, v = m.chunk(2, 1)
    x0 = objective.unit(x0)
    eps = objective.reference_noise(address, noise, m.shape, m.device)
    ts = objective.reference_timesteps(t, ts, len(rows), len(total), m.device)
    terms = vlb_table.terms(x0, eps, m, v, rows, ts, variance=variance, clip=clip, cdf=cdf)
    to_bits = vlb_table.bits_per_nat(m.shape)
    w_simple, w_vlb = (
        torch.ones_like(total) if weights is None else weights
        for weights in (simple_weights, vlb_weights)
    )
    parts[SIMPLE] = 0
    parts[VLB] = terms.nats[:, None].flatten(1).sum(1) * to_bits
    parts[SQUARED_ERROR] = terms.squared_error[:, None].flatten(1).mean(1)
    total.copy_(w_vlb * parts[VLB])
    scale = (w_vlb * to_bits).reshape(-1, *[1] * (m.ndim - 1))
    by_m, by_v = scale * terms.by_m, scale * terms.by_v
    if hybrid:
        target = eps
        if prediction == "sample":
            target = x0
        elif prediction == "v_prediction":
            signal, sigma = (reference.at(rows[:, i], ts, eps) for i in (0, 1))
            target = reference.fma(signal, eps, -(sigma * x0))
        parts[SIMPLE] = reference.regression(target, m)
        total += w_simple * parts[SIMPLE]
        by_m = reference.regression_gradient(target, m, w_simple)
    if gradient is not None:
        both = by_m if v is None else torch.cat([by_m, by_v], 1)
        gradient.copy_(gradient_scale * both)


def _outputs(model_output: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    samples = model_output.shape[0]
    total = model_output.new_empty(samples, dtype=torch.float32)
    parts = model_output.new_empty(3, samples, dtype=torch.float32)
    if with_gradient:
        return total, parts, checks.empty_like_dense(model_output, model_output.dtype)
    return total, parts, model_output.new_empty(0)  # an op returns a fixed number of tensors


@torch.library.register_fake("ddpm_fast::vlb_terms", lib=checks.library)
def _vlb_terms_fake(model_output: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(model_output, args[-2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    objective.keep_gradient(ctx, output, inputs[-1], len(inputs))


torch.library.register_autograd(
    "ddpm_fast::vlb_terms",
    objective.from_kept_gradient,
    setup_context=_setup_context,
    lib=checks.library,
)
