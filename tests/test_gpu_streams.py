"""The kernels on a GPU as part of its work: graphs, streams, nothing that waits, several GPUs, the
sampler and torch.compile."""

from __future__ import annotations

import pytest
import torch
from gpu_backends import (
    gpu,
    on_each,  # noqa: F401
    same,
)
from reverse_step_cases import SCHEDULE, inputs, table_of

from ddpm_fast import Sampler, add_noise, randn, reverse_step, use_backend

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("counted", [(), (4,)], ids=["one row", "a row a sample"])
def test_a_captured_step_serves_every_step(counted, on):
    """One graph of a step and its counter; inputs, seeds and scales change between replays."""
    table = table_of(num_steps=20).to("cuda")
    shape = (4, 3, 32, 32)
    x, m, uncond = (torch.zeros(shape, device="cuda") for _ in range(3))
    counter = torch.zeros(counted, dtype=torch.int64, device="cuda")
    seeds, ids = (torch.zeros(4, dtype=torch.int64, device="cuda") for _ in range(2))
    scale = torch.ones(counted, device="cuda")

    def step():
        on.reverse_step(x, m, table, counter, seed=seeds, sample_ids=ids, out=x,
                        model_output_uncond=uncond, guidance_scale=scale)  # fmt: skip
        counter.add_(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for run in range(2):
        start = randn(shape, seed=run)
        seeds.fill_(run + 5)
        ids.copy_(torch.arange(4) * 7 + run)
        scale.fill_(1.5 + run)
        x.copy_(start)
        counter.zero_()
        expected = start
        for row in range(len(table)):
            outputs = [randn(shape, seed=1000 * run + 2 * row + i).mul_(0.1) for i in (0, 1)]
            m.copy_(outputs[0])
            uncond.copy_(outputs[1])
            graph.replay()
            expected = reverse_step(
                expected, outputs[0], table, row, seed=run + 5, model_output_uncond=outputs[1],
                sample_ids=torch.arange(4) * 7 + run, guidance_scale=1.5 + run,
            )  # fmt: skip
            same(x, expected)


def test_the_current_stream_is_used(on):
    """Behind work that takes a while: on the wrong stream the kernel would come too soon."""
    table = table_of(num_steps=50).to("cuda")
    x, m, _ = inputs((2, 3, 32, 32), torch.float32, table)
    expected = reverse_step(x, m, table, 7, seed=1)
    source, target, m = x.cuda(), torch.zeros_like(x, device="cuda"), m.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on.reverse_step(target, m, table, 7, seed=1)  # loads the kernel, and leaves memory for it
        torch.cuda._sleep(1_000_000_000)
        target.copy_(source)
        out = on.reverse_step(target, m, table, 7, seed=1)
        assert not side.query()  # the host has come here first
    side.synchronize()
    same(out, expected)


def test_nothing_waits_for_the_gpu(on):
    table = table_of(num_steps=50).to("cuda")
    x, m, _ = (gpu(tensor) for tensor in inputs((2, 3, 32, 32), torch.float32, table_of()))
    steps, seeds = torch.tensor([3, 4]).cuda(), torch.tensor([8, 9]).cuda()
    word = torch.full((1,), 99, dtype=torch.int32, device="cuda")
    SCHEDULE.forward_weights(x.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (7, steps, steps[0]):
            on.reverse_step(x, m, table, step, seed=seeds, sample_ids=seeds, nan_step=word, out=x)
            on.add_noise(x, steps, SCHEDULE, seed=seeds)
            on.randn(x.shape, seed=seeds, index=steps, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_gpu_of_the_machine(on):
    """Tensors of a GPU that is not the current one."""
    table = table_of(num_steps=50)
    x, m, _ = inputs((2, 3, 32, 32), torch.float32, table)
    expected = reverse_step(x, m, table, 7, seed=1)
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        found = on.reverse_step(x.to(device), m.to(device), table, 7, seed=1)
        assert torch.equal(found.cpu(), expected)
        assert torch.cuda.current_device() == 0
    if torch.cuda.device_count() == 1:
        pytest.skip("one GPU: another that is not the current one could not be tried")


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_sampler(low, on):
    """A model whose arithmetic is exact: the samples are the CPU's to the last bit."""

    class Halves(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((), 0.5, dtype=low or torch.float32))

        def forward(self, x, t):
            return x * self.weight

    def samples(device, backend):
        model, kwargs = Halves().to(device).eval(), {"variance": "fixed_large", "num_steps": 25}
        sampler = Sampler(model, SCHEDULE, backend=backend, **kwargs)
        return sampler.sample([3, 3, 32, 32], seed=4, sample_ids=[5, 9, 2**40])

    assert torch.equal(samples("cuda", on.name).cpu(), samples("cpu", "cpu"))


def test_compiles_whole(on):
    table = table_of(num_steps=50).to("cuda")
    x, m, _ = (gpu(tensor) for tensor in inputs((2, 3, 16, 16), torch.float32, table_of()))

    def f(x, m):
        noise = randn(x.shape, seed=1, device="cuda")
        return reverse_step(x, m, table, 7, seed=1) + add_noise(x, 3, SCHEDULE, seed=1) + noise

    with use_backend(on.name):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, m), f(x, m))
