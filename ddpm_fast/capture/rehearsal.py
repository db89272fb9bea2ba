"""A step watched before it is captured: what a capture cannot hold is named, what it reads is kept.

A capture that fails tells little of why, and leaves CUDA in a state that has to be mended. PyTorch
has a mode that refuses what waits, ``torch.cuda.set_sync_debug_mode``, but for all threads at once.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = "which waits for the device"
FROM_HOST = "which copies from the host"
COLLECTIVE = "which other processes take part in"
_COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional", "_dtensor")
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_copy_from_and_resize")
_INDEXED = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


class UncapturableError(Exception):
    """An operation that no graph can hold, named."""


class Rehearsal(TorchDispatchMode):
    """Watches the step that is taken inside it.

    Attributes:
        hindrance: the first operation that no graph can hold, and why; "" if there was none.
        read: the memory that the step read and did not make. Addresses of it are in the graph.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.hindrance = device, ""
        self.read: dict[int, torch.UntypedStorage] = {}
        self._made: dict[int, StorageWeakRef] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # torch.compile would never again compile what it meets under another mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs, name = kwargs or {}, func._schema.name
        with self:  # what it is made of, if it is made of others
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        given = _tensors((args, kwargs))
        if why := _why_not(func, name, args, [t for t in given if self._has(t)]):
            self._refuse(name, why)
        made = func(*args, **kwargs)
        found = _tensors(made)
        for tensor in (*given, *found):
            if not self._has(tensor) and tensor.device.type not in ("cpu", "meta"):
                self._refuse(name, f"which is of {tensor.device}")
        if name in _COPIES and len({t.device for t in (*given, *found) if t.numel()}) > 1:
            self._refuse(name, WAITS if self._has(given[-1]) else FROM_HOST)
        self._note(given, found)
        return made

    def keeps(self) -> bool:
        """Whether somebody still has a tensor that was made in the step."""
        if not self._all_gone():
            gc.collect()
        return not self._all_gone()

    def _all_gone(self) -> bool:
        return all(made.expired() for made in self._made.values())

    def _has(self, tensor: Tensor) -> bool:
        """Whether it lies where the step is taken."""
        return tensor.device == self.device

    def _refuse(self, name: str, why: str) -> None:
        said = f"{name.replace('::', '.')}, {why}"
        self.hindrance = self.hindrance or said
        raise UncapturableError(said)

    def _note(self, given: list[Tensor], found: list[Tensor]) -> None:
        for tensors, ours in ((given, False), (found, True)):
            for tensor in tensors:
                try:
                    storage = tensor.untyped_storage()
                except (NotImplementedError, RuntimeError):  # a tensor without one
                    continue
                place = storage._cdata
                if place in self._made or place in self.read:
                    continue
                if ours:
                    self._made[place] = StorageWeakRef(storage)  # whose place no other gets
                else:
                    self.read[place] = storage


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _why_not(func: Any, name: str, args: Any, given: list[Tensor]) -> str:
    """Why no graph can hold an operation on tensors of the device; "" if nothing is known."""
    if not given:
        return ""
    sharded = any(type(tensor).__module__.startswith("torch.distributed") for tensor in given)
    if sharded or func.namespace in _COLLECTIVES:
        return COLLECTIVE
    if torch.Tag.data_dependent_output in func.tags:
        return WAITS
    if name in _INDEXED:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        # One value in the place of what a mask tells is filled in
        return WAITS if masks and (name == "aten::index" or args[2].numel() != 1) else ""
    return WAITS if torch.Tag.dynamic_output_shape in func.tags else ""
