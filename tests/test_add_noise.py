"""add_noise against eq. 4 in float64, over dtypes, shapes, layouts and instruction sets."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, LAYOUTS, SHAPES, assert_as_good_as_eager, laid_out

from ddpm_fast import NoiseSchedule, add_noise, randn, reference, use_backend

SCHEDULE = NoiseSchedule.cosine()
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def data(shape, dtype, seed=17):
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).byte()
    return randn(shape, seed=seed).clamp(-1, 1).to(dtype)


def timesteps(n):
    return torch.tensor([0, 999, 500, 123])[:n] if n else torch.empty(0, dtype=torch.int64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, layout, isa):
    values = data(shape, dtype)
    x0 = laid_out(values, layout)
    t = timesteps(shape[0])
    out = add_noise(x0, t, SCHEDULE, seed=5, index=3)
    eps = randn(shape, seed=5, stream=2, index=3)
    wide = reference.unit_from_pixel(values.double()) if dtype == torch.uint8 else values.double()
    exact = reference.q_sample(wide, t, SCHEDULE, eps.double())
    low = out.dtype
    assert low == (torch.float32 if dtype == torch.uint8 else dtype)
    signal, sigma = (
        reference.at(table, t, wide).to(low)
        for table in (SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod)
    )
    assert_as_good_as_eager(out, signal * wide.to(low) + sigma * eps.to(low), exact)
    if layout != "strided" and x0.numel():
        assert out.stride() == x0.stride()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
def test_same_bits_everywhere(dtype, isa):
    """Layouts, instruction sets and the reference backend agree to the last bit."""
    x0, t = data((3, 3, 21, 19), dtype), timesteps(3)
    with use_backend("reference"):
        expected = add_noise(x0, t, SCHEDULE, seed=5, sample_ids=[9, 2, 4])
    for layout in LAYOUTS:
        out = add_noise(laid_out(x0, layout), t, SCHEDULE, seed=5, sample_ids=[9, 2, 4])
        assert torch.equal(out, expected)


def test_pixels_reach_both_ends_exactly(isa):
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    clean = NoiseSchedule([1e-30])
    x = add_noise(pixels, 0, clean, seed=0)
    assert x[0, 0] == -1
    assert x[0, 255] == 1
    exact = pixels.double() / 127.5 - 1
    assert (x.double() - exact).abs().max() < 6e-8


def test_given_noise_and_dtype():
    x0, t = data((2, 3, 8, 8), torch.float32), timesteps(2)
    z = randn([2, 3, 8, 8], seed=5, stream=2)
    drawn = add_noise(x0, t, SCHEDULE, seed=5)
    assert torch.equal(add_noise(x0, t, SCHEDULE, seed=99, noise=z), drawn)
    last = z.to(memory_format=torch.channels_last)
    assert torch.equal(add_noise(x0, t, SCHEDULE, seed=99, noise=last), drawn)
    for dtype in DTYPES:
        assert torch.equal(add_noise(x0, t, SCHEDULE, seed=5, dtype=dtype), drawn.to(dtype))
    assert torch.equal(add_noise(x0, 999, SCHEDULE, seed=5)[1], drawn[1])
    low = add_noise(x0, t, SCHEDULE, seed=0, noise=z.bfloat16())
    exact = reference.q_sample(x0.double(), t, SCHEDULE, z.bfloat16().double())
    assert (low.double() - exact).abs().max() < 1e-6


def test_repeats_with_defaults_and_differs_with_ids():
    x0 = data((2, 12), torch.float32)
    assert torch.equal(add_noise(x0, 9, SCHEDULE, seed=5), add_noise(x0, 9, SCHEDULE, seed=5))
    other = add_noise(x0, 9, SCHEDULE, seed=5, sample_ids=[2, 3])
    assert not torch.equal(other, add_noise(x0, 9, SCHEDULE, seed=5))
    assert not torch.equal(
        add_noise(x0, 9, SCHEDULE, seed=5, index=1), add_noise(x0, 9, SCHEDULE, seed=5)
    )


def test_streams_and_an_index_a_sample(isa):
    x0, t = data((3, 3, 8, 8), torch.float32), timesteps(3)
    index = torch.tensor([5, 2**24 - 1, 0])
    found = add_noise(x0, t, SCHEDULE, seed=5, stream=4, index=index)
    eps = randn(x0.shape, seed=5, stream=4, index=index)
    assert torch.equal(found, add_noise(x0, t, SCHEDULE, seed=5, noise=eps))
    assert not torch.equal(found, add_noise(x0, t, SCHEDULE, seed=5, index=index))
    with use_backend("reference"):
        assert torch.equal(found, add_noise(x0, t, SCHEDULE, seed=5, stream=4, index=index))


def test_gradient():
    x0 = data((3, 2, 3, 3), torch.float32).requires_grad_()
    t = timesteps(3)
    weight = randn(x0.shape, seed=1)
    (add_noise(x0, t, SCHEDULE, seed=5) * weight).sum().backward()
    signal = reference.at(SCHEDULE.sqrt_alphas_cumprod, t, weight)
    torch.testing.assert_close(x0.grad, signal * weight)
    # and against differences of the op itself, which is affine in x0
    base = add_noise(x0.detach(), t, SCHEDULE, seed=5)
    moved = add_noise(x0.detach() + weight, t, SCHEDULE, seed=5)
    torch.testing.assert_close(((moved - base) * weight).sum(), (x0.grad * weight).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_in_low_precision(dtype, layout):
    x0 = laid_out(data((3, 2, 3, 4), dtype), layout).requires_grad_()
    add_noise(x0, 500, SCHEDULE, seed=5).float().sum().backward()
    signal = SCHEDULE.sqrt_alphas_cumprod[500].to(dtype)
    assert torch.equal(x0.grad, signal.expand_as(x0))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
def test_opcheck(dtype):
    x0 = data((3, 2, 5, 7), dtype)
    weights = SCHEDULE.forward_weights(x0.device)
    t, ids = timesteps(3), torch.tensor([5, 6, 7])
    op = torch.ops.ddpm_fast.add_noise.default
    low = torch.bfloat16 if dtype == torch.uint8 else dtype
    torch.library.opcheck(op, (x0, 3, None, weights, 1, None, None, 2, 0, None, None, low))
    last = x0.to(memory_format=torch.channels_last)
    noise = randn(x0.shape, seed=3)
    arguments = (t, weights, 1, ids, ids, 2, 0, ids, noise, torch.float32)
    torch.library.opcheck(op, (last, 0, *arguments))
    if dtype == torch.float32:
        torch.library.opcheck(
            op, (x0.requires_grad_(), 0, t, weights, 1, None, ids, 2, 0, None, None, torch.float32)
        )


def test_compiles_whole():
    def f(x0, t):
        return add_noise(x0, t, SCHEDULE, seed=7) + 1

    x0, t = data((3, 2, 5, 7), torch.float32), timesteps(3)
    assert torch.equal(torch.compile(f, fullgraph=True)(x0, t), f(x0, t))


X0 = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("x0", "t", "arguments", "error", "message"),
    [
        (X0.double(), 0, {}, TypeError, "x0 must be float32, bfloat16, float16, uint8"),
        (X0.int(), 0, {}, TypeError, "x0 must be float32"),
        ([1.0], 0, {}, TypeError, "x0 must be a tensor; got list"),
        (X0[0, 0, 0, 0], 0, {}, ValueError, "first dimension of samples"),
        (X0, 1000, {}, ValueError, "t must lie in 0 … 999; got 1000"),
        (X0, -1, {}, ValueError, "t must lie in 0 … 999; got -1"),
        (X0, 1.0, {}, TypeError, "t must be an integer; got 1.0"),
        (X0, torch.tensor([0, 1000]), {}, ValueError, "t must lie in 0 … 999; got 0 … 1000"),
        (X0, torch.tensor([0, 1, 2]), {}, ValueError, r"t must have shape \[2\]"),
        (X0, torch.tensor([0.0, 1.0]), {}, TypeError, "t must be int64"),
        (X0, 0, {"noise": X0[:1]}, ValueError, "noise must have shape"),
        (X0, 0, {"noise": X0.double()}, TypeError, "noise must be float32"),
        (X0, 0, {"dtype": torch.float64}, TypeError, "dtype must be float32"),
        (X0, 0, {"index": -1}, ValueError, "index must lie in"),
        (X0, 0, {"index": 1.5}, TypeError, "index must be an integer"),
        (X0, 0, {"index": torch.tensor([0, -1])}, ValueError, "index must lie in 0 … 16777215"),
        (X0, 0, {"index": torch.tensor(3)}, ValueError, r"index must have shape \[2\]"),
        (X0, 0, {"stream": 256}, ValueError, "stream must lie in 0 … 255; got 256"),
        (X0, 0, {"sample_ids": [1, 2, 3]}, ValueError, r"sample_ids must have shape \[2\]"),
        (X0, torch.zeros(2, dtype=torch.int64, device="meta"), {}, ValueError, "t must be on cpu"),
    ],
)
def test_bad_arguments(x0, t, arguments, error, message):
    with pytest.raises(error, match=message):
        add_noise(x0, t, SCHEDULE, **{"seed": 0, **arguments})
