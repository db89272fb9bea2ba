"""A step watched before it is captured: what a capture cannot hold is named, what it reads is kept.

A capture that fails tells little of why, and leaves CUDA in a state that has to be mended. PyTorch
has a mode that refuses what waits, ``torch.cuda.set_sync_debug_mode``, but for all threads at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = "which waits for the device"
FROM_HOST = "which copies from the host"
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_copy_from_and_resize")
_INDEXED = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


class UncapturableError(Exception):
    """An operation that no graph can hold, named."""


class Rehearsal:
    """Watches the step that is taken inside it.

    Attributes:
        hindrance: the first operation that no graph can hold, and why; "" if there was none.
        read: the memory that the step read and did not make. Addresses of it are in the graph.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.hindrance = device, ""
        self.read: dict[int, torch.UntypedStorage] = {}
        self._operations, self._functions = _Operations(self), _Functions(self)

    def __enter__(self) -> Rehearsal:
        self._functions.__enter__()
        self._operations.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._operations.__exit__(*error)
        self._functions.__exit__(*error)

    def refuse(self, name: str, why: str) -> None:
        said = f"{name.replace('::', '.')}, {why}"
        self.hindrance = self.hindrance or said
        raise UncapturableError(said)


class _Operations(TorchDispatchMode):
    def __init__(self, owner: Rehearsal) -> None:
        super().__init__()
        self._owner = owner
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func._schema.name
        if why := _why_not(func, name, args, given):
            self._owner.refuse(name, why)
        made = func(*args, **kwargs)
        found = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        if any(map(_is_elsewhere, given)) and not all(map(_is_elsewhere, found)):
            self._owner.refuse(name, WAITS)
        self._note(given, found)
        return made

    def _note(self, given: list[Tensor], found: list[Tensor]) -> None:
        for tensors, ours in ((given, False), (found, True)):
            for tensor in tensors:
                try:
                    storage = tensor.untyped_storage()
                except (NotImplementedError, RuntimeError):  # a tensor without one
                    continue
                place = storage._cdata
                if place in self._made or place in self._owner.read:
                    continue
                if ours:
                    self._made.add(place)
                else:
                    self._owner.read[place] = storage


class _Functions(TorchFunctionMode):
    """Sees what goes past the operations."""

    def __init__(self, owner: Rehearsal) -> None:
        super().__init__()
        self._owner = owner

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        kind = self._owner.device.type
        if func in _TO_PYTHON and isinstance(args[0], Tensor) and args[0].device.type == kind:
            self._owner.refuse(f"Tensor.{name}", WAITS)
        made = func(*args, **kwargs)
        if func in _FROM_PYTHON and kind != "cpu" and made.device.type == kind:
            data = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if not any(map(_is_elsewhere, data)):
                self._owner.refuse(f"torch.{name}", FROM_HOST)
        return made


_TO_PYTHON: tuple[Callable[..., Any], ...] = (Tensor.tolist, Tensor.numpy)
_FROM_PYTHON: tuple[Callable[..., Any], ...] = (
    torch.tensor,
    torch.as_tensor,
    torch.asarray,
    torch.from_numpy,
    Tensor.new_tensor,
)


def _why_not(func: Any, name: str, args: Any, given: list[Tensor]) -> str:
    """Why no graph can hold an operation; "" if nothing is known."""
    tags = func.tags
    if torch.Tag.data_dependent_output in tags:
        return WAITS
    if name in _INDEXED:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        # One value in the place of what a mask tells is filled in
        if masks and not (name != "aten::index" and args[2].numel() == 1):
            return WAITS
    elif torch.Tag.dynamic_output_shape in tags:
        return WAITS
    if name in _COPIES and len({tensor.device for tensor in given if tensor.numel()}) > 1:
        return FROM_HOST if _is_elsewhere(given[0]) else WAITS
    return ""


def _is_elsewhere(tensor: Tensor) -> bool:
    """Not on the host."""
    return tensor.device.type not in ("cpu", "meta")
