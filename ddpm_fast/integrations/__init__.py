"""Pipelines of other libraries on ddpm_fast's kernels: :func:`accelerate`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from .noise import NoiseSource, Source

_Pipeline = TypeVar("_Pipeline")
# Each has KNOWN, recognises, accelerate and sampler_arguments, and imports its library where it
# has met one of its objects.
_MODULES = ("diffusers", "lucidrains", "openai")


def accelerate(
    pipeline: _Pipeline,
    *,
    noise: Source = "addressed",
    seed: int | None = None,
    sample_ids: Tensor | Sequence[int] | None = None,
    **options: Any,
) -> _Pipeline:
    """The same pipeline, faster: its sampling, its losses and its bound on fused kernels.

    The pipeline is changed in place and returned. It computes what it computed, to rounding; where
    it draws noise for itself, ``noise`` says which. docs/pipelines.md says what is replaced. Where
    an error is raised, the pipeline is as it was.

    Args:
        pipeline: diffusers' DDPMPipeline or DDIMPipeline; lucidrains' GaussianDiffusion; OpenAI's
            GaussianDiffusion or SpacedDiffusion.
        noise: "addressed": drawn in the kernels, a function of (seed, sample id, draw, element).
            "torch": torch's numbers in the stock order, the same as before for the same
            ``torch.manual_seed``. A generator that is passed to a diffusers pipeline is drawn from
            in any case.
        seed: of the addressed noise, in [0, 2^64); a new one from torch's default generator for
            every trajectory and training step if None.
        sample_ids: of the samples of a batch; 0 … N−1 if None.
        options: ``memory_format`` and ``dtype`` of a diffusers pipeline's UNet, since both change
            results: None leaves them.

    Returns:
        ``pipeline`` itself.

    Raises:
        TypeError: a pipeline, an option or a class that it does not know.
        ValueError: an argument out of its range.
        RuntimeError: a version of the library that it does not know.
    """
    source = NoiseSource(noise, seed, sample_ids)
    accelerated: _Pipeline = _module_of(pipeline).accelerate(pipeline, source, **options)
    return accelerated


def sampler_arguments(pipeline: Any, model: Any, num_steps: int | None) -> dict[str, Any]:
    """What ``Sampler`` takes to draw from a pipeline, by name."""
    arguments: dict[str, Any] = _module_of(pipeline).sampler_arguments(pipeline, model, num_steps)
    return arguments


def _module_of(pipeline: object) -> Any:
    modules = [importlib.import_module(f"{__name__}.{name}") for name in _MODULES]
    for module in modules:
        if module.recognises(pipeline):
            return module
    cls = type(pipeline)
    raise TypeError(
        f"ddpm_fast does not know {cls.__module__}.{cls.__qualname__}; it knows "
        + "; ".join(module.KNOWN for module in modules)
    )
