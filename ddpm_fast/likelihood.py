"""bits_per_dim: the variational bound on a data set's negative log-likelihood.

  KL(q(x_T | x_0) ‖ p(x_T)) + Σ_t KL(q(x_{t−1} | x_t, x_0) ‖ p_θ) − log p_θ(x_0 | x_1),

(Ho et al. 2020, eqs. 5 and 13), in bits per dimension, each expectation over ε by one draw.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import reference
from .model import Model, call_model, first_parameter
from .ops.add_noise import X0_DTYPES, add_noise
from .ops.checks import FLOAT_DTYPES, as_int, noise_address, reference_address
from .ops.randn import randn
from .ops.reverse_step import check_clip
from .ops.vlb_terms import vlb_terms
from .progress import bar
from .schedule import NoiseSchedule, Prediction, Variance, integer, one_of
from .vlb_table import vlb_rows

STREAM = 4  # of ε; the index is the timestep evaluated
TIMESTEPS_STREAM = 10  # of which timesteps are; a block of words a stratum


@dataclass(frozen=True)
class BitsPerDim:
    """What :func:`bits_per_dim` returns, on the CPU: float32, or float64 where x0 was. Bits, means
    over a sample's dimensions.

    Attributes:
        total: [N], the bound: prior + the sum of vlb, or its estimate.
        prior: [N], KL(q(x_T | x_0) ‖ N(0, 1)).
        vlb: [N, T], each step's term, t ascending: the decoder's at t = 0. NaN where a timestep was
            not evaluated.
        mse: [N, T], the mean of (ε − ε_θ)², ε_θ rederived from the clipped x̂₀; NaN likewise.
        standard_error: [N], of total as an estimate of the sum over all timesteps; 0 where all were
            evaluated.
    """

    total: Tensor
    prior: Tensor
    vlb: Tensor
    mse: Tensor
    standard_error: Tensor

    @property
    def mean(self) -> float:
        """Of total over the samples: the data set's bits/dim."""
        return float(self.total.double().mean())

    @property
    def mean_timestep_error(self) -> float:
        """The standard error of :attr:`mean` from leaving out timesteps, for these samples."""
        return float(self.standard_error.double().square().sum().sqrt()) / max(len(self.total), 1)

    @property
    def mean_sample_error(self) -> float:
        """The standard error of :attr:`mean` for the population that the samples came from; that
        from leaving out timesteps is in it. NaN for one sample."""
        return float(self.total.double().std()) / math.sqrt(max(len(self.total), 1))


def bits_per_dim(
    model: Model,
    x0: Tensor | Iterable[Any],
    schedule: NoiseSchedule,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "fixed_small",
    clip: tuple[float, float] | None = (-1.0, 1.0),
    seed: int = 0,
    sample_ids: Tensor | Sequence[int] | None = None,
    cdf: reference.Cdf = "exact",
    num_timesteps: int | None = None,
    batch_size: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> BitsPerDim:
    """The variational bound of each sample, in bits/dim.

    ε of timestep t is ``randn(seed=seed, sample_ids=sample_ids, stream=4, index=t)``: a sample's
    value does not depend on how the data is split into batches. float64 x0 is taken through the
    reference formulas in float64, with ε widened.

    Args:
        model: any callable ``(x_t, t, **model_kwargs)`` returning a tensor, or an object whose
            ``.sample`` is one: [N, C, …], or [N, 2C, …] where the variance is learned. A module
            gets x_t where its parameters lie, and in their dtype.
        x0: [N, C, …], float in [-1, 1] of 256 levels 2/255 apart, or uint8 pixels. Or an iterable
            of such batches, or of pairs (batch, labels int64 [N] or None), where the labels go to
            the model as ``class_labels``.
        schedule: of the forward process.
        prediction: "epsilon", "sample" (x_0) or "v_prediction".
        variance: "fixed_small", "fixed_large", "learned" or "learned_range".
        clip: bounds of x̂₀, or None.
        seed: in [0, 2^64).
        sample_ids: a non-negative integer for each sample; 0, 1, … if None, counting on over
            batches.
        cdf: of the decoder: "exact", or "tanh", improved-diffusion's approximation.
        num_timesteps: K, 3 … T: evaluate t = 0 and K − 1 others for each sample, instead of all T.
            The others are drawn at random, two from each of (K − 1)/2 ranges that grow with t
            (three from the last where K is even; ranges of two are taken whole), as functions of
            seed and id by stream 10. The estimate is unbiased.
        batch_size: how many samples of a tensor the model takes at once; all if None. An iterable's
            batches are taken as they come.
        model_kwargs: passed to the model. Tensors with one row a sample are split as a tensor x0
            is.
        progress: show a bar (needs tqdm).

    Returns:
        BitsPerDim.

    Raises:
        TypeError, ValueError: an argument, or what the model returns, of another type, shape or
            range; a schedule that has no bound, such as ε prediction where ᾱ is 0.
        ImportError: ``progress`` without tqdm.

    >>> x0 = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    >>> bits_per_dim(lambda x, t: x, x0, NoiseSchedule.linear(10)).vlb.shape
    torch.Size([2, 10])
    """
    bound = _Bound(model, schedule, prediction, variance, check_clip(clip), cdf, num_timesteps)
    as_int("seed", seed, 1 << 64)
    if isinstance(model, nn.Module) and model.training:
        warnings.warn(
            "the model is in training mode: dropout and batch statistics are active; call "
            "model.eval() before measuring its likelihood",
            stacklevel=2,
        )
    if batch_size is not None and integer("batch_size", batch_size) < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    if sample_ids is not None and isinstance(x0, Tensor) and len(sample_ids) != len(x0):
        raise ValueError(f"sample_ids must have shape [{len(x0)}]; got [{len(sample_ids)}]")
    parts: list[BitsPerDim] = []
    position = 0
    batches = _num_batches(x0, batch_size)
    total = None if batches is None else batches * len(bound)
    with bar(progress, total, "likelihood", unit="step") as shown:
        for batch, kwargs in _batches(x0, batch_size, dict(model_kwargs or {})):
            following = position + len(batch)
            ids: Tensor | Sequence[int] = range(position, following)
            if sample_ids is not None:
                ids = sample_ids[position:following]
            parts.append(bound.of(batch, seed, ids, kwargs, shown))
            position = following
    if not parts:
        raise ValueError("x0 gave no batches")
    if sample_ids is not None and len(sample_ids) != position:
        raise ValueError(f"sample_ids must be {position}, one a sample; got {len(sample_ids)}")
    names = [field.name for field in fields(BitsPerDim)]
    return BitsPerDim(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


class _Stratum(NamedTuple):
    """Timesteps begin … begin + size − 1, of which some are drawn for each sample."""

    begin: int
    size: int
    drawn: int


class _Bound:
    """The bound of one model: its checked arguments."""

    def __init__(
        self,
        model: Model,
        schedule: NoiseSchedule,
        prediction: Prediction,
        variance: Variance,
        clip: tuple[float, float],
        cdf: reference.Cdf,
        num_timesteps: int | None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable; got {type(model).__name__}")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule; got {type(schedule).__name__}")
        one_of("prediction", prediction, Prediction)
        one_of("variance", variance, Variance)
        one_of("cdf", cdf, reference.Cdf)
        if prediction == "epsilon" and schedule.alphas_cumprod[-1] == 0:
            raise ValueError(
                "prediction='epsilon' has no x_0 at the last timestep, where alphas_cumprod is 0: "
                "there is no bound; use 'v_prediction' or 'sample'"
            )
        self.model = model
        self.schedule = schedule
        self.prediction: Prediction = prediction
        self.variance: Variance = variance
        self.clip = clip
        self.cdf: reference.Cdf = cdf
        self.strata = _strata(len(schedule), num_timesteps)
        self.parameter = first_parameter(model)

    def __len__(self) -> int:
        """How often the model is called for a batch."""
        return sum(stratum.drawn for stratum in self.strata)

    @torch.no_grad()
    def of(
        self,
        x0: Tensor,
        seed: int,
        sample_ids: Tensor | Sequence[int],
        kwargs: dict[str, Any],
        bar: Any,
    ) -> BitsPerDim:
        device = x0.device if self.parameter is None else self.parameter.device
        x0 = x0.to(device)
        kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        if isinstance(sample_ids, range):
            ends = sample_ids.start, sample_ids.stop, sample_ids.step
            sample_ids = torch.arange(*ends, device=device)
        elif isinstance(sample_ids, Tensor):
            sample_ids = sample_ids.to(device)
        key, _, ids = noise_address(seed, sample_ids, len(x0), device)
        seeds, ids = reference_address(key, None, ids, len(x0), device)
        doubles = x0.dtype == torch.float64
        evaluate = self._in_float64 if doubles else self._by_kernels

        vlb = torch.full([len(x0), len(self.schedule)], math.nan, device=device)
        vlb = vlb.double() if doubles else vlb
        mse = vlb.clone()
        pixels = reference.unit_from_pixel(x0.double()) if x0.dtype == torch.uint8 else x0.double()
        prior = reference.prior_kl(pixels, self.schedule)
        total, error = prior.clone(), torch.zeros_like(prior)
        for number, stratum in enumerate(self.strata):
            terms = []
            for t in _timesteps(stratum, number, seeds, ids):
                place = torch.full_like(ids, t) if isinstance(t, int) else t
                term, squared_error = evaluate(x0, t, place, seed, ids, kwargs)
                vlb.scatter_(1, place[:, None], term[:, None])
                mse.scatter_(1, place[:, None], squared_error[:, None])
                terms.append(term.double())
                bar.update()
            drawn = torch.stack(terms)
            total += stratum.size * drawn.mean(0)
            if stratum.drawn < stratum.size:
                left_out = 1 - stratum.drawn / stratum.size
                error += stratum.size**2 * left_out * drawn.var(0) / stratum.drawn
        mse *= self.schedule.snr.to(mse)
        results = (total, prior, vlb, mse, error.sqrt())
        return BitsPerDim(*(result.to("cpu", vlb.dtype) for result in results))

    def _by_kernels(
        self,
        x0: Tensor,
        t: int | Tensor,
        place: Tensor,
        seed: int,
        ids: Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """The term and the mean of (x_0 − x̂₀)² at each sample's timestep, float32 [N]."""
        vlb_rows(self.schedule, self.prediction, self.variance, x0.device)  # or raises
        dtype = torch.float32 if self.parameter is None else self.parameter.dtype
        if dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"the model's parameters are {dtype}; call model.float(), or give x0 in float64"
            )
        address: dict[str, Any] = {"seed": seed, "sample_ids": ids, "stream": STREAM, "index": t}
        x_t = add_noise(x0, t, self.schedule, dtype=dtype, **address)
        result = vlb_terms(
            self._call(x_t, place, kwargs),
            x0,
            t,
            self.schedule,
            prediction=self.prediction,
            variance=self.variance,
            clip=self.clip,
            cdf=self.cdf,
            return_mse=True,
            **address,
        )
        assert isinstance(result, tuple)
        return result

    def _in_float64(
        self,
        x0: Tensor,
        t: int | Tensor,
        place: Tensor,
        seed: int,
        ids: Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """The same by the reference formulas, float64 [N]."""
        eps = randn(
            x0.shape, seed=seed, sample_ids=ids, stream=STREAM, index=t, device=x0.device
        ).double()
        x_t = reference.q_sample(x0, place, self.schedule, eps)
        x_in = x_t if self.parameter is None else x_t.to(self.parameter.dtype)
        output = self._call(x_in, place, kwargs).double()
        choices: dict[str, Any] = {
            "prediction": self.prediction,
            "variance": self.variance,
            "clip": self.clip,
        }
        term = reference.vlb_terms(x0, x_t, output, place, self.schedule, cdf=self.cdf, **choices)
        x0_hat = reference.p_mean_log_variance(x_t, output, place, self.schedule, **choices)[2]
        return term, reference.regression(x0, x0_hat)

    def _call(self, x_t: Tensor, t: Tensor, kwargs: dict[str, Any]) -> Tensor:
        learned = self.variance in ("learned", "learned_range")
        with torch.inference_mode():  # the model alone: results are tensors without its limits
            return call_model(self.model, x_t, t.clone(), kwargs, 2 if learned else 1)


def _strata(num_steps: int, evaluated: int | None) -> list[_Stratum]:
    """t = 0, then ranges whose sizes grow with t in proportion where they can: the terms fall about
    as 1/t, and a range's share of the variance grows as (its size times its spread)²."""
    if evaluated is None or integer("num_timesteps", evaluated) == num_steps:
        return [_Stratum(0, num_steps, num_steps)]
    if not 3 <= evaluated < num_steps:
        raise ValueError(
            f"num_timesteps must lie in 3 … {num_steps}, or be {num_steps}; got {evaluated}"
        )
    strata, begin = [_Stratum(0, 1, 1)], 1
    for left in range((evaluated - 1) // 2, 0, -1):
        size = max(2, int(begin * ((num_steps / begin) ** (1 / left) - 1)))
        size = num_steps - begin if left == 1 else size
        strata.append(_Stratum(begin, size, 2))
        begin += size
    return [*strata[:-1], strata[-1]._replace(drawn=2 + (evaluated - 1) % 2)]


def _timesteps(
    stratum: _Stratum, number: int, seeds: Tensor, sample_ids: Tensor
) -> Iterator[int | Tensor]:
    """Those of a range that are evaluated, each for all samples or int64 [N]: without replacement,
    by the words of block ``number``."""
    begin, size, drawn = stratum
    if drawn == size:
        yield from range(begin, begin + size)
        return
    block = torch.full_like(sample_ids, number)
    draw = torch.full_like(sample_ids, TIMESTEPS_STREAM << 24)
    words = reference.noise_words(block, draw, seeds, sample_ids)
    before: list[Tensor] = []
    for i in range(drawn):
        chosen = words[i] * (size - i) >> 32  # among those that are left
        for other in torch.stack(before).sort(0).values if before else ():
            chosen = chosen + (chosen >= other)
        before.append(chosen)
        yield begin + chosen


def _batches(
    x0: Tensor | Iterable[Any], batch_size: int | None, kwargs: dict[str, Any]
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Each batch and what the model gets with it."""
    if isinstance(x0, Tensor):
        _check_batch(x0)
        size = batch_size or max(len(x0), 1)
        for begin in range(0, max(len(x0), 1), size):
            rows = slice(begin, begin + size)
            yield x0[rows], {k: _rows(v, len(x0), rows) for k, v in kwargs.items()}
        return
    if not isinstance(x0, Iterable) or isinstance(x0, (str, bytes, Mapping)):
        raise TypeError(f"x0 must be a tensor or an iterable of batches; got {type(x0).__name__}")
    if batch_size is not None:
        raise ValueError(
            "batch_size belongs to a tensor x0; an iterable's batches are as they come"
        )
    for batch in x0:
        labels = None
        if isinstance(batch, (tuple, list)):
            if len(batch) != 2:
                raise ValueError(
                    f"a batch of x0 must be images, or (images, labels); got {len(batch)} things"
                )
            batch, labels = batch
        _check_batch(batch)
        yield batch, kwargs if labels is None else {**kwargs, "class_labels": labels}


def _check_batch(x0: object) -> None:
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be tensors; got {type(x0).__name__}")
    if x0.dtype not in (*X0_DTYPES, torch.float64) or x0.dtype == torch.bfloat16:
        coarse = ", whose steps near ±1 are half a bin" if x0.dtype == torch.bfloat16 else ""
        raise TypeError(f"x0 must be float64, float32, float16 or uint8; got {x0.dtype}{coarse}")
    if x0.ndim < 2:
        raise ValueError(f"x0 must be [N, C, …]; got {list(x0.shape)}")


def _rows(value: Any, samples: int, rows: slice) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == samples:
        return value[rows]
    return value


def _num_batches(x0: Tensor | Iterable[Any], batch_size: int | None) -> int | None:
    if isinstance(x0, Tensor):
        return 1 if batch_size is None else -(-len(x0) // batch_size)
    return len(x0) if isinstance(x0, Sized) else None
