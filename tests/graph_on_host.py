"""What CUDA graphs do, done with CPU tensors: operations are recorded with the very memory that
they read and write, and played again without anything of Python.

A recording holds every operation that reaches PyTorch's dispatcher. As in a capture nothing is
computed while it is made, memory that it takes is its own, and what would wait for the device is an
error.
"""

from __future__ import annotations

import threading
from typing import ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ERROR = "operation not permitted when stream is capturing"


def tensors(value) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def alias(value):
    return value.detach() if isinstance(value, Tensor) else value


class HostRecorder:
    """In the place of recorder.CudaRecorder. Class attributes count what was asked for."""

    recordings: ClassVar[list[HostGraph]] = []
    marks: ClassVar[int] = 0

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def lacks(self) -> str:
        return ""

    def aside(self, work) -> None:
        work()

    def record(self, work) -> HostGraph:
        graph = HostGraph()
        graph.capture(work)
        HostRecorder.recordings.append(graph)
        return graph

    def queue(self):
        return "the host"

    def mark(self, queue):
        assert queue == "the host"
        return HostMark()


class HostMark:
    def __init__(self) -> None:
        HostRecorder.marks += 1

    def synchronize(self) -> None:
        pass


class HostGraph:
    def __init__(self) -> None:
        self.operations: list[tuple] = []
        self.replays = 0
        self._turn = threading.Lock()

    def capture(self, work) -> None:
        tape = _Tape(self.operations)
        try:
            with _Refusals(), tape:
                work()
        finally:
            tape.undo()

    @torch.no_grad()
    def replay(self) -> None:
        assert self._turn.acquire(blocking=False), "two at once on one graph's memory"
        self.replays += 1
        with torch.inference_mode():
            for func, args, kwargs, made in self.operations:
                again = func(*args, **kwargs)
                for kept, new in zip(tensors(made), tensors(again), strict=True):
                    if kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)
        self._turn.release()


class _Tape(TorchDispatchMode):
    def __init__(self, operations: list[tuple]) -> None:
        super().__init__()
        self.operations = operations
        self.made: dict[int, Tensor] = {}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        dynamic = torch.Tag.dynamic_output_shape in func.tags
        if func is torch.ops.aten.index.Tensor:
            dynamic = any(index.dtype == torch.bool for index in tensors(args[1]))
        if dynamic or torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError(ERROR)
        given = tensors((args, kwargs))
        if func._schema.is_mutable:
            for tensor in given:
                self.keep(tensor)
        made = func(*args, **kwargs)
        known = {place(tensor) for tensor in given}
        for tensor in tensors(made):
            if place(tensor) not in known:
                self.made[place(tensor)] = tensor
        # By their memory: a graph does not know that a tensor is given another
        self.operations.append((func, *tree_map(alias, (args, kwargs, made))))
        return made

    def keep(self, tensor: Tensor) -> None:
        """What memory held that the work did not take."""
        if place(tensor) in self.made or place(tensor) in self.before:
            return
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        self.before[place(tensor)] = whole, whole.clone()

    def undo(self) -> None:
        with torch.inference_mode():
            for whole, held in self.before.values():
                whole.copy_(held)
            for tensor in self.made.values():
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)


class _Refusals(TorchFunctionMode):
    """What reads a tensor of the host's memory without the dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__):
            raise RuntimeError(ERROR)
        return func(*args, **(kwargs or {}))
