"""A session's samples in a folder: those that wait, run, and are finished and not collected.

JSON (kind "session") lists them in their order, with their arguments; tensors are beside it, each
once, however many samples share it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import MAX_INDEX, as_int, finite
from ..sample_state import check_same
from ..states import read_state, write_state
from .flight import Flyer

KIND = "session"


def save(
    folder: str | os.PathLike[str], description: Mapping[str, str], flyers: Sequence[Flyer]
) -> None:
    """Writes samples whose ``x`` is their state, on the CPU, where they have one.

    Args:
        description: of what draws them.

    Raises:
        TypeError: keyword arguments that JSON and tensors cannot hold.
        ValueError, OSError, InUseError, ImportError: as ``states.write_state``.
    """
    tensors = _Tensors()
    samples = []
    for flyer in flyers:
        samples.append(
            {
                "seed": flyer.seed,
                "sample_id": flyer.sample_id,
                "num_steps": flyer.num_steps,
                "row": flyer.row,
                "x": None if flyer.x is None else tensors.name(flyer.x),
                "guidance_scale": flyer.guidance_scale,
                "model_kwargs": _encoded(flyer.kwargs, "model_kwargs", tensors),
                "uncond_kwargs": _encoded(flyer.uncond_kwargs, "uncond_kwargs", tensors),
            }
        )
    write_state(folder, KIND, {"sampler": dict(description), "samples": samples}, tensors.by_name)


def load(
    folder: str | os.PathLike[str],
    description: Mapping[str, str],
    ends: Callable[[int | None], tuple[int, int]],
) -> list[Flyer]:
    """What :func:`save` wrote, for what draws the same. What shared a tensor then does so again.

    ends: how many steps the trajectory of so many has, first.

    Raises:
        FileNotFoundError: the folder holds no state.
        ValueError: a state of another sampler, named by what differs, or a damaged one.
        ImportError: safetensors is not installed.
    """
    found = read_state(folder, KIND)
    if found is None:
        raise FileNotFoundError(f"{os.fspath(folder)} holds no state of a session")
    saved, by_name = found
    if not isinstance(saved, dict) or not isinstance(saved.get("sampler"), dict):
        raise ValueError(f"{os.fspath(folder)} describes no sampler of a session")
    check_same(folder, saved["sampler"], description)
    tensors = _Placed(by_name)
    try:
        return [_flyer(sample, by_name, tensors, ends) for sample in saved["samples"]]
    # Its digest fits, so somebody has written it: there may be anything
    except (AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{os.fspath(folder)} describes no samples of a session: {reason}"
        ) from error


def _flyer(
    sample: Mapping[str, Any],
    by_name: Mapping[str, Tensor],
    tensors: _Placed,
    ends: Callable[[int | None], tuple[int, int]],
) -> Flyer:
    num_steps, scale = sample["num_steps"], sample["guidance_scale"]
    if num_steps is not None:
        num_steps = as_int("num_steps", num_steps, MAX_INDEX + 1)
    row = as_int("row", sample["row"], ends(num_steps)[0] + 1)
    if row and sample["x"] is None:
        raise ValueError(f"a sample at row {row} has no state")
    kwargs, uncond = (_decoded(sample[f"{kind}_kwargs"], tensors) for kind in ("model", "uncond"))
    if not isinstance(kwargs, dict) or not (uncond is None or isinstance(uncond, dict)):
        raise TypeError("keyword arguments are a dictionary")
    if (scale is None) != (uncond is None):
        raise ValueError("guidance takes a scale and arguments, both or neither")
    return Flyer(
        as_int("seed", sample["seed"], 1 << 64),
        as_int("sample_id", sample["sample_id"], 1 << 63),
        num_steps,
        kwargs,
        uncond,
        None if scale is None else finite("guidance_scale", scale),
        row,
        None if sample["x"] is None else by_name[sample["x"]],
    )


class _Tensors:
    """Names of tensors, one for each object: paths of keys may coincide, and many samples may share
    one."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def name(self, tensor: Tensor) -> str:
        name = self._names.get(id(tensor))
        if name is None:
            name = self._names[id(tensor)] = str(len(self.by_name))
            self.by_name[name] = tensor
        return name


class _Placed:
    """Tensors on their devices, one object for each name."""

    def __init__(self, by_name: Mapping[str, Tensor]) -> None:
        self._by_name = by_name
        self._placed: dict[str, Tensor] = {}

    def on(self, name: str, device: str) -> Tensor:
        if name not in self._placed:
            self._placed[name] = self._by_name[name].to(torch.device(device))
        return self._placed[name]


def _encoded(value: Any, where: str, tensors: _Tensors) -> Any:
    """As JSON has it."""
    if isinstance(value, Tensor):
        return {"tensor": tensors.name(value), "device": str(value.device)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {k: _encoded(v, f"{where}[{k!r}]", tensors) for k, v in value.items()}}
    if type(value) in (list, tuple):
        parts = [_encoded(part, f"{where}[{i}]", tensors) for i, part in enumerate(value)]
        return {type(value).__name__: parts}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise TypeError(
        f"a saved session holds tensors, numbers, strings and None, and lists, tuples and "
        f"dictionaries of them; {where} is a {type(value).__name__}"
    )


def _decoded(encoded: Mapping[str, Any], tensors: _Placed) -> Any:
    ((kind, value), *rest) = encoded.items()
    if kind == "tensor":
        return tensors.on(value, dict(rest)["device"])
    if kind == "dict":
        return {name: _decoded(part, tensors) for name, part in value.items()}
    if kind in ("list", "tuple"):
        parts = [_decoded(part, tensors) for part in value]
        return parts if kind == "list" else tuple(parts)
    return value
