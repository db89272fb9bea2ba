"""By what a saved state is known to be of the same sampler."""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .backends import select
from .engine import Trajectory
from .fingerprints import model_texts, modules_texts, tensor_text, value_text
from .stepping import backend_of

if TYPE_CHECKING:
    from .sampler import Sampler


def described(sampler: Sampler) -> dict[str, str]:
    """All of a sampler that its samples' bits depend on and that has a value, by name; but for
    where and how its model is computed, which :func:`arithmetic` tells. Of functions it is told
    whether there are any, and which modules they hold.

    Raises:
        TypeError: a model whose weights are not there.
        ReferenceError: a plan whose model is gone.
    """
    table, clip = sampler.table, sampler.clip
    t = table.timesteps
    return {
        "prediction": table.prediction,
        "variance": table.variance,
        "method": table.method,
        "eta": str(float(sampler._trajectory["eta"])),
        "eps_source": sampler._trajectory["eps_source"],
        "spacing": sampler._trajectory["spacing"],
        "the schedule's betas": tensor_text(sampler.schedule.betas, "betas"),
        "the timesteps": f"{int(t[0])} … {int(t[-1])}, {tensor_text(t, 'timesteps')}",
        "the steps' coefficients": tensor_text(table.rows, "rows"),
        "clip": "None" if clip is None else str((float(clip[0]), float(clip[1]))),
        "dynamic_threshold": _number(sampler.dynamic_threshold),
        "guidance_scale": _number(sampler.guidance_scale),
        "denoised_fn": "None" if sampler.denoised_fn is None else "a function",
        "model_timesteps": value_text(sampler.model_timesteps, "model_timesteps"),
        **modules_texts(sampler.denoised_fn, "denoised_fn"),
        **model_texts(sampler.model),
    }


def arithmetic(
    sampler: Sampler,
    device: torch.device,
    low_precision: torch.dtype | None,
    plan: Trajectory | None,
) -> dict[str, str]:
    """What rounds the states, by name. Of the backend and autocast it is those of who asks: to be
    called where the steps are taken.

    Args:
        device: of the states.
        low_precision: the model's input dtype where it is not float32.
        plan: of the model, if one computes it.
    """
    with backend_of(sampler):
        backend = select(device)
    return {
        "the model's dtype": str(low_precision or torch.float32),
        "the plan": _plan(plan),
        "the device": device.type,
        "the backend": backend,
        "autocast": _autocast(device.type),
    }


def check_same(
    folder: str | os.PathLike[str], there: Mapping[str, Any], here: Mapping[str, Any]
) -> None:
    """That a state is of what is to go on from it.

    Raises:
        ValueError: it is of something else; in what they differ.
    """
    differences = [
        f"{name}: {_shown(there, name)} there, {_shown(here, name)} here"
        for name in {**here, **there}
        if name not in there or name not in here or there[name] != here[name]
    ]
    if differences:
        raise ValueError(
            f"{Path(folder)} holds the state of something else: {'; '.join(differences)}; take "
            "another folder, or remove this one"
        )


def _number(value: Any) -> str:
    return str(float(value)) if isinstance(value, numbers.Real) else value_text(value, "")


def _plan(plan: Trajectory | None) -> str:
    if plan is None:
        return "none"
    prepared = plan._prepared
    return f"{', '.join(sorted(prepared.rewrites)) or 'no rewrites'} in {prepared.dtype}"


def _autocast(device: str) -> str:
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return "off"
    return str(torch.get_autocast_dtype(device))


def _shown(values: Mapping[str, Any], name: str) -> str:
    """Of digests no more than what tells them apart."""
    if name not in values:
        return "absent"
    head, mark, rest = str(values[name]).rpartition("SHA-256 ")
    return f"{head}{mark}{rest[:12]}{rest[64:]}" if mark else rest
