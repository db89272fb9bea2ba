"""A step watched before it is captured: what a capture cannot hold is named, what it reads is kept.

A capture that fails tells little of why, and leaves CUDA in a state that has to be mended. PyTorch
has a mode that refuses what waits, ``torch.cuda.set_sync_debug_mode``, but for all threads at once.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..callers import place_within

WAITS = "which waits for the device"
FROM_HOST = "which copies from the host"
DRAWS = "which draws random numbers"
CHANGES = "which changes what was there before the step"
WRITES = "which writes to a tensor among the model's arguments"
COLLECTIVE = "which other processes take part in"
_COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional", "_dtensor")
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_copy_from_and_resize")
_INDEXED = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
_OVERWRITE = ("aten::copy_", "aten::fill_", "aten::zero_")
_HARMLESS = ("aten::record_stream",)
# Before PyTorch 2.10 nothing is compiled under a mode: that has to have been done
WATCHES_AT_FIRST = hasattr(TorchDispatchMode, "ignore_compile_internals")


class UncapturableError(Exception):
    """An operation that no graph can hold, named."""


class Rehearsal(TorchDispatchMode):
    """Watches the step that is taken inside it, once.

    Args:
        device: where.
        own: tensors that the steps write to; their memory is whoever's who takes steps.
        arguments: tensors that the model is given, which are others' than it is called with later.
        strict: whatever no graph can hold is an error; else only what is written to arguments.

    Attributes:
        hindrance: the first operation that no graph can hold, and why; "" if there was none.
    """

    def __init__(
        self,
        device: torch.device,
        own: Iterable[Tensor] = (),
        arguments: Iterable[Tensor] = (),
        strict: bool = True,
    ) -> None:
        super().__init__()
        self.device, self.hindrance, self._strict = device, "", strict
        # What may be written to: of others only what the step filled before it looked there
        self._fresh = {tensor.untyped_storage()._cdata for tensor in own}
        self._arguments = {tensor.untyped_storage()._cdata for tensor in arguments}
        # By their places, which no others get: weakly, since others hold what was there before
        self._seen: dict[int, StorageWeakRef] = {}
        self._made: dict[int, StorageWeakRef] = {}
        self._read: set[int] = set()
        self._changed: dict[int, tuple[str, Tensor]] = {}
        self._caller = sys._getframe(1).f_code.co_filename

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
        here = [tensor for tensor in given if self._has(tensor)]
        if self._strict and (why := _why_not(func, name, args, kwargs, here)):
            self._refuse(name, why)
        self._note(given, self._seen)
        self._watch_writes(func, name, args, kwargs)
        made = func(*args, **kwargs)
        found = _tensors(made)
        if self._strict:
            self._look_where(name, given, found)
        self._note(found, self._made)
        return made

    def keeps(self) -> bool:
        """Whether somebody still has a tensor that was made in the step."""
        if not self._all_gone():
            gc.collect()
        return not self._all_gone()

    def read(self) -> dict[int, torch.UntypedStorage]:
        """The memory that the step was given and did not make. Addresses of it are in the graph."""
        held = {place: _storage(ref) for place, ref in self._seen.items()}
        return {place: storage for place, storage in held.items() if storage is not None}

    def undo(self) -> None:
        """After the step: gives memory that was there before what it held, where an operation
        changed that, and names it."""
        for place, (said, held) in self._changed.items():
            storage = _storage(self._seen[place])
            if storage is None:
                continue  # made in the step, where that was not seen, and gone
            _bytes(storage, held.device).copy_(held)
            self.hindrance = self.hindrance or said
        self._changed.clear()

    def _all_gone(self) -> bool:
        return all(made.expired() for made in self._made.values())

    def _has(self, tensor: Tensor) -> bool:
        """Whether it lies where the step is taken."""
        return tensor.device == self.device

    def _refuse(self, name: str, why: str) -> None:
        said = f"{name.replace('::', '.')}, {why}"
        self.hindrance = self.hindrance or said
        raise UncapturableError(said)

    def _look_where(self, name: str, given: list[Tensor], found: list[Tensor]) -> None:
        for tensor in (*given, *found):
            if not self._has(tensor) and tensor.device.type not in ("cpu", "meta"):
                self._refuse(name, f"which is of {tensor.device}")
        if name in _COPIES and len({t.device for t in (*given, *found) if t.numel()}) > 1:
            self._refuse(name, WAITS if self._has(given[-1]) else FROM_HOST)

    def _note(self, tensors: list[Tensor], among: dict[int, StorageWeakRef]) -> None:
        for tensor in tensors:
            storage = storage_of(tensor)
            if storage is not None:
                place = storage._cdata
                if place not in self._made and place not in self._seen:
                    among[place] = StorageWeakRef(storage)

    def _watch_writes(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        """A step that is taken more often than it is asked for, or from a graph, must leave no
        trace but by writing the same again, into memory that it did not look at before."""
        written: list[tuple[Tensor, bool]] = []
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info is None:
                self._read.update(_places(value))
            elif argument.alias_info.is_write:  # else a view is made of it
                over = argument.kwarg_only or name in _OVERWRITE
                written += [(tensor, over) for tensor in _tensors(value)]
        for tensor, over in written if name not in _HARMLESS else ():
            storage = storage_of(tensor)
            place = 0 if storage is None else storage._cdata
            if storage is None or place in self._made or place in self._fresh:
                continue
            if place in self._arguments:
                self._refuse(name, WRITES)
            if over and place not in self._read:
                if tensor.numel() * tensor.element_size() == storage.nbytes():
                    self._fresh.add(place)
            elif place not in self._changed and storage.nbytes():
                line = place_within(self._caller)
                said = f"{name.replace('::', '.')}, {CHANGES}" + (f" ({line})" if line else "")
                self._changed[place] = said, _bytes(storage, tensor.device).clone()
        self._read.update(_places([tensor for tensor, over in written if not over]))


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a tensor without one
        return None


def _storage(ref: StorageWeakRef) -> torch.UntypedStorage | None:
    return None if ref.expired() else torch.UntypedStorage._new_with_weak_ptr(ref.cdata)


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _places(value: object) -> set[int]:
    storages = map(storage_of, _tensors(value))
    return {storage._cdata for storage in storages if storage is not None}


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _why_not(func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor]) -> str:
    """Why no graph can hold an operation, with these tensors of the device; "" if nothing is
    known."""
    if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
        return DRAWS
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


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it does so here: attention may drop some out, and mostly does not."""
    for i, argument in enumerate(func._schema.arguments):
        given = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        if argument.name in ("dropout_p", "dropout") and not given:
            return False
        if argument.name in ("train", "training") and given is False:
            return False
    return True
