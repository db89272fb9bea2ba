"""Thousands of calls, and the process is as large as before: memory, files, threads."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from checkpoint_cases import unet

from ddpm_fast import (
    NoiseSchedule,
    Sampler,
    add_noise,
    denoising_loss,
    group_norm_silu,
    hybrid_loss,
    randn,
    reverse_step,
    vlb_terms,
)
from ddpm_fast.backends import native
from ddpm_fast.engine import prepare
from ddpm_fast.nn.native_layers import Conv, attention_call

psutil = pytest.importorskip("psutil")
pytestmark = [
    pytest.mark.skipif(native is None, reason="installed without compiled kernels"),
    pytest.mark.usefixtures("one_thread"),
]
SCHEDULE = NoiseSchedule.linear(10)
TABLE = SCHEDULE.step_table(prediction="epsilon", variance="learned_range")
X, M = randn([2, 8, 6, 5], seed=0), randn([2, 16, 6, 5], seed=1)
X_LAST, M_LAST = (t.contiguous(memory_format=torch.channels_last) for t in (X, M))
NOTHING: list[torch.Tensor] = []


def with_gradient(op, *arguments, **options):
    m = M_LAST.detach().requires_grad_()
    op(m, *arguments, seed=0, variance="learned_range", **options).sum().backward()


def normed():
    x = X.detach().requires_grad_()
    group_norm_silu(x, 4, emb=torch.ones(2, 8), residual=X)[0].sum().backward()
    group_norm_silu(X_LAST, 4, emb=torch.ones(2, 8), residual=X_LAST)


def convolutions():
    image = torch.zeros(1, 8, 8, 8)
    calls = []
    for way in ({}, {"winograd": True}, {"phases": True}, {"phases": True, "winograd": True}):
        side = 12 if "phases" in way else 6
        conv = Conv(torch.ones(5, 8, 3, 3), torch.ones(5), **way)
        calls.append(conv.call(image, torch.empty(1, side, side, 5)))
    calls.append(attention_call(torch.ones(1, 6, 6, 24), 2, torch.empty(1, 6, 6, 8), True))
    for call in calls:
        call(NOTHING, 2)


def refused():
    """An error on the way takes what was there with it."""
    with pytest.raises(ValueError, match="step must lie in"):
        reverse_step(X, M, TABLE, 99, seed=0)
    with pytest.raises(TypeError):
        native.randn("nowhere")
    with pytest.raises(ValueError, match="instruction set"):
        native.set_isa("mmx")


CALLS = {
    "randn": lambda: randn([2, 300], seed=torch.tensor([1, 2]), sample_ids=[5, 6]),
    "add_noise": lambda: add_noise(X_LAST.bfloat16(), torch.tensor([1, 2]), SCHEDULE, seed=0),
    "reverse_step": lambda: reverse_step(X_LAST, M, TABLE, 3, seed=0, return_x0=True),
    "denoising_loss": lambda: with_gradient(denoising_loss, 3, SCHEDULE),
    "vlb_terms": lambda: with_gradient(vlb_terms, X, 0, SCHEDULE),
    "hybrid_loss": lambda: with_gradient(hybrid_loss, X, 4, SCHEDULE),
    "group_norm_silu": normed,
    "convolutions": convolutions,
    "refused": refused,
}


def size():
    gc.collect()
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds(), process.num_threads()


def assert_flat(call, rounds, bytes_a_call):
    """What is kept on purpose is there after the first rounds; ``bytes_a_call`` that are lost in
    each call are seen, fewer are not."""
    for _ in range(rounds // 4):
        call()
    grown = []
    for _ in range(3):  # the allocator has its own ways: one round that takes nothing is enough
        before = size()
        for _ in range(rounds):
            call()
        after = size()
        assert after[1] <= before[1], "files that stay open"
        assert after[2] <= before[2], "threads that stay"
        grown.append(after[0] - before[0])
        if grown[-1] <= rounds * bytes_a_call:
            return
    raise AssertionError(f"grown by {grown} bytes in {rounds} calls")


@pytest.mark.parametrize("name", CALLS)
def test_native_calls(name):
    assert_flat(CALLS[name], 1200, 100)


def test_prepared_models_are_let_go():
    model = unet()

    def call():
        prepare(model)(X[:, :2].repeat(1, 1, 2, 2)[..., :8, :8], torch.tensor([3, 4]))

    assert_flat(call, 12, 20_000)


def test_trajectories():
    sampler = Sampler(unet(), NoiseSchedule.linear(100), num_steps=2)
    seeds = itertools.count()
    assert_flat(lambda: sampler.sample([2, 2, 8, 8], seed=next(seeds)), 150, 2000)
    assert_flat(lambda: list(sampler.stream([1, 2, 8, 8], seed=next(seeds))), 50, 5000)


def test_sessions():
    """Samples of one session, some cancelled and some whose handle nobody keeps; and sessions."""
    sampler = Sampler(unet(), NoiseSchedule.linear(100), num_steps=2)
    seeds = itertools.count()
    with sampler.session((2, 8, 8), max_batch=2) as session:

        def call():
            session.submit(seed=next(seeds)).cancel()
            session.submit(seed=next(seeds))
            session.submit(seed=next(seeds)).result()

        assert_flat(call, 150, 3000)

    def whole():
        with sampler.session((2, 8, 8), max_batch=2) as other:
            other.submit(seed=next(seeds)).result()

    assert_flat(whole, 50, 20_000)
