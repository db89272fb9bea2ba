"""What records steps for a device, so that they can be played again without Python: CUDA graphs.

The rest of the capture knows no more of CUDA than :class:`Recorder` says.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch

Work = Callable[[], None]
Queue = Any  # a stream
PACE = 16  # steps between two looks at how far the device is


class Recording(Protocol):
    def replay(self) -> None:
        """Queues the recorded work again, on the stream that is current."""


class Mark(Protocol):
    """A place in the work that is queued."""

    def synchronize(self) -> None:
        """Waits until the device is there."""


class Recorder(Protocol):
    def aside(self, work: Work) -> None:
        """Does work where it can be recorded afterwards, in order with what is queued."""

    def record(self, work: Work) -> Recording:
        """Records work, of which nothing is done yet, in memory of its own."""

    def queue(self) -> Queue:
        """The stream that is current."""

    def mark(self, queue: Queue) -> Mark:
        """After what is queued there."""


class CudaRecorder:
    """Records CUDA graphs; one at a time in a process."""

    _aside: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}
    _recorded: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def aside(self, work: Work) -> None:
        with torch.cuda.device(self._device):
            side, current = self._stream(self._aside), torch.cuda.current_stream()
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    work()
            finally:
                current.wait_stream(side)

    def record(self, work: Work) -> Recording:
        # Not torch.cuda.graph: where a capture fails, that leaves its stream the current one
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # What cuBLAS works in belongs to a stream, and whoever likes may drop it. On a stream where
        # nothing else is done it is taken during the capture, and is the graph's memory and stays.
        if self._device in self._recorded:
            torch._C._cuda_clearCublasWorkspaces()  # that of the graph before
        torch.cuda.current_stream(self._device).synchronize()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream(self._recorded)):
            torch.cuda.empty_cache()  # which cannot be done in a capture that lacks memory
            # Other threads may allocate and wait meanwhile
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # what broke it is told, not that it broke
                    self._end(graph, pool)
                raise
            self._end(graph, pool)
        return graph

    def queue(self) -> Queue:
        return torch.cuda.current_stream(self._device)

    def mark(self, queue: Queue) -> Mark:
        event = torch.cuda.Event(blocking=True)
        event.record(queue)
        return event

    def _stream(self, streams: dict[torch.device, torch.cuda.Stream]) -> torch.cuda.Stream:
        if self._device not in streams:
            streams[self._device] = torch.cuda.Stream(self._device)
        return streams[self._device]

    def _end(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            # PyTorch leaves its allocator as it is in a capture, and with the graph's address
            graph.reset()
            _FAILED.append(graph)
            for undo in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
                with contextlib.suppress(RuntimeError, AttributeError):
                    getattr(torch._C, undo)(self._device.index, pool)
            raise


_FAILED: list[torch.cuda.CUDAGraph] = []
# By the type of a device
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}


class Pace:
    """Keeps who queues steps from being far ahead of the device, so that a progress bar is honest:
    by between one and two times PACE steps."""

    def __init__(self, device: torch.device) -> None:
        kind = RECORDERS.get(device.type)
        self._recorder = None if kind is None else kind(device)
        self._marks: deque[Mark] = deque()
        self._steps = 0

    def step(self) -> None:
        self._steps += 1
        if self._recorder is None or self._steps % PACE:
            return
        self._marks.append(self._recorder.mark(self._recorder.queue()))
        if len(self._marks) > 1:
            self._marks.popleft().synchronize()
