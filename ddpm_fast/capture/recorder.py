"""What records steps for a device, so that they can be played again without Python: CUDA graphs.

The rest of the capture knows no more of CUDA than :class:`Recorder` says.
"""

from __future__ import annotations

import contextlib
import gc
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch.torch_version import TorchVersion

Work = Callable[[], None]
Queue = Any  # a stream
PACE = 16  # steps between two looks at how far the device is
# What ends an allocation of a capture that broke: its name before PyTorch 2.8 is the second
_ENDS = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
# Before, a capture marks the state of the device's random numbers, for whoever draws from it
_STATE_A_CAPTURE = TorchVersion(torch.__version__) >= "2.13"


class Recording(Protocol):
    def replay(self) -> None:
        """Queues the recorded work again, on the stream that is current."""


class Mark(Protocol):
    """A place in the work that is queued."""

    def synchronize(self) -> None:
        """Waits until the device is there."""


class Recorder(Protocol):
    def lacks(self) -> str:
        """What PyTorch would need so that a recording that fails does no harm; "" if it has all."""

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

    def lacks(self) -> str:
        needed: list[tuple[str, object, str]] = [
            ("torch._C", torch._C, "_cuda_clearCublasWorkspaces"),
            ("torch._C", torch._C, "_cuda_releasePool"),
            ("torch._C", torch._C, next((n for n in _ENDS if hasattr(torch._C, n)), _ENDS[0])),
        ]
        if not _STATE_A_CAPTURE:
            needed.append(("torch.Generator", torch.Generator, "graphsafe_set_state"))
        missing = [f"{where}.{name}" for where, owner, name in needed if not hasattr(owner, name)]
        return ", ".join(missing)

    def record(self, work: Work) -> Recording:
        # What cuBLAS works in belongs to a stream, and whoever likes may drop it. Taken during the
        # capture it is the graph's memory, and stays: not what this stream has from its time in
        # others' hands, of which PyTorch has 32, nor for those who get the stream after this.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            torch.cuda.current_stream(self._device).synchronize()
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream(self._recorded)):
                torch.cuda.empty_cache()  # which cannot be done in a capture that lacks memory
                return self._captured(work)
        finally:
            torch._C._cuda_clearCublasWorkspaces()

    def _captured(self, work: Work) -> Recording:
        # Not torch.cuda.graph: where a capture fails, that leaves its stream the current one
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        with _without_collections():
            try:
                # Whoever replays it may not be in the mode that its tensors would be limited to
                with self._random_state_aside(), torch.inference_mode(False):
                    # Other threads may allocate and wait meanwhile
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # what broke it is told, not that it broke
                    self._end(graph, pool)
                raise
            self._end(graph, pool)
        return graph

    @contextlib.contextmanager
    def _random_state_aside(self) -> Iterator[None]:
        """While a capture begins, which marks the state that it finds until it ends, for ever where
        it breaks: whoever draws numbers by a marked one, in any thread, gets an error."""
        if _STATE_A_CAPTURE:
            yield
            return
        generator = torch.cuda.default_generators[self._device.index]
        before, marked = generator.graphsafe_get_state(), torch.Generator(self._device)
        marked.seed()  # not the numbers of others, for a thread that draws right now
        generator.graphsafe_set_state(marked)
        try:
            yield
        finally:
            generator.graphsafe_set_state(before)

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
            # PyTorch leaves its allocator as it is in a capture, and with the graph's address; the
            # pool of one that was ended, and could not be made a graph, it releases itself
            graph.reset()
            _FAILED.append(graph)
            end = next(getattr(torch._C, name) for name in _ENDS if hasattr(torch._C, name))
            with contextlib.suppress(RuntimeError):
                end(self._device.index, pool)
                torch._C._cuda_releasePool(self._device.index, pool)
            raise


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """What the collector finds in a capture may be a graph or a stream that is left, whose end
    would break it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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

    def step(self, count: int) -> None:
        """``count`` more are queued."""
        self._steps += count
        if self._recorder is None or self._steps < PACE:
            return
        self._steps %= PACE
        self._marks.append(self._recorder.mark(self._recorder.queue()))
        if len(self._marks) > 1:
            self._marks.popleft().synchronize()
