"""What is asked of torch.cuda by the recorder of CUDA graphs, on objects that stand for its."""

from __future__ import annotations

import contextlib
import gc

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


class Generator:
    """Of random numbers, by a state that others may have, too."""

    def __init__(self, device, state=None):
        assert device == DEVICE
        self.state = state or {"device": device}

    def seed(self):
        self.state["seed"] = "random"

    def graphsafe_get_state(self):
        return Generator(DEVICE, self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state


class Cuda:
    """A device, the stream that is current there, and what is done on it."""

    def __init__(self, monkeypatch):
        self.log, self.made, self.ends, self.allocates = [], 0, True, True
        self.generator, self.begun = Generator(DEVICE), []
        self.current = Stream("user's", self.log)
        for name in ("Stream", "stream", "current_stream", "CUDAGraph", "Event", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "default_generators", (None, self.generator))
        monkeypatch.setattr(torch, "Generator", Generator)
        monkeypatch.setattr(recorder, "_STATE_A_CAPTURE", False)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):

            def note(*given, name=name):
                self.log.append((name, *given))
                if not self.allocates:
                    raise RuntimeError(f"{name}: not currently recording")

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
                # As PyTorch before 2.13 does
                cuda.generator.state["capturing"] = True
                cuda.begun.append((torch.is_inference_mode_enabled(), cuda.generator.state))
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
        ("clear",),
        ("user's", "synchronize"),
        ("begin", "side 1", (0, 7), "thread_local"),
        ("work", "side 1"),
        ("end", "side 1"),
        ("clear",),
    ]
    assert graph is not None
    assert not recorder._FAILED
    recorded.mark(recorded.queue()).synchronize()
    assert cuda.log[6:] == [("event", "record", "user's"), ("event", "synchronize")]


MENDED = [("_cuda_endAllocateToPool", 1, (0, 7)), ("_cuda_releasePool", 1, (0, 7))]


@pytest.mark.parametrize("allocates", [False, True])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("works", [False, True])
def test_a_capture_that_fails(works, ends, allocates, cuda):
    """The stream is the user's again, the allocator out of the capture, and the graph that it may
    still know is kept; the first error is the one that is told. A pool that PyTorch has left is its
    own to release."""
    cuda.ends, cuda.allocates = ends, allocates

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
    mended = [] if ends else [("reset",), *MENDED[: 1 + allocates]]
    assert cuda.log[4:] == [*mended, ("clear",)]
    assert len(recorder._FAILED) == (not ends)
    assert cuda.current.name == "user's"
    assert gc.isenabled()


def test_before_pytorch_2_8_the_allocator_is_mended_by_another_name(cuda, monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_endAllocateCurrentStreamToPool",
                        torch._C._cuda_endAllocateToPool, raising=False)  # fmt: skip
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    cuda.ends = False
    assert CudaRecorder(DEVICE).lacks() == ""
    with pytest.raises(RuntimeError, match="invalidated"):
        CudaRecorder(DEVICE).record(lambda: None)
    assert cuda.log[5:7] == MENDED


@pytest.mark.parametrize("fails", ["begin", "work", "end", ""])
@pytest.mark.parametrize("marks", [False, True])
def test_random_numbers_are_not_of_the_capture(marks, fails, cuda, monkeypatch):
    """Where PyTorch marks a state, others draw by theirs during the capture and after one that
    broke."""
    monkeypatch.setattr(recorder, "_STATE_A_CAPTURE", not marks)
    cuda.ends = fails != "end"
    theirs, during = cuda.generator.state, []
    if fails == "begin":
        monkeypatch.setattr(torch, "inference_mode", lambda mode: 1 / 0)

    def work():
        during.append(cuda.generator.state)
        return 1 / (fails != "work")

    with contextlib.suppress(ZeroDivisionError, RuntimeError):
        CudaRecorder(DEVICE).record(work)
    assert cuda.generator.state is theirs
    assert theirs == ({"device": DEVICE} if marks or not cuda.begun else {
        "device": DEVICE, "capturing": True})  # fmt: skip
    assert during == ([] if fails == "begin" else [theirs])
    for _, state in cuda.begun:
        assert (state is theirs) == (not marks)
        assert marks == ("seed" in state)


def test_what_a_capture_is_kept_from(cuda):
    """Tensors that only one mode may write to, and what the collector would end."""
    collects = []
    gc.disable()
    try:
        for enabled in (False, True):
            if enabled:
                gc.enable()
            with torch.inference_mode():
                CudaRecorder(DEVICE).record(lambda: collects.append(gc.isenabled()))
                assert torch.is_inference_mode_enabled()
            assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert [mode for mode, _ in cuda.begun] == [False, False]
    assert collects == [False, False]


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (torch._C, "_cuda_clearCublasWorkspaces", "torch._C._cuda_clearCublasWorkspaces"),
        (torch._C, "_cuda_releasePool", "torch._C._cuda_releasePool"),
        (torch._C, "_cuda_endAllocateToPool", "torch._C._cuda_endAllocateToPool"),
        (Generator, "graphsafe_set_state", "torch.Generator.graphsafe_set_state"),
    ],
)
def test_what_pytorch_does_not_have(owner, name, said, cuda, monkeypatch):
    assert CudaRecorder(DEVICE).lacks() == ""
    monkeypatch.delattr(owner, name)
    assert CudaRecorder(DEVICE).lacks() == said


def test_where_graphs_are_recorded_nothing_else_is_done(cuda):
    """And what cuBLAS took there for one is not the next one's."""
    streams = []
    for _ in range(3):
        recorded = CudaRecorder(DEVICE)
        recorded.aside(lambda: streams.append(cuda.current.name))
        recorded.record(lambda: streams.append(cuda.current.name))
    assert streams == ["side 1", "side 2"] * 3
    assert [what for what, *_ in cuda.log if what in ("clear", "begin")] == 3 * [
        "clear", "begin", "clear",
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 4, recorder.PACE])
def test_pace(count, cuda):
    pace = Pace(DEVICE)
    for _ in range(0, 3 * recorder.PACE, count):
        pace.step(count)
    assert [what for _, what, *_ in cuda.log] == [
        "record", "record", "synchronize", "record", "synchronize",
    ]  # fmt: skip
    assert cuda.made == 0
    idle = Pace(torch.device("cpu"))
    for _ in range(100):
        idle.step(1)
