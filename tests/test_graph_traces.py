"""What a model writes to is as the loop leaves it, and layouts are the user's."""

from __future__ import annotations

import types
import weakref

import pytest
import torch
from graph_cases import (
    SHAPE,
    SHIFTS,
    assert_played,
    graphs_on_host,  # noqa: F401
    model,
    sampler_of,
    silent,
)
from graph_on_host import HostRecorder

from ddpm_fast.capture import captured
from ddpm_fast.capture.graphs import REMEMBERED
from ddpm_fast.capture.rehearsal import Rehearsal

pytestmark = pytest.mark.usefixtures("one_thread")


def adds(log, x):
    log += 1


def by_indices(log, x):
    log.index_add_(0, torch.tensor([0]), torch.ones(1))


def fills_half_again(log, x):
    log[:1].copy_(log[:1] + 1)


def by_out(log, x):
    torch.add(log, 1, out=log)


def of_the_state(log, x):
    log.lerp_(x.sum().view(1), 0.5)


def not_by_operations(log, x):
    """As a kernel that a model launches itself."""
    with torch.utils._python_dispatch._disable_current_modes():
        log.add_(1)


@pytest.mark.parametrize("write", [adds, by_indices, fills_half_again, by_out, not_by_operations])
@pytest.mark.parametrize("every_state", [False, True])
def test_what_is_written_to_an_argument_is_not_lost(write, every_state, graphs):
    def logging(x, t, log):
        write(log, x)
        return model(x, t)

    sampler, log = sampler_of(logging), torch.zeros(1)
    arguments = {"model_kwargs": {"log": log}}
    arguments["callback"] = (lambda step: None) if every_state else None
    with pytest.warns(UserWarning, match="writes to a tensor among"):
        sampler.sample(SHAPE, **arguments)
    assert log == 20
    silent(lambda: sampler.sample(SHAPE, **arguments))
    assert log == 40
    assert not graphs


class Counting(torch.nn.Module):
    def __init__(self, write, held):
        super().__init__()
        self.write = write
        if held == "buffer":
            self.register_buffer("log", torch.ones(1))
        else:
            self.held = types.SimpleNamespace(log=torch.ones(1))
        self.eval()

    def forward(self, x, t):
        self.write(getattr(self, "held", self).log, x)
        return model(x, t)


@pytest.mark.parametrize("write", [adds, by_indices, fills_half_again, by_out, of_the_state])
@pytest.mark.parametrize("held", ["buffer", "attribute"])
@pytest.mark.parametrize("watched_at_first", [True, False])
def test_what_is_counted_is_counted_once(write, held, watched_at_first, graphs, monkeypatch):
    monkeypatch.setattr(captured, "WATCHES_AT_FIRST", watched_at_first)
    net = Counting(write, held)
    log = getattr(net, "held", net).log
    with pytest.warns(UserWarning, match=r"changes what was there before the step \(.*log") as seen:
        found = sampler_of(net).sample(SHAPE)
    assert seen[0].filename == __file__
    assert not graphs
    net = Counting(write, held)
    assert torch.equal(found, sampler_of(net, graph="off").sample(SHAPE))
    if watched_at_first:  # else PyTorch is too old to look before anything is done
        assert torch.equal(log, getattr(net, "held", net).log)


def test_what_compiles_is_told():
    """And is not watched before it has."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 3))
    assert not captured.is_compiled(net)
    assert not captured.is_compiled(model)
    assert captured.is_compiled(torch.compile(model))
    assert captured.is_compiled(torch.nn.Sequential(torch.compile(net)))
    net[0].compile()
    assert captured.is_compiled(net)


def test_what_is_written_again_may_be(graphs):
    held = types.SimpleNamespace(all=torch.empty(SHAPE), part=torch.zeros(5, *SHAPE), out=SHIFTS)

    def writing(x, t):
        held.all.copy_(x).mul_(2).sin_()
        held.part[2].fill_(0.5)
        held.part[2:3].copy_(held.all[None] * held.part[2])
        return torch.add(held.part[2], 0.5 * model(x, t), out=held.all)

    sampler = sampler_of(lambda x, t: torch.mul(x, 2, out=held.all) + held.all.sin_())
    assert_played(sampler, graphs)
    assert_played(sampler_of(lambda x, t: x * held.part[1].copy_(model(x, t)).sign()), graphs)
    with pytest.warns(UserWarning, match="changes what was there"):
        sampler_of(writing).sample(SHAPE)


def test_what_only_reads_is_undisturbed():
    log = torch.ones(3)
    rehearsal = Rehearsal(torch.device("cpu"), strict=False)
    with rehearsal:
        made = log + 1
        made += log
        kept = made.clone().mul_(2)
    rehearsal.undo()
    assert rehearsal.hindrance == ""
    assert torch.equal(kept, torch.full((3,), 6.0))
    assert list(rehearsal.read()) == [log.untyped_storage()._cdata]


BIG = torch.linspace(-1, 1, 4 * 12).view(4, 12)


@pytest.mark.parametrize(
    "shift",
    [BIG[:, ::2], BIG[:, 1::4], BIG.T.contiguous().T, BIG[0, 3:4].expand(4, 3),
     BIG[2].expand(4, 12), BIG[::2, None, 1:4].expand(2, 5, 3), BIG[:0],
     BIG.to(torch.complex128)[:, 2:5]],
)  # fmt: skip
def test_arguments_have_their_strides(shift, graphs):
    def function(x, t, shift):
        met.append((shift.stride(), shift.data_ptr() % 16))
        return model(x, t) + shift.sum().real

    met = []
    sampler = sampler_of(function)
    assert_played(sampler, graphs, model_kwargs={"shift": shift})
    assert set(met) == {(shift.stride(), shift.data_ptr() % 16)}


def test_arguments_strewn_over_much_memory(graphs):
    """Of which a buffer would be as large."""
    strewn = torch.zeros(4, 1 << 22)[:, 0]
    sampler = sampler_of(lambda x, t, shift: model(x, t, shift))
    with pytest.warns(UserWarning, match=r"\['shift'\] is strewn over 12582913 elements"):
        sampler.sample(SHAPE, model_kwargs={"shift": strewn})
    assert not graphs


def test_arguments_over_each_other(graphs):
    sampler = sampler_of(lambda x, t, shift: model(x, t) + shift.sum())
    windows = BIG[0].unfold(0, 4, 2)
    with pytest.warns(
        UserWarning, match=r"model_kwargs\['shift'\] has elements that lie over each"
    ):
        found = sampler.sample(SHAPE, model_kwargs={"shift": windows})
    off = sampler_of(sampler.model, graph="off")
    assert torch.equal(found, off.sample(SHAPE, model_kwargs={"shift": windows}))


DROPS = torch.nn.functional.dropout


@pytest.mark.parametrize(
    ("drawn", "draws"),
    [
        (lambda x: DROPS(x, 0.5, training=True), True),
        (lambda x: DROPS(x, 0.5, training=False), False),
        (lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x), False),
        (lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5), True),
        (lambda x: torch.nn.functional.rrelu(x), False),
        (lambda x: x.bernoulli(), True),
        (lambda x: x + torch.rand(1), True),
        (lambda x: torch.empty_like(x).normal_(), True),
    ],
)
def test_random_numbers(drawn, draws, graphs):
    sampler = sampler_of(lambda x, t: model(x, t) + 0 * drawn(x.sigmoid()))
    if not draws:
        assert_played(sampler, graphs)
        return
    with pytest.warns(UserWarning, match=r"aten\..*, which draws random numbers \(.*lambda x"):
        sampler.sample(SHAPE)
    assert not graphs


def test_one_warning_a_model(graphs):
    """Whatever comes and goes, and no model is kept for it."""

    def waiting(gain):
        return lambda x, t: gain * model(x, t) * x.sign().abs().amax().item()

    models, functions = [waiting(1), waiting(2)], [torch.tanh, torch.sin]
    sampler = sampler_of(models[0])
    for i in range(8):
        sampler.model, sampler.denoised_fn = models[i // 2 % 2], functions[i % 2]
        if i in (0, 2):
            with pytest.warns(UserWarning, match="_local_scalar_dense") as seen:
                sampler.sample(SHAPE)
            assert len(seen) == 1
        else:
            silent(lambda: sampler.sample(SHAPE))
    assert len(sampler._graphs._refused) == 4
    for i in range(3 * REMEMBERED):
        sampler.model = models[i % 2]
        sampler.denoised_fn = lambda x0: x0
        silent(lambda: sampler.sample(SHAPE))
    assert len(sampler._graphs._refused) == REMEMBERED
    gone = weakref.ref(models[0])
    models.clear()
    sampler.model = model
    assert gone() is None


@pytest.mark.parametrize("broken", [1, 2])
def test_captures_that_others_break(broken, graphs, monkeypatch):
    """Once is chance, twice is the model's."""
    record, tried = HostRecorder.record, []

    def disturbed(self, work):
        tried.append(1)
        if len(tried) <= broken:
            raise RuntimeError("operation would make the legacy stream depend on a capturing one")
        return record(self, work)

    monkeypatch.setattr(HostRecorder, "record", disturbed)
    sampler, expected = sampler_of(), sampler_of(graph="off").sample(SHAPE)
    if broken == 1:
        assert torch.equal(silent(lambda: sampler.sample(SHAPE)), expected)
    else:
        with pytest.warns(UserWarning, match="step cannot be captured: RuntimeError: operation"):
            assert torch.equal(sampler.sample(SHAPE), expected)
    assert torch.equal(silent(lambda: sampler.sample(SHAPE)), expected)
    assert (len(tried), len(graphs)) == (2, broken == 1)


def test_models_that_a_broken_capture_breaks(graphs, monkeypatch):
    """At the second attempt, and not for the loop."""
    calls: list[int] = []

    def disturbed(self, work):
        calls.append(0)
        raise RuntimeError("operation not permitted")

    def function(x, t):
        if calls == [0]:
            calls.append(1)
            raise RuntimeError("a graph of the model's own is half made")
        return model(x, t)

    monkeypatch.setattr(HostRecorder, "record", disturbed)
    sampler, expected = sampler_of(function), sampler_of(graph="off").sample(SHAPE)
    with pytest.warns(UserWarning, match="captured: RuntimeError: operation not permitted"):
        assert torch.equal(sampler.sample(SHAPE), expected)
    assert calls == [0, 1]
    assert torch.equal(silent(lambda: sampler.sample(SHAPE)), expected)


def test_where_pytorch_lacks_what_a_capture_needs(graphs, monkeypatch):
    monkeypatch.setattr(HostRecorder, "lacks", lambda self: "torch._C._cuda_releasePool")
    sampler, expected = sampler_of(), sampler_of(graph="off").sample(SHAPE)
    with pytest.warns(UserWarning, match=r"PyTorch 2\S* has no torch._C._cuda_releasePool") as seen:
        assert torch.equal(sampler.sample(SHAPE), expected)
    assert len(seen) == 1
    silent(lambda: sampler.sample(SHAPE))
    assert not graphs


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_the_bar_counts_steps(steps, graphs, monkeypatch, capsys):
    monkeypatch.setattr("ddpm_fast.capture.graphs.STEPS", steps)
    sampler = sampler_of(num_steps=50)
    for start in (None, 7):
        x_T = None if start is None else torch.zeros(SHAPE)
        sampler.sample(SHAPE, progress=True, start=start, x_T=x_T)
        count = 50 - (start or 0)
        assert f"{count}/{count}" in capsys.readouterr().err
    assert HostRecorder.marks >= 4
