"""OpenAI's GaussianDiffusion and SpacedDiffusion, which many projects have a copy of.

Nothing is imported of theirs: an object is known by the names and the attributes of its class.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...schedule import NoiseSchedule
from ..accelerated import accelerate_object
from ..noise import NoiseSource
from .calls import PASSED_OVER, STOCK_NAMES, Choices, model_timesteps, stock_method
from .losses import FastLosses
from .sampling import FastSampling
from .tables import Tables

KNOWN = "improved-diffusion's and guided-diffusion's GaussianDiffusion and SpacedDiffusion"

# What is replaced, with the arguments that come before those of Choices.
_REPLACED = {
    "p_sample": ("model", "x", "t"),
    "p_sample_loop": ("model", "shape"),
    "p_sample_loop_progressive": ("model", "shape"),
    "ddim_sample": ("model", "x", "t"),
    "ddim_sample_loop": ("model", "shape"),
    "ddim_sample_loop_progressive": ("model", "shape"),
    "ddim_reverse_sample": ("model", "x", "t"),
    "q_sample": ("x_start", "t"),
    "training_losses": ("model", "x_start", "t"),
    "calc_bpd_loop": ("model", "x_start"),
}


class FastDiffusion(FastSampling, FastLosses):
    """What an accelerated object is, before its stock class."""


def recognises(pipeline: object) -> bool:
    return (
        any(cls.__name__ == STOCK_NAMES[0] for cls in type(pipeline).__mro__)
        and isinstance(getattr(pipeline, "betas", None), np.ndarray)
        and all(hasattr(pipeline, f"model_{name}_type") for name in ("mean", "var"))
        and hasattr(pipeline, "loss_type")
    )


def accelerate(diffusion: Any, noise: NoiseSource) -> Any:
    """The object itself, of a subclass of its class from now on: see FastDiffusion.

    Raises:
        TypeError: a subclass that overrides what would be replaced, or a member of an enumeration
            that OpenAI's code does not have.
        RuntimeError: a copy of the code whose methods take other arguments, or compute otherwise.
    """
    if isinstance(diffusion, FastDiffusion):
        diffusion._tables_kept = Tables(diffusion)  # anew: arrays may have been written to
        vars(diffusion).pop("_told", None)
        return accelerate_object(diffusion, FastDiffusion, noise)
    _check_class(diffusion)
    tables = Tables(diffusion)
    trial = accelerate_object(copy.copy(diffusion), FastDiffusion, NoiseSource("torch"))
    trial._tables_kept, trial._is_quiet = tables, True
    _check_results(diffusion, trial)
    accelerate_object(diffusion, FastDiffusion, noise)
    diffusion._tables_kept = tables
    return diffusion


def sampler_arguments(diffusion: Any, model: Any, num_steps: int | None) -> dict[str, Any]:
    """What Sampler takes for this object's samples. ``num_steps`` is Sampler's own choice among the
    timesteps that the object has."""
    if not isinstance(diffusion, FastDiffusion):
        _check_class(diffusion)
    tables = Tables(diffusion)
    if tables.prediction is None:
        raise ValueError(
            "this diffusion's model predicts x_{t-1} (PREVIOUS_X), for which Sampler has no "
            "equivalent: accelerate(diffusion).p_sample_loop() has"
        )
    if model is None:
        raise TypeError(f"{type(diffusion).__name__} holds no model: give model=")
    return {
        "model": model,
        "schedule": NoiseSchedule(diffusion.betas),
        "prediction": tables.prediction,
        "variance": tables.variance,
        "model_timesteps": model_timesteps(diffusion),
        "num_steps": num_steps,
        "clip": (-1.0, 1.0),
    }


def _check_class(diffusion: Any) -> None:
    """Raises TypeError for methods of the user's own, RuntimeError for another copy of the code."""
    cls = type(diffusion)
    name = f"{cls.__module__}.{cls.__qualname__}"
    own = [
        method
        for method in (*_REPLACED, *PASSED_OVER)
        if method in vars(diffusion)
        or any(method in vars(c) and c.__name__ not in STOCK_NAMES for c in cls.__mro__)
    ]
    if own:
        raise TypeError(
            f"{name} has its own {', '.join(own)}, which acceleration would pass over; ddpm_fast "
            f"knows {KNOWN}, and subclasses that leave these methods as they are"
        )
    problems = []
    for method, first in _REPLACED.items():
        function = stock_method(cls, method)
        if function is None:
            problems.append(f"no {method}")
            continue
        found = list(inspect.signature(function).parameters)[1:]
        if tuple(found[: len(first)]) != first or set(found[len(first) :]) - set(Choices._fields):
            problems.append(f"{method}({', '.join(found)})")
    if problems:
        raise RuntimeError(
            f"ddpm_fast does not know this version of {name}, which has {'; '.join(problems)}; it "
            f"knows {KNOWN}"
        )


def _check_results(stock: Any, trial: Any) -> None:
    """Tries both on two pixels. Copies of the code have changes that no name tells.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    last = len(stock.betas) - 1
    t = torch.tensor([0, min(1, last), (last + 1) // 2, last], device="cpu")
    x = torch.tensor([0.3, -0.8, 0.6, -0.2], device="cpu").reshape(4, 1, 1).repeat(1, 1, 2)

    def model(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return torch.cat([0.9 * x, 0.1 - 0.5 * x], 1)[:, : trial._tables.halves * x.shape[1]]

    calls: dict[str, Any] = {
        "p_sample": lambda d: d.p_sample(model, x, t),
        "ddim_sample": lambda d: d.ddim_sample(model, x, t, eta=0.5),
        "ddim_reverse_sample": lambda d: d.ddim_reverse_sample(model, x, t),
        # Without t = 0, where float32 loses the digits of a decoder that is far off.
        "training_losses": lambda d: d.training_losses(model, x[1:], t[1:]),
    }
    state = torch.get_rng_state()
    try:
        for name, call in calls.items():
            _compare(f"{type(stock).__module__}'s {name}", call, stock, trial)
    finally:
        torch.set_rng_state(state)


def _compare(what: str, call: Any, stock: Any, trial: Any) -> None:
    results = []
    for diffusion in (stock, trial):
        torch.default_generator.manual_seed(0)
        try:
            with torch.no_grad():
                results.append(call(diffusion))
        except Exception as error:
            raise RuntimeError(f"{what} fails on two pixels: {error}") from error
    expected, found = results
    for key, values in expected.items():
        finite = values.isfinite()  # not so where ᾱ is 0
        if key not in found or not torch.allclose(
            found[key][finite], values[finite], rtol=1e-2, atol=1e-3
        ):
            raise RuntimeError(
                f"{what} does not compute what OpenAI's does ({key!r} differs); ddpm_fast knows "
                f"{KNOWN}"
            )
