"""lucidrains' denoising-diffusion-pytorch: its GaussianDiffusion on the fused kernels."""

from __future__ import annotations

import inspect
from importlib import metadata
from typing import Any

from torch import nn

from ...schedule import NoiseSchedule, integer
from ..accelerated import accelerate_object
from ..noise import NoiseSource
from .diffusion import FastDiffusion
from .tables import BUFFERS, PREDICTIONS, Tables, ddim_times

KNOWN = "denoising-diffusion-pytorch's GaussianDiffusion (2.3)"

_PACKAGE = "denoising_diffusion_pytorch"
# What is replaced, and what the replacements stand for or call, with their parameters.
_METHODS = {
    "p_sample": ("x", "t", "x_self_cond"),
    "p_sample_loop": ("shape", "return_all_timesteps"),
    "ddim_sample": ("shape", "return_all_timesteps"),
    "interpolate": ("x1", "x2", "t", "lam"),
    "q_sample": ("x_start", "t", "noise"),
    "p_losses": ("x_start", "t", "noise", "offset_noise_strength", "loss_reduction"),
    "p_mean_variance": ("x", "t", "x_self_cond", "clip_denoised"),
    "q_posterior": ("x_start", "x_t", "t"),
    "model_predictions": ("x", "t", "x_self_cond", "clip_x_start", "rederive_pred_noise"),
    "predict_start_from_noise": ("x_t", "t", "noise"),
    "predict_noise_from_start": ("x_t", "t", "x0"),
    "predict_start_from_v": ("x_t", "t", "v"),
    "predict_v": ("x_start", "t", "noise"),
}
_CALLED = {"noise_assignment": ("x_start", "noise")}
_ATTRIBUTES = (
    *BUFFERS,
    "loss_weight",
    "model",
    "num_timesteps",
    "sampling_timesteps",
    "is_ddim_sampling",
    "ddim_sampling_eta",
    "objective",
    "self_condition",
    "offset_noise_strength",
    "immiscible",
    "unnormalize",
)


def recognises(pipeline: object) -> bool:
    """Any model or diffusion of the package; ``accelerate`` says which it serves."""
    return isinstance(pipeline, nn.Module) and any(
        cls.__module__.partition(".")[0] == _PACKAGE for cls in type(pipeline).__mro__
    )


def accelerate(diffusion: Any, noise: NoiseSource) -> Any:
    """The object itself, of a subclass of its class from now on: see FastDiffusion. Tables that
    it has had are made anew.

    Raises:
        TypeError: another class, or one that overrides what would be replaced.
        RuntimeError: a version whose methods or attributes are others.
    """
    _check(diffusion)
    accelerate_object(diffusion, FastDiffusion, noise)
    if "_tables" not in diffusion.__dict__:
        diffusion._tables = Tables()
    diffusion._tables.drop()
    return diffusion


def sampler_arguments(diffusion: Any, model: Any, num_steps: int | None) -> dict[str, Any]:
    """What Sampler takes for this object's samples, in [-1, 1] where it normalises by itself.

    Fewer ``num_steps`` than it was trained with are DDIM's, as in ``GaussianDiffusion`` itself.
    """
    _check(diffusion)
    if diffusion.self_condition:
        raise ValueError(
            "this GaussianDiffusion's model is conditioned on its own last x_start "
            "(self_condition=True), which Sampler does not do: accelerate(diffusion).sample() does"
        )
    total = diffusion.num_timesteps
    is_ddim = diffusion.is_ddim_sampling
    if num_steps is None:
        num_steps = diffusion.sampling_timesteps
    else:
        if not 1 <= integer("num_steps", num_steps) <= total:
            raise ValueError(f"num_steps must lie in 1 … {total}; got {num_steps}")
        is_ddim = num_steps < total
    arguments = {
        "model": diffusion.model if model is None else model,
        "schedule": NoiseSchedule(diffusion.betas),
        "prediction": PREDICTIONS[diffusion.objective],
        "variance": "fixed_small",
        "clip": (-1.0, 1.0),
    }
    if is_ddim:
        arguments["method"] = "ddim"
        arguments["eta"] = diffusion.ddim_sampling_eta
        arguments["timesteps"] = ddim_times(total, num_steps)
    return arguments


def _check(diffusion: Any) -> None:
    """Raises TypeError or RuntimeError unless it is the class and version that is replaced."""
    cls = vars(type(diffusion)).get("stock", type(diffusion))  # of an accelerated object
    home = f"{_PACKAGE}.{_PACKAGE}"
    stock = next(
        (c for c in cls.__mro__ if c.__module__ == home and c.__name__ == "GaussianDiffusion"), None
    )
    name = f"{cls.__module__}.{cls.__qualname__}"
    if stock is None:
        raise TypeError(f"ddpm_fast does not know {name}; it knows {KNOWN}")
    replaced = [
        method
        for method in _METHODS
        if method in diffusion.__dict__
        or getattr(cls, method, None) is not getattr(stock, method, None)
    ]
    if replaced:
        raise TypeError(
            f"{name} has its own {', '.join(replaced)}, which acceleration would replace; "
            f"ddpm_fast knows {KNOWN}, and subclasses that leave these methods as they are"
        )
    problems = [
        f"{method}({', '.join(found or ())})"
        for method, parameters in {**_METHODS, **_CALLED}.items()
        if (found := _parameters(stock, method)) != parameters
    ]
    problems += [
        f"no {attribute}" for attribute in _ATTRIBUTES if not hasattr(diffusion, attribute)
    ]
    if not problems and diffusion.objective not in PREDICTIONS:
        problems = [f"objective {diffusion.objective!r}"]
    if problems:
        raise RuntimeError(
            f"ddpm_fast does not know this version of denoising-diffusion-pytorch{_version()}: its "
            f"GaussianDiffusion has {'; '.join(problems)}; it knows {KNOWN}"
        )


def _parameters(stock: type, method: str) -> tuple[str, ...] | None:
    function = getattr(stock, method, None)
    if function is None:
        return None
    return tuple(inspect.signature(function).parameters)[1:]


def _version() -> str:
    try:
        return f" ({metadata.version('denoising-diffusion-pytorch')})"
    except metadata.PackageNotFoundError:
        return ""
