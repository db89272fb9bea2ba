"""diffusers' DDPM and DDIM pipelines and schedulers. diffusers is imported where it is used.

``FastDDPMScheduler`` and ``FastDDIMScheduler`` can be had from here; they are made when they are
asked for.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...ops.checks import FLOAT_DTYPES
from ...schedule import NoiseSchedule, integer
from ..accelerated import accelerate_object
from ..noise import NoiseSource

if TYPE_CHECKING:
    from .schedulers import FastDDIMScheduler as FastDDIMScheduler
    from .schedulers import FastDDPMScheduler as FastDDPMScheduler

_VERSIONS = "0.40 to 0.42"
KNOWN = (
    f"diffusers' DDPMPipeline, DDIMPipeline, DDPMScheduler and DDIMScheduler (diffusers {_VERSIONS}"
    ", and later ones where these are the same)"
)
_PIPELINES = ("DDPMPipeline", "DDIMPipeline")
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
_CONFIG = (
    "num_train_timesteps beta_start beta_end beta_schedule trained_betas clip_sample "
    "prediction_type thresholding dynamic_thresholding_ratio clip_sample_range sample_max_value "
    "timestep_spacing steps_offset rescale_betas_zero_snr"
)
# What stands in for a method has to take what it takes: names of parameters, in order.
_SURFACE = {
    "DDPMScheduler": {
        "step": "self model_output timestep sample generator return_dict",
        "set_timesteps": "self num_inference_steps device timesteps",
        "add_noise": "self original_samples noise timesteps",
        "get_velocity": "self sample noise timesteps",
    },
    "DDIMScheduler": {
        "step": "self model_output timestep sample eta use_clipped_model_output generator "
        "variance_noise return_dict",
        "set_timesteps": "self num_inference_steps device",
        "add_noise": "self original_samples noise timesteps",
        "get_velocity": "self sample noise timesteps",
    },
}
_CONFIGS = {
    "DDPMScheduler": {*_CONFIG.split(), "variance_type"},
    "DDIMScheduler": {*_CONFIG.split(), "set_alpha_to_one"},
}


def __getattr__(name: str) -> Any:
    if name in ("FastDDPMScheduler", "FastDDIMScheduler"):
        from . import schedulers

        return getattr(schedulers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def recognises(pipeline: object) -> bool:
    """Whether it is one of diffusers' own or of a subclass."""
    return _is_one_of(pipeline, _PIPELINES + _SCHEDULERS)


def _is_one_of(instance: object, names: tuple[str, ...]) -> bool:
    return any(
        cls.__name__ in names and cls.__module__.partition(".")[0] == "diffusers"
        for cls in type(instance).__mro__
    )


def accelerate(
    pipeline: Any,
    noise: NoiseSource,
    *,
    memory_format: torch.memory_format | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Gives a pipeline the fast scheduler in place of its own, with its config, tables and
    timesteps; a scheduler itself becomes the fast one.

    Args:
        memory_format: of the pipeline's UNet from now on. It may pick other convolutions, whose
            results differ by rounding.
        dtype: of the pipeline's UNet and so of its images from now on. bfloat16 comes with a
            warning: it needs output_type="pt".

    Raises:
        TypeError: a scheduler of another class, a subclass included, since nothing is known of what
            it does; an option of the wrong type.
        RuntimeError: a version of diffusers whose schedulers take other arguments.
    """
    check_library()
    if not _is_one_of(pipeline, _PIPELINES):
        if memory_format is not None or dtype is not None:
            raise TypeError("memory_format and dtype belong to pipelines, and this is a scheduler")
        _check_scheduler(pipeline)
        return accelerate_object(pipeline, _mixin(), noise)
    old = pipeline.scheduler
    _check_scheduler(old)
    fast = old
    if not isinstance(old, _mixin()):
        fast = object.__new__(type(old))
        fast.__dict__.update(old.__dict__)
        accelerate_object(fast, _mixin(), noise)
    options = _unet_options(pipeline, memory_format, dtype)
    restore = _keep(pipeline.unet) if options else None
    try:
        if options:
            pipeline.unet.to(**options)
        if fast is not old:
            pipeline.scheduler = fast
    except BaseException:
        if restore is not None:
            restore()
        raise
    fast.noise_source = noise
    if dtype is torch.bfloat16:
        warnings.warn(
            "diffusers makes numpy arrays of the images, which have no bfloat16: call the pipeline "
            'with output_type="pt"',
            RuntimeWarning,
            stacklevel=3,
        )
    return pipeline


def _mixin() -> Any:
    from .schedulers import FastScheduler

    return FastScheduler


def _check_scheduler(scheduler: Any) -> None:
    import diffusers

    stock = tuple(getattr(diffusers, name) for name in _SCHEDULERS)
    if type(scheduler) not in stock and not isinstance(scheduler, _mixin()):
        cls = type(scheduler)
        why = ", a subclass, whose steps may be its own" if isinstance(scheduler, stock) else ""
        raise TypeError(
            f"the scheduler is a {cls.__module__}.{cls.__qualname__}{why}; ddpm_fast knows "
            "diffusers' DDPMScheduler and DDIMScheduler"
        )


@functools.cache
def check_library() -> None:
    """Raises RuntimeError where diffusers is of a version that ddpm_fast does not know."""
    import diffusers

    version = diffusers.__version__
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    problem = "" if numbers >= (0, 40) else "it is too old"
    for name in _SCHEDULERS:
        problem = problem or _difference(getattr(diffusers, name), name)
    if problem:
        raise RuntimeError(
            f"ddpm_fast does not know diffusers {version}: {problem}; it knows {_VERSIONS}"
        )


def _difference(cls: Any, name: str) -> str:
    for method, expected in _SURFACE[name].items():
        found = " ".join(inspect.signature(getattr(cls, method)).parameters)
        if found != expected:
            return f"{name}.{method} takes ({found.replace(' ', ', ')})"
    keys = set(inspect.signature(cls.__init__).parameters) - {"self"}
    if keys != _CONFIGS[name]:
        return f"{name}'s config differs in {', '.join(sorted(keys ^ _CONFIGS[name]))}"
    return ""


def _unet_options(
    pipeline: Any, memory_format: torch.memory_format | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if memory_format is not None:
        if memory_format not in (torch.contiguous_format, torch.channels_last):
            raise TypeError(
                "memory_format must be torch.channels_last or torch.contiguous_format; got "
                f"{memory_format!r}"
            )
        options["memory_format"] = memory_format
    if dtype is not None:
        if dtype not in (*FLOAT_DTYPES, torch.float64):
            raise TypeError(
                f"dtype must be float32, bfloat16, float16 or float64 of torch; got {dtype!r}"
            )
        options["dtype"] = dtype
    unet = getattr(pipeline, "unet", None)
    if options and not isinstance(unet, nn.Module):
        raise TypeError(f"the pipeline's unet must be a module; got {type(unet).__name__}")
    return options


def _keep(module: nn.Module) -> Any:
    """A function that gives a module back the tensors that it has now."""
    parameters = [(p, p.data) for p in module.parameters()]
    buffers = [(m._buffers, dict(m._buffers)) for m in module.modules()]

    def restore() -> None:
        for parameter, data in parameters:
            parameter.data = data
        for holder, kept in buffers:
            holder.update(kept)

    return restore


def sampler_arguments(pipeline: Any, model: Any, num_steps: int | None) -> dict[str, Any]:
    """What Sampler takes to draw as the pipeline does: its UNet, schedule, timesteps and method.

    Raises:
        TypeError: a scheduler that ``accelerate`` does not know; a scheduler without a model.
        ValueError: a variance that Sampler does not have; no steps; a model without its weights.
    """
    check_library()
    scheduler = pipeline
    device = None
    if _is_one_of(pipeline, _PIPELINES):
        scheduler = pipeline.scheduler
        if model is None:
            model = pipeline.unet
            device = _device_elsewhere(pipeline, model)
    _check_scheduler(scheduler)
    if model is None:
        raise TypeError("a scheduler holds no model: give model")
    if isinstance(model, nn.Module) and any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "the model's parameters are on meta, as sequential offloading leaves them: load the "
            "pipeline without it"
        )
    if num_steps is not None:
        most = scheduler.config.num_train_timesteps
        if not 1 <= integer("num_steps", num_steps) <= most:
            raise ValueError(f"num_steps must lie in 1 … {most}; got {num_steps}")
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(num_steps)
    config = scheduler.config
    betas: Tensor = scheduler.betas
    arguments = {
        "model": model,
        "schedule": NoiseSchedule(betas.detach().to("cpu", torch.float64)),
        "prediction": config.prediction_type,
        # Rounding adds a −1 to some lists of trailing spacing, past the steps asked for.
        "timesteps": [int(t) for t in scheduler.timesteps.tolist() if t != -1],
        "clip": None,
    }
    if device is not None:
        arguments["device"] = device
    if _is_one_of(scheduler, ("DDIMScheduler",)):
        arguments |= {"method": "ddim", "eps_source": "model"}
    else:
        arguments |= {"method": "ddpm", "variance": _variance(config.variance_type)}
    if config.thresholding:
        # Its s is bounded above too, so this is not Sampler's dynamic_threshold.
        arguments["denoised_fn"] = scheduler._threshold_sample
    elif config.clip_sample:
        arguments["clip"] = (-config.clip_sample_range, config.clip_sample_range)
    return arguments


def _device_elsewhere(pipeline: Any, model: Any) -> torch.device | None:
    """Where an offloaded pipeline computes, if its model does not wait there."""
    device = getattr(pipeline, "_execution_device", None)
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if device is None or parameter is None:
        return None
    device = torch.device(device)
    same = parameter.device.type == device.type
    return None if same and device.index in (None, parameter.device.index) else device


def _variance(kind: str) -> str:
    if kind in ("fixed_small", "fixed_large", "learned_range"):
        return kind
    if kind == "fixed_small_log":
        return "fixed_small"  # the same, by way of its logarithm
    why = {
        "learned": ": there the model's second half is σ², here log σ²",
        "fixed_large_log": ": its noise is NaN, the root of a logarithm",
    }
    raise ValueError(
        f"Sampler has no variance_type={kind!r}{why.get(kind, '')}; it has fixed_small, "
        "fixed_small_log, fixed_large and learned_range"
    )
