"""What a model was when its plan was prepared, so that changes are noticed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_module

from .inspection import FREE_U, HOOKS

_SAMPLES = 32  # elements of a tensor whose values are kept, about
_Place = tuple[int, int, int]


class Snapshot:
    """What a model was when it was inspected. It holds no module, and no tensor once
    :meth:`forget` was called; of the tensors' memory it holds nothing."""

    def __init__(self, model: nn.Module) -> None:
        self._states: list[dict[str, Any]] = []
        self._children: list[tuple[nn.Module, ...]] = []
        self._classes: list[tuple[type, ...]] = []
        self._tensors: list[tuple[Tensor | None, ...]] = []
        self._places: list[_Place] = []
        self._storages: list[StorageWeakRef] = []  # while there is one, no other takes its place
        self._options: list[tuple[dict[str, Any], str, object]] = []
        for module in model.modules():
            state = module.__dict__
            children = tuple(state["_modules"].values())
            self._states.append(state)
            self._children.append(children)
            self._classes.append(tuple(map(type, children)))
            tensors = _tensors_of(state)
            self._tensors.append(tensors)
            for tensor in tensors:
                if tensor is not None:
                    self._storages.append(StorageWeakRef(tensor.untyped_storage()))
                    self._places.append(_place(tensor))
            # diffusers' attention keeps what computes it, and FreeU is set on blocks of layers
            names: tuple[str, ...] = FREE_U if "resnets" in state["_modules"] else ()
            names = (*names, "processor") if "processor" in state else names
            self._options += [(state, name, state.get(name)) for name in names]
        self._values = self._fingerprint()

    def is_of(self, model: nn.Module) -> bool:
        """Whether nothing was changed that could change what the model computes, as far as that
        can be seen without a look at values."""
        if any(getattr(torch_module, f"_global{names}", None) for names in HOOKS):
            return False
        places = iter(self._places)
        for state, children, classes, tensors in zip(
            self._states, self._children, self._classes, self._tensors, strict=True
        ):
            if (
                state["training"]
                or state["_forward_pre_hooks"]
                or state["_forward_hooks"]
                or state["_backward_pre_hooks"]
                or state["_backward_hooks"]
                or "forward" in state
                or tuple(state["_modules"].values()) != children
                or tuple(map(type, children)) != classes
            ):
                return False
            found = _tensors_of(state)
            if len(found) != len(tensors):
                return False
            for tensor, before in zip(found, tensors, strict=True):
                if tensor is not before:
                    return False
                if tensor is not None and _place(tensor) != next(places):
                    return False
        return all(state.get(name) is value for state, name, value in self._options)

    def has_values(self) -> bool:
        """Whether some elements of each tensor, spread over it, have the bits that they had. It
        waits for the device."""
        found = self._fingerprint()
        return len(found) == len(self._values) and all(
            key in found and torch.equal(found[key], values) for key, values in self._values.items()
        )

    def forget(self) -> None:
        for kept in (self._states, self._children, self._classes, self._tensors, self._options):
            kept.clear()
        self._places.clear()
        self._storages.clear()
        self._values.clear()

    @torch.no_grad()
    def _fingerprint(self) -> dict[tuple[torch.dtype, torch.device], Tensor]:
        """The bits of some elements of all tensors, by dtype and device."""
        parts: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensors in self._tensors:
            for tensor in tensors:
                if tensor is not None:
                    parts.setdefault((tensor.dtype, tensor.device), []).append(_spread(tensor))
        return {key: torch.cat(part).view(torch.uint8) for key, part in parts.items()}


def _tensors_of(state: dict[str, Any]) -> tuple[Tensor | None, ...]:
    return (*state["_parameters"].values(), *state["_buffers"].values())


def _place(tensor: Tensor) -> _Place:
    """Where it lies, in which storage, and its version."""
    # Tensors of inference mode count no versions
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.untyped_storage()._cdata, version


def _spread(tensor: Tensor) -> Tensor:
    """Elements at equal distances, [fewer than twice _SAMPLES], the first and one of the last."""
    count = tensor.numel()
    step = max((count - 1) // (_SAMPLES - 1), 1)
    if tensor.is_contiguous() or _is_dense(tensor):
        return tensor.as_strided(((count + step - 1) // step,), (step,))
    return tensor.flatten()[::step]


def _is_dense(tensor: Tensor) -> bool:
    """Whether its memory has neither gaps nor elements that are two of its own."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
