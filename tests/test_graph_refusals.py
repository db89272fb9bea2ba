"""What cannot be captured goes step by step, to the same bits, with one warning."""

from __future__ import annotations

import contextlib
import itertools
import re

import graph_on_host
import pytest
import torch
from graph_cases import (
    SHAPE,
    SHIFTS,
    Net,
    assert_played,
    assert_same,
    drawn,
    graphs_on_host,  # noqa: F401
    model,
    sampler_of,
    silent,
)
from graph_on_host import HostRecorder

from ddpm_fast.capture import rehearsal
from ddpm_fast.capture.key import UnsuitedError, frozen
from ddpm_fast.capture.rehearsal import Rehearsal, UncapturableError

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_stepwise(sampler, message, calls=None, **kwargs):
    """The loop's bits, with one warning here, by however many trajectories."""
    sampler.graph = "off"
    expected = drawn(sampler, **kwargs)
    sampler.graph = "auto"
    with pytest.warns(UserWarning, match=message) as seen:
        found = drawn(sampler, **kwargs)
    assert len(seen) == 1
    assert 'graph="off" silences this' in str(seen[0].message)
    assert seen[0].filename.endswith("graph_cases.py")
    assert_same(found, expected)
    assert_same(silent(lambda: drawn(sampler, **kwargs)), expected)
    assert not any(step and step.lock.locked() for step in sampler._graphs._kept.values())


def branches(x, t):
    return model(x, t) if t[0] > 500 else torch.zeros_like(x)


SYNCING = {
    "item": (lambda x, t: model(x, t) * x.mean().item(), r"aten\._local_scalar_dense, which waits"),
    "float": (lambda x, t: model(x, t) * float(t[0]), r"aten\._local_scalar_dense, which waits"),
    "int": (lambda x, t: model(x, t) * int(t[0]), r"aten\._local_scalar_dense, which waits"),
    "branch": (branches, r"aten\._local_scalar_dense, .* if t\[0\] > 500"),
    # Which nothing sees on a CPU before it is captured
    "tolist": (lambda x, t: model(x, t) * t.tolist()[0], "RuntimeError: operation not permitted"),
    "numpy": (lambda x, t: model(x, t) + float(t.numpy()[0]), "RuntimeError: operation not"),
    "nonzero": (lambda x, t: model(x, t) + len(x.nonzero()), r"aten\.nonzero, which waits"),
    "mask": (lambda x, t: model(x, t) + x[x > 0].sum(), r"aten\.index, which waits"),
    "unique": (lambda x, t: model(x, t) + t.unique(), r"aten\._unique2?, which waits"),
    "equal": (lambda x, t: model(x, t) * torch.equal(x, x), r"aten\.equal, which waits"),
}


@pytest.mark.parametrize("name", SYNCING)
def test_models_that_wait(name, graphs):
    function, message = SYNCING[name]
    assert_stepwise(sampler_of(function), f"step cannot be captured: {message}")
    assert not graphs


def test_masks_that_fill_need_not_wait(graphs):
    def zeroed(x, t):
        eps = model(x, t)
        eps[eps > 0.9] = 0.5
        return eps

    assert_played(sampler_of(zeroed), graphs)


def test_denoised_fn_that_waits(graphs):
    sampler = sampler_of(denoised_fn=lambda x0: x0 / max(1.0, float(x0.abs().max())))
    assert_stepwise(sampler, r"_local_scalar_dense")
    sampler.denoised_fn = torch.tanh  # and with another it is captured
    assert_played(sampler, graphs)


def test_a_model_that_goes_another_way_when_it_is_refused(graphs):
    def careful(x, t):
        try:
            return model(x, t) * t.sum().item()
        except Exception:
            return x

    assert_stepwise(sampler_of(careful), r"_local_scalar_dense")


@pytest.mark.parametrize("stream", [False, True])
def test_captures_that_fail(stream, graphs, monkeypatch):
    """By what was not foreseen: the error's own words."""
    monkeypatch.setattr(rehearsal, "_why_not", lambda *_: "")
    assert_stepwise(sampler_of(lambda x, t: model(x, t) * x.mean().item()), "RuntimeError: operat")
    assert not graphs


def counting(period):
    calls = itertools.count()
    return lambda x, t: model(x, t) * (1 + 1e-6 * (next(calls) % period))


def remembering():
    kept = []

    def function(x, t):
        kept.append(model(x, t))
        return kept[max(0, len(kept) - 2)]

    return function


def accumulating():
    total = torch.zeros(1)
    return lambda x, t: model(x, t) + total.add_(0.01)


@pytest.mark.parametrize(
    "of",
    [lambda: counting(2), lambda: counting(10**9), remembering, accumulating,
     lambda: lambda x, t: model(x, t) + torch.randn_like(x)],
)  # fmt: skip
def test_models_that_are_no_functions(of, graphs):
    """Each step then is a call of the model, which is all that can be promised of them."""
    function, calls = of(), []

    def counted(x, t):
        calls.append(1)
        return function(x, t)

    sampler = sampler_of(counted)
    why = "depends on more than its|is kept|changes what was there|which draws random numbers"
    with pytest.warns(UserWarning, match=why) as seen:
        sampler.sample(SHAPE)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    calls.clear()
    silent(lambda: [sampler.sample(SHAPE), list(sampler.stream(SHAPE))])
    assert len(calls) == 40


def test_what_other_processes_take_part_in(graphs, tmp_path):
    """One of them that goes another way would leave the others waiting."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:

        def summed(x, t):
            eps = model(x, t)
            torch.distributed.all_reduce(eps)
            return eps

        assert_stepwise(sampler_of(summed), "c10d.allreduce_, which other processes take part in")
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        whole = torch.distributed.tensor.DTensor.from_local(torch.full((1,), 0.1), mesh)
        sharded = sampler_of(lambda x, t: model(x, t) + (2 * whole).to_local())
        assert_stepwise(sharded, "aten.mul, which other processes take part in")
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_collected_at_each_step(graphs):
    """By hooks and functions, which no graph calls."""
    net, collected = Net(), []
    hook = net.register_forward_hook(lambda module, given, output: collected.append(output))
    sampler = sampler_of(net)
    with pytest.warns(UserWarning, match="a tensor that is made in it is kept"):
        sampler.sample(SHAPE)
    collected.clear()
    silent(lambda: sampler.sample(SHAPE))
    assert len({tensor.data_ptr() for tensor in collected}) == 20
    hook.remove()
    sampler = sampler_of(net, denoised_fn=lambda x0: collected.append(x0.amax()) or x0)
    with pytest.warns(UserWarning, match="a tensor that is made in it is kept"):
        sampler.sample(SHAPE)

    def cyclic(x, t):  # which nobody has any more, but the collector
        held = [net(x, t)]
        held.append(held)
        return held[0]

    assert_played(sampler_of(cyclic), graphs)


def test_errors_of_the_model_are_its_own(graphs):
    for function, error, message in (
        (lambda x, t: x[:, :2], ValueError, "at step 0, t = 950; got"),
        (lambda x, t: x.mul_(2), ValueError, "changed its input x in place, at step 0"),
        (lambda x, t: None, TypeError, "model must return a tensor"),
        (lambda x, t: x.nothing, AttributeError, "nothing"),
    ):
        with pytest.raises(error, match=message):
            silent(lambda function=function: sampler_of(function).sample(SHAPE))
    for name, value, message in (
        ("guidance_scale", torch.ones(3), r"guidance_scale must have shape \[4\]"),
        ("guidance_scale", torch.ones(4).double(), "guidance_scale must be float32"),
        ("clip", 3, "clip must be"),
        ("backend", "gpu", "backend must be one of"),
    ):
        sampler = sampler_of(guidance_scale=1.0)
        setattr(sampler, name, value)
        with pytest.raises((ValueError, TypeError), match=message):
            silent(lambda sampler=sampler: sampler.sample(SHAPE, uncond_kwargs={}))
    assert not graphs


class Holder:
    def __init__(self):
        self.shift = SHIFTS


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"held": Holder()}, r"model_kwargs\['held'\] is of Holder, which may change unseen"),
        ({"held": [1, {"a": {2}}]}, r"model_kwargs\['held'\]\[1\]\['a'\] is of set"),
        ({"held": torch.eye(4).to_sparse()}, r"model_kwargs\['held'\] is a tensor of a kind"),
    ],
)
def test_arguments_that_may_change_unseen(kwargs, message, graphs):
    sampler = sampler_of(lambda x, t, held: model(x, t))
    assert_stepwise(sampler, f"arguments cannot be captured: {message}", model_kwargs=kwargs)


def test_arguments_that_are_values(graphs):
    def function(x, t, mode="a", gain=1.0):
        return model(x, t, gain=gain) * (2 if mode == "a" else 1)

    sampler = sampler_of(function)
    for kwargs in ({}, {"mode": "b"}, {"mode": "a"}, {"gain": 0.0}, {"gain": -0.0}, {"gain": 0}):
        assert_played(sampler, graphs, model_kwargs=kwargs)
    assert_played(sampler, graphs, model_kwargs={"gain": -0.0}, captures=0)


def test_tensors_elsewhere():
    there = torch.device("meta")  # in the place of a GPU
    with pytest.raises(UnsuitedError, match="y lies on cpu, and the states on meta"):
        frozen(torch.zeros(4), there, "y")
    assert frozen(torch.tensor(2.5), there, "y") != frozen(torch.tensor(2.0), there, "y")
    assert frozen(torch.zeros(4, device=there), there, "y") != frozen([], there, "y")
    assert frozen(torch.zeros(4, 4).T, torch.device("cpu"), "") != frozen(
        torch.zeros(4, 4), torch.device("cpu"), ""
    )


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda here: torch.zeros(3).to("meta"), r"aten\._to_copy, which copies from the host"),
        (lambda here: here.copy_(torch.zeros(3)), r"aten\.copy_, which copies from the host"),
        (lambda here: here + torch.tensor(2.0), ""),
        (lambda here: torch.as_tensor(here, dtype=torch.float64), ""),
        (lambda here: here * torch.linspace(0, 1, 3).tolist()[1] * torch.ones(1).item(), ""),
        (lambda here: here[torch.tensor([1, 0])[:1].item()], ""),
    ],
)
def test_copies_from_the_host(work, message):
    """What waits on tensors of the host is no hindrance; the device here is the one without any."""
    here, watched = torch.zeros(3, device="meta"), Rehearsal(torch.device("meta"))
    with contextlib.suppress(UncapturableError), watched:
        work(here)
    assert bool(watched.hindrance) == bool(message)
    assert re.search(message, watched.hindrance)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_no_memory_for_a_capture(kind, graphs, monkeypatch):
    record, tried = HostRecorder.record, []

    def limited(self, work):
        tried.append(1)
        if len(tried) in fails:
            raise kind("CUDA out of memory")
        return record(self, work)

    monkeypatch.setattr(HostRecorder, "record", limited)
    sampler, fails = sampler_of(), {1}
    off = sampler_of(graph="off")
    expected = off.sample(SHAPE), off.sample((2, 3, 8, 8))
    with pytest.warns(UserWarning, match="without a graph: not enough memory for a captured step"):
        assert torch.equal(sampler.sample(SHAPE), expected[0])
    assert torch.equal(silent(lambda: sampler.sample(SHAPE)), expected[0])
    assert len(tried) == 1
    assert torch.equal(sampler.sample((2, 3, 8, 8)), expected[1])  # which is smaller
    assert (len(tried), len(graphs)) == (2, 1)
    fails.add(3)  # others make room
    sampler.sample((6, 3, 8, 8))
    assert (len(tried), len(graphs)) == (4, 2)
    assert [step is not None for step in sampler._graphs._kept.values()] == [True]


def test_under_a_mode_that_sees_operations_nothing_is_captured(graphs):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        sampler_of().sample(SHAPE)
    sampler_of().sample((0, 3, 8, 8))
    assert not graphs


def test_compiled_models(graphs, monkeypatch):
    """They are captured as compiled, and stay so."""
    monkeypatch.setattr(graph_on_host, "_Refusals", contextlib.nullcontext)  # a mode to compile for
    seen = []

    def backend(module, _):
        seen.append(module)
        return lambda *args: module(*args)

    net = torch.compile(Net(), backend=backend)
    sampler = sampler_of(net, graph="off")
    sampler.sample(SHAPE)
    compiled = len(seen)
    sampler.graph = "auto"
    sampler.sample(SHAPE)
    assert len(seen) == compiled
    with Rehearsal(torch.device("cpu")):  # at any time, in any thread
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))
    assert len(seen) == compiled + 1
