"""Weights under other names: where each tensor of a UNet stands, and how it is laid out there."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checkpoint

if TYPE_CHECKING:
    from .config import UNetConfig
    from .unet import UNet


@dataclass(frozen=True)
class Place:
    """Where a tensor stands.

    Attributes:
        names: theirs; several are stacked along the first dimension.
        ones: trailing dimensions of size 1, of a convolution that we have as a linear map.
        heads: if not 0, the rows of q, k and v are there head by head: [heads, 3, C/heads] in
            place of our [3, heads, C/heads].
    """

    names: tuple[str, ...]
    ones: int = 0
    heads: int = 0


def build(
    cls: type[UNet],
    config: UNetConfig,
    place: Callable[[str], Place],
    tensors: Mapping[str, Tensor],
    source: object,
    share: bool = False,
) -> UNet:
    """A UNet in eval mode with a copy of ``tensors``, on their device; ``place`` says where each of
    its own stands among them. With ``share`` they are no copy, but where several become one.

    Raises:
        ValueError: tensors that are missing, unknown or of another shape, in their names; names
            that all begin with something that is none of theirs.
    """
    from .unet import UNet

    model = checkpoint.skeleton(cls if share else UNet, config, source)
    places = {name: place(name) for name in model.state_dict()}
    shapes = {}
    for name, tensor in model.state_dict().items():
        theirs = places[name]
        rows = tensor.shape[0] // len(theirs.names)
        shape = torch.Size((rows, *tensor.shape[1:], *(1,) * theirs.ones))
        shapes.update(dict.fromkeys(theirs.names, shape))
    tensors = _unwrapped(source, tensors, shapes)
    checkpoint.check(source, tensors, shapes)
    ours = {name: _ours(theirs, tensors) for name, theirs in places.items()}
    if share:
        model.load_state_dict(ours, assign=True)
        return model.eval()
    device = next(iter(tensors.values())).device
    return checkpoint.build(cls, config, ours, source, device).eval()


def _unwrapped(
    source: object, tensors: Mapping[str, Tensor], known: Mapping[str, Any]
) -> Mapping[str, Tensor]:
    """Under the names of the network itself, where DistributedDataParallel's "module." is before
    each of them."""
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    prefix = os.path.commonprefix(list(tensors))  # noqa: RUF071 - of characters
    if prefix and any(name.removeprefix(prefix) in known for name in tensors):
        raise ValueError(
            f"{source} does not fit its config: all its names begin with {prefix!r}; give them "
            "without it"
        )
    return tensors


def _ours(place: Place, tensors: Mapping[str, Tensor]) -> Tensor:
    parts = [tensors[name] for name in place.names]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    tensor = tensor.reshape(tensor.shape[: tensor.ndim - place.ones])
    if place.heads:
        tensor = tensor.unflatten(0, (place.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return tensor


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of ``torch.save``, read without running what else is in it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such file, or holds other things than a dictionary of tensors.
    """
    with open(path, "rb") as file:
        try:
            found: Any = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is no whole file of tensors: it was cut short, or holds other objects, "
                "which are not loaded, since they could run code"
            ) from error
        except Exception as error:  # torch's reader of pickles has every kind of them
            reason = str(error).split("\n", 1)[0] or type(error).__name__
            raise ValueError(f"{path} is not a whole file of torch.save: {reason}") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} holds no state dict, but {type(found).__name__}")
    return tensors_of(path, found)


def tensors_of(source: object, found: Mapping[Any, Any]) -> dict[str, Tensor]:
    """A state dict, alone or as the "state_dict" of what else has no tensors.

    Raises:
        ValueError: names or tensors that are none; other entries that hold some.
    """
    holders = [name for name, value in found.items() if _holds_tensors(value)]
    if holders and not any(isinstance(value, Tensor) for value in found.values()):
        if len(holders) > 1:
            where = " and in ".join(map(repr, holders))
            raise ValueError(f"{source} has tensors in {where}: give the one state dict alone")
        if holders != ["state_dict"]:
            raise ValueError(f"{source} has its tensors in {holders[0]!r}: give that alone")
        if isinstance(found["state_dict"], Mapping):
            return tensors_of(source, found["state_dict"])
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{source} is no state dict of a model: {name!r} is of type {type(tensor).__name__}"
            )
    return dict(found)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return isinstance(value, Tensor)
    return any(map(_holds_tensors, value))
