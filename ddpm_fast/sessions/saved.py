"""A session's samples in a folder: those that wait, run, and are finished and not collected.

JSON (kind "session") lists them in their order, with their arguments; tensors are beside it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..sample_state import check_same, described
from ..states import read_state, write_state
from .flight import Flight, Flyer

KIND = "session"


def save(folder: str | os.PathLike[str], flight: Flight, flyers: Sequence[Flyer]) -> None:
    """Writes samples whose ``x`` is their state, on the CPU, where they have one.

    Raises:
        TypeError: keyword arguments that JSON and tensors cannot hold.
        ValueError, OSError, InUseError, ImportError: as ``states.write_state``.
    """
    tensors: dict[str, Tensor] = {}
    samples = []
    for i, flyer in enumerate(flyers):
        if flyer.x is not None:
            tensors[f"{i}.x"] = flyer.x
        samples.append(
            {
                "seed": flyer.seed,
                "sample_id": flyer.sample_id,
                "num_steps": flyer.num_steps,
                "row": flyer.row,
                "guidance_scale": flyer.guidance_scale,
                "model_kwargs": _encoded(flyer.kwargs, f"{i}.model_kwargs", tensors),
                "uncond_kwargs": _encoded(flyer.uncond_kwargs, f"{i}.uncond_kwargs", tensors),
            }
        )
    write_state(folder, KIND, {"sampler": _known_by(flight), "samples": samples}, tensors)


def load(folder: str | os.PathLike[str], flight: Flight) -> list[Flyer]:
    """What :func:`save` wrote, for a flight that draws the same in the same arithmetic.

    Raises:
        FileNotFoundError: the folder holds no state.
        ValueError: a state of another sampler, named by what differs, or a damaged one.
        ImportError: safetensors is not installed.
    """
    found = read_state(folder, KIND)
    if found is None:
        raise FileNotFoundError(f"{os.fspath(folder)} holds no state of a session")
    description, tensors = found
    check_same(folder, description["sampler"], _known_by(flight))
    flyers = []
    for i, sample in enumerate(description["samples"]):
        flyers.append(
            Flyer(
                sample["seed"],
                sample["sample_id"],
                sample["num_steps"],
                _decoded(sample["model_kwargs"], tensors),
                _decoded(sample["uncond_kwargs"], tensors),
                sample["guidance_scale"],
                sample["row"],
                tensors.get(f"{i}.x"),
            )
        )
    return flyers


def _known_by(flight: Flight) -> dict[str, str]:
    shape = {"shape": str(flight.shape)}
    return {**shape, **described(flight.sampler), **flight.lanes.arithmetic}


def _encoded(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """As JSON has it; tensors go into ``tensors``."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name, "device": str(value.device)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {k: _encoded(v, f"{name}.{k}", tensors) for k, v in value.items()}}
    if type(value) in (list, tuple):
        parts = [_encoded(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]
        return {type(value).__name__: parts}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise TypeError(
        f"a saved session holds tensors, numbers, strings and None, and lists, tuples and "
        f"dictionaries of them; {name.partition('.')[2]} is a {type(value).__name__}"
    )


def _decoded(encoded: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, value), *rest) = encoded.items()
    if kind == "tensor":
        return tensors[value].to(dict(rest)["device"])
    if kind == "dict":
        return {name: _decoded(part, tensors) for name, part in value.items()}
    if kind in ("list", "tuple"):
        parts = [_decoded(part, tensors) for part in value]
        return parts if kind == "list" else tuple(parts)
    return value
