"""Steps that are captured and played again: the loop's bits, on an emulation of CUDA's graphs."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from graph_cases import (
    CASES,
    GUIDED,
    LAST,
    SHAPE,
    SHIFTS,
    Net,
    assert_played,
    assert_same,
    diffusers_model,
    drawn,
    graphs_on_host,  # noqa: F401
    model,
    rows_as_on_a_device,  # noqa: F401
    sampler_of,
    unet,
)
from graph_on_host import ERROR, HostGraph, HostMark, HostRecorder

from ddpm_fast.capture import recorder
from ddpm_fast.capture.graphs import KEPT

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_emulation_is_of_a_graph():
    """Nothing is done when it is recorded, and nothing of Python when it is played."""
    x, calls, made = torch.ones(3), [], []

    def work():
        calls.append(1)
        made.append(x + len(calls))
        x.mul_(2).add_(made[0])

    recording = HostGraph()
    recording.capture(work)
    assert torch.equal(x, torch.ones(3))
    assert made[0].isnan().all()
    for expected in (2.0 + 2.0, 8.0 + 5.0):
        recording.replay()
        assert x[0] == expected
    assert made[0][0] == 5
    assert len(calls) == 1
    for waits in (x[0].item, x.tolist, x.nonzero, lambda: bool(x[0]), lambda: x[x > 0]):
        with pytest.raises(RuntimeError, match=ERROR):
            HostGraph().capture(waits)


@pytest.mark.parametrize("name", CASES)
def test_bits_of_the_loop(name, graphs):
    function, arguments, call = CASES[name]
    assert_played(sampler_of(function, **arguments), graphs, **call)


def test_of_diffusers(graphs):
    assert_played(sampler_of(diffusers_model(), plan="off"), graphs, (2, 3, 8, 8))


@pytest.mark.parametrize("options", [{}, {"plan_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("of", [unet, diffusers_model])
def test_plans(of, options, graphs, rows_on_device):
    plan = {"plan": ["time_table", "fused_qkv", "phase_upsample", "group_norm_silu"]}
    sampler = sampler_of(of(), **plan, **options)
    assert_played(sampler, graphs, (2, 3, 8, 8))
    with torch.no_grad():  # weights that are prepared again
        next(sampler.model.parameters()).mul_(1.5)
    assert_played(sampler, graphs, (2, 3, 8, 8))
    assert len(sampler._graphs._kept) == 2


def test_one_capture_serves_other_values(graphs):
    sampler = sampler_of(guidance_scale=1.5)
    for seed, ids, scale in ((1, None, 1.5), (2**63, [7, 8, 9, 3], 0.0), (5, None, 4.0)):
        sampler.guidance_scale = scale
        arguments = {"model_kwargs": {"shift": SHIFTS * seed / 9}, "uncond_kwargs": {}}
        captures = 0 if graphs else 2
        assert_played(sampler, graphs, seed=seed, sample_ids=ids, captures=captures, **arguments)
    seeds = torch.arange(4)
    assert_played(sampler, graphs, seed=seeds, captures=0, **arguments)


def test_layouts_are_captured_each(graphs):
    sampler = sampler_of()
    for x_T in (LAST, LAST.contiguous(), LAST):
        assert_played(sampler, graphs, x_T=x_T, captures=2 if len(graphs) < 4 else 0)


def test_python_is_not_asked(graphs):
    calls = []

    def counted(x, t):
        calls.append(1)
        return model(x, t)

    sampler = sampler_of(counted, num_steps=200)
    sampler.sample(SHAPE)
    assert len(calls) < 10
    before = len(calls)
    sampler.sample(SHAPE, seed=1)
    assert len(calls) == before + 1  # a look at whether it is still the one


def test_states_may_be_changed(graphs):
    known = torch.linspace(-0.9, 0.9, 8).expand(SHAPE)

    def paste(step):
        step.x[..., :4] = known[..., :4]

    for low in (model, Net(torch.bfloat16)):
        sampler = sampler_of(low)
        found = sampler.sample(SHAPE, seed=1, callback=paste)
        sampler.graph = "off"
        assert torch.equal(found, sampler.sample(SHAPE, seed=1, callback=paste))
        assert torch.equal(found[..., :4], known[..., :4])
    assert len(graphs) == 2


def test_states_may_be_kept(graphs):
    steps = list(sampler_of().stream(SHAPE, seed=1))
    assert len({step.x.data_ptr() for step in steps}) == 20
    assert len({step.x0.data_ptr() for step in steps}) == 20
    assert graphs
    x = torch.zeros(SHAPE)
    sampler_of().sample(SHAPE, x_T=x, start=0)
    assert not x.any()


@pytest.mark.parametrize("when", [0, 1, 6, 18])
@pytest.mark.parametrize(
    "change",
    [
        lambda sampler, kwargs, i: setattr(sampler, "guidance_scale", 1.0 + i),
        lambda sampler, kwargs, i: setattr(sampler, "guidance_scale", SHIFTS + i),
        lambda sampler, kwargs, i: setattr(sampler, "clip", (-0.1, 0.1)),
        lambda sampler, kwargs, i: setattr(sampler, "denoised_fn", torch.tanh),
        lambda sampler, kwargs, i: setattr(sampler, "dynamic_threshold", 0.5),
        lambda sampler, kwargs, i: setattr(sampler, "backend", "reference"),
        lambda sampler, kwargs, i: kwargs["shift"].add_(0.1),
        lambda sampler, kwargs, i: kwargs["shift"].data.add_(0.1),
    ],
)  # fmt: skip
def test_a_callback_changes_what_steps_read(change, when, graphs):
    def found(how):
        sampler = sampler_of(guidance_scale=1.5, graph=how)
        kwargs = {"shift": SHIFTS.clone()}

        def callback(step):
            if step.step >= when:
                change(sampler, kwargs, step.step)

        return sampler.sample(SHAPE, callback=callback, model_kwargs=kwargs, uncond_kwargs={})

    assert torch.equal(found("auto"), found("off"))
    assert len(graphs) == 1


def test_two_streams_of_one_sampler(graphs):
    sampler = sampler_of()
    expected = [drawn(sampler_of(graph="off"), seed=seed)[:40] for seed in (1, 2)]
    pairs = zip(sampler.stream(SHAPE, seed=1), sampler.stream(SHAPE, seed=2), strict=True)
    for i, (a, b) in enumerate(pairs):
        assert_same([a.x, a.x0], expected[0][2 * i : 2 * i + 2])
        assert_same([b.x, b.x0], expected[1][2 * i : 2 * i + 2])
    assert sum(bool(each.replays) for each in graphs) == len(graphs)
    for _ in range(2):  # one that is left gives way to the next
        left = sampler.stream(SHAPE, seed=1)
        next(left)
        assert sampler._graphs._kept.popitem()[1].lock.locked()
        left.close()
        before = len(graphs)
        assert_same(drawn(sampler, seed=2)[:40], expected[1])
        assert len(graphs) > before


def test_an_error_in_a_callback_gives_the_buffers_back(graphs):
    def fail(step):
        raise KeyError("theirs")

    sampler = sampler_of()
    for _ in range(2):
        with pytest.raises(KeyError, match="theirs"):
            sampler.sample(SHAPE, callback=fail)
    assert_played(sampler, graphs, captures=1)
    assert len(graphs) == 2


def test_threads(graphs, monkeypatch):
    """Of one sampler and of another: each step has one user, and there is one capture at a time."""
    samplers, aside, turn = [sampler_of(num_steps=30) for _ in range(2)], HostRecorder.aside, []

    def alone(self, work):
        turn.append(1)
        time.sleep(0.01)  # the others come now
        aside(self, work)
        assert turn.pop() == 1
        assert not turn

    monkeypatch.setattr(HostRecorder, "aside", alone)
    off = sampler_of(num_steps=30, graph="off")
    expected = [off.sample(SHAPE, seed=seed) for seed in range(4)]

    def draw(seed):
        for i in range(8):
            if not torch.equal(samplers[(seed + i) % 2].sample(SHAPE, seed=seed), expected[seed]):
                raise AssertionError(seed)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(draw, range(4)))
    for sampler in samplers:  # nothing is held
        before = sum(each.replays for each in graphs)
        assert torch.equal(sampler.sample(SHAPE, seed=3), expected[3])
        assert sum(each.replays for each in graphs) > before + 30


def test_nan_is_named_with_its_step(graphs):
    def turns_nan(x, t):
        return torch.where(t.reshape(-1, 1, 1, 1) == 600, math.nan, model(x, t))

    sampler = sampler_of(turns_nan)
    for call in (sampler.sample, lambda shape: list(sampler.stream(shape))):
        with pytest.raises(FloatingPointError, match="turned NaN at step 7, t = 600"):
            call(SHAPE)
    assert len(graphs) == 2
    sampler = sampler_of(lambda x, t: model(x, t) / (t.reshape(-1, 1, 1, 1) < 900))
    with pytest.raises(FloatingPointError, match="turned NaN at step 0, t = 950"):
        sampler.sample(SHAPE)


def test_inside_inference_mode_and_out(graphs):
    sampler = sampler_of()
    with torch.inference_mode():
        inside = drawn(sampler)
    assert_same([tensor.clone() for tensor in inside], drawn(sampler))
    assert_played(sampler, graphs, captures=0)


@pytest.mark.parametrize("steps", [2, 3, 7, 50])
def test_several_steps_a_graph(steps, graphs, monkeypatch):
    monkeypatch.setattr("ddpm_fast.capture.graphs.STEPS", steps)
    sampler = sampler_of(Net(torch.bfloat16), graph="off")
    expected = sampler.sample(SHAPE, seed=1)
    sampler.graph = "auto"
    assert torch.equal(sampler.sample(SHAPE, seed=1), expected)
    many = [20 // steps] if steps <= 20 else []
    assert [each.replays for each in graphs] == [2 + 20 % steps, *many]


def test_progress_is_of_the_device(graphs, capsys, monkeypatch):
    waited = []
    sampler = sampler_of(num_steps=100)
    monkeypatch.setattr(HostMark, "synchronize", lambda self: waited.append(1))
    sampler.sample(SHAPE, progress=True)
    assert "100/100" in capsys.readouterr().err
    assert HostRecorder.marks == 100 // recorder.PACE + 1
    assert len(waited) == 100 // recorder.PACE


def test_states_are_saved_on_the_way(graphs, tmp_path):
    sampler = sampler_of(graph="off")
    expected = sampler.sample(SHAPE, seed=1)
    sampler.graph = "auto"
    arguments = {"seed": 1, "checkpoint": tmp_path / "state", "checkpoint_every": 3}

    def stop(step):
        if step.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.sample(SHAPE, callback=stop, **arguments)
    assert torch.equal(sampler.sample(SHAPE, **arguments), expected)
    assert torch.equal(sampler.sample(SHAPE, **arguments), expected)  # nothing is left to do
    assert len(graphs) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_capture_for_themselves(copied, graphs):
    sampler = sampler_of(Net())
    expected = sampler.sample(SHAPE, seed=1)
    again = copied(sampler)
    assert not again._graphs._kept
    assert torch.equal(again.sample(SHAPE, seed=1), expected)
    assert len(graphs) == 2


def test_memory_is_bounded(graphs):
    sampler = sampler_of()
    held = []
    for n, twice in itertools.product(range(1, 9), (1, 2)):
        assert_same([sampler.sample((n, 3, 8, 8), seed=twice)],
                    [sampler_of(graph="off").sample((n, 3, 8, 8), seed=twice)])  # fmt: skip
        held.append(weakref.ref(next(reversed(sampler._graphs._kept.values()))))
    assert len(graphs) == 8
    assert sum(each() is not None for each in held[::2]) == KEPT
    graphs.clear()
    del sampler
    assert not any(each() for each in held)


def test_short_trajectories_are_captured_when_they_are_many(graphs):
    sampler = sampler_of(num_steps=6)
    for i in range(5):
        drawn_now = sampler.sample(SHAPE, **GUIDED | {"uncond_kwargs": None, "seed": i})
        assert len(graphs) == (i >= 2)
        off = sampler_of(num_steps=6, graph="off")
        assert torch.equal(
            drawn_now, off.sample(SHAPE, model_kwargs=GUIDED["model_kwargs"], seed=i)
        )
    x = torch.zeros(SHAPE)
    before = graphs[0].replays
    sampler.sample(SHAPE, x_T=x, start=4, model_kwargs=GUIDED["model_kwargs"])
    assert graphs[0].replays == before
