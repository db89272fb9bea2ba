"""By what a saved state is known to be of the same sampler."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .fingerprints import model_texts, tensor_text, value_text

if TYPE_CHECKING:
    from .sampler import Sampler


def described(sampler: Sampler) -> dict[str, str]:
    """All of a sampler that its samples' bits depend on and that has a value, by name. Of functions
    it is only told whether there are any.

    Raises:
        TypeError: a model whose weights are not there.
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
        **model_texts(sampler.model),
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
    return str(float(value)) if isinstance(value, (int, float)) else value_text(value, "")


def _shown(values: Mapping[str, Any], name: str) -> str:
    """Of digests no more than what tells them apart."""
    if name not in values:
        return "absent"
    head, mark, rest = str(values[name]).rpartition("SHA-256 ")
    return f"{head}{mark}{rest[:12]}{rest[64:]}" if mark else rest
