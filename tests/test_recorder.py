"""What is asked of torch.cuda by the recorder of CUDA graphs, on objects that stand for its."""

from __future__ import annotations

import contextlib

import pytest
import torch

from ddpm_fast.capture import recorder
from ddpm_fast.capture.recorder import CudaRecorder, Pace

DEVICE = torch.device("cuda", 1)


class Stream:
    def __init__(self, name, log, device=DEVICE):
        self.name, self.log, self.device = name, log, device

    def __getattr__(self, what):
        if what.startswith("_"):
            raise AttributeError(what)
        return lambda *others: self.log.append((self.name, what, *[o.name for o in others]))


class Cuda:
    """A device, the stream that is current there, and what is done on it."""

    def __init__(self, monkeypatch):
        self.log, self.made, self.ends = [], 0, True
        self.current = Stream("user's", self.log)
        for name in ("Stream", "stream", "current_stream", "CUDAGraph", "Event", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            note = lambda *given, name=name: self.log.append((name, *given))  # noqa: E731
            monkeypatch.setattr(torch._C, name, note, raising=False)
        clear = lambda: self.log.append(("clear",))  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
        monkeypatch.setattr(CudaRecorder, "_aside", {})
        monkeypatch.setattr(CudaRecorder, "_recorded", {})
        monkeypatch.setattr(recorder, "_FAILED", [])

    def Stream(self, device):
        assert device == DEVICE
        self.made += 1
        return Stream(f"side {self.made}", self.log)

    def current_stream(self, device=None):
        return self.current

    def device(self, device):
        assert device == DEVICE
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def CUDAGraph(self):
        cuda = self

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                cuda.log.append(("begin", cuda.current.name, pool, capture_error_mode))

            def capture_end(self):
                cuda.log.append(("end", cuda.current.name))
                if not cuda.ends:
                    raise RuntimeError("capture invalidated")

            def reset(self):
                cuda.log.append(("reset",))

        return Graph()

    def Event(self, blocking):
        return Stream("event", self.log)


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def test_work_aside_is_in_order(cuda):
    recorded = CudaRecorder(DEVICE)
    with contextlib.suppress(KeyError):
        recorded.aside(lambda: {}[cuda.log.append(("work", cuda.current.name))])
    assert cuda.log == [
        ("side 1", "wait_stream", "user's"),
        ("work", "side 1"),
        ("user's", "wait_stream", "side 1"),
    ]
    assert cuda.current.name == "user's"


def test_a_capture(cuda):
    recorded = CudaRecorder(DEVICE)
    graph = recorded.record(lambda: cuda.log.append(("work", cuda.current.name)))
    assert cuda.log == [
        ("user's", "synchronize"),
        ("begin", "side 1", (0, 7), "thread_local"),
        ("work", "side 1"),
        ("end", "side 1"),
    ]
    assert graph is not None
    assert not recorder._FAILED
    recorded.mark(recorded.queue()).synchronize()
    assert cuda.log[4:] == [("event", "record", "user's"), ("event", "synchronize")]


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("works", [False, True])
def test_a_capture_that_fails(works, ends, cuda):
    """The stream is the user's again, the allocator out of the capture, and the graph that it may
    still know is kept; the first error is the one that is told."""
    cuda.ends = ends

    def work():
        if not works:
            raise ValueError("the model's")

    recorded = CudaRecorder(DEVICE)
    if works and ends:
        recorded.record(work)
    else:
        kind, message = (RuntimeError, "invalidated") if works else (ValueError, "the model's")
        with pytest.raises(kind, match=message):
            recorded.record(work)
    mended = [("reset",), ("_cuda_endAllocateToPool", 1, (0, 7)), ("_cuda_releasePool", 1, (0, 7))]
    assert cuda.log[3:] == ([] if ends else mended)
    assert len(recorder._FAILED) == (not ends)
    assert cuda.current.name == "user's"


def test_where_graphs_are_recorded_nothing_else_is_done(cuda):
    """And what cuBLAS took there for one is not the next one's."""
    streams = []
    for _ in range(3):
        recorded = CudaRecorder(DEVICE)
        recorded.aside(lambda: streams.append(cuda.current.name))
        recorded.record(lambda: streams.append(cuda.current.name))
    assert streams == ["side 1", "side 2"] * 3
    assert [what for what, *_ in cuda.log if what in ("clear", "begin")] == [
        "begin", "clear", "begin", "clear", "begin",
    ]  # fmt: skip


def test_pace(cuda):
    pace = Pace(DEVICE)
    for _ in range(3 * recorder.PACE):
        pace.step()
    assert [what for _, what, *_ in cuda.log] == [
        "record", "record", "synchronize", "record", "synchronize",
    ]  # fmt: skip
    assert cuda.made == 0
    idle = Pace(torch.device("cpu"))
    for _ in range(100):
        idle.step()
