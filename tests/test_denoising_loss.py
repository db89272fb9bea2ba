"""denoising_loss against eq. 14 in float64, over dtypes, shapes, layouts and instruction sets."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from helpers import DTYPES, LAYOUTS, SHAPES, assert_as_good_as_eager, laid_out

from ddpm_fast import NoiseSchedule, denoising_loss, randn, reference, use_backend
from ddpm_fast.schedule import Prediction

SCHEDULE = NoiseSchedule.cosine()
PREDICTIONS = get_args(Prediction)
T = torch.tensor([0, 999, 500])
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def pixels(shape, seed=17):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).byte()


def target(shape, x0, prediction, **address):
    """In float64."""
    eps = randn(shape, **{"stream": 2, **address}).double()
    x0 = reference.unit_from_pixel(x0.double())
    return reference.denoising_target(x0, eps, T[: shape[0]], SCHEDULE, prediction)


def loss_and_gradient(output, *args, **kwargs):
    output = output.detach().requires_grad_()
    losses = denoising_loss(output, *args, **kwargs)
    losses.sum().backward()
    return losses.detach(), output.grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] and s[1]], ids=str)
def test_against_float64(shape, prediction, dtype, layout, isa):
    x0 = pixels(shape)
    t = T[: shape[0]]
    address = {"seed": 5, "sample_ids": [7, 3, 2**40][: shape[0]], "index": 3}
    wide = target(shape, x0, prediction, **address)
    output = laid_out((wide + randn(shape, seed=9)).to(dtype), layout)
    losses, gradient = loss_and_gradient(
        output, t, SCHEDULE, prediction=prediction, x0=laid_out(x0, layout), **address
    )
    m = output.double().requires_grad_()
    exact = reference.regression(wide, m)
    exact.sum().backward()
    m_low = output.detach().clone().requires_grad_()
    eager = reference.regression(wide.to(dtype), m_low)
    eager.sum().backward()
    assert losses.dtype == torch.float32
    assert_as_good_as_eager(losses, eager.detach(), exact.detach())
    # scaled to about 1, so that the ulp allowed is one of the gradient's own
    scale = 2.0 ** (m.grad.abs().max().log2().ceil().item())
    assert_as_good_as_eager(gradient / scale, m_low.grad / scale, m.grad / scale)
    if layout != "strided":
        assert gradient.stride() == output.stride()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_like_the_reference_backend(prediction, layout, isa):
    shape = (3, 3, 21, 19)
    x0, output = laid_out(pixels(shape), layout), laid_out(randn(shape, seed=3), layout)
    arguments = {"prediction": prediction, "x0": x0, "seed": 5}
    losses, gradient = loss_and_gradient(output, T, SCHEDULE, **arguments)
    with use_backend("reference"):
        expected, expected_gradient = loss_and_gradient(output, T, SCHEDULE, **arguments)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=3e-7, atol=0)


def test_sums_have_one_order():
    """The same bits for each instruction set, number of threads and split of the batch."""
    from ddpm_fast.backends import native

    if native is None:
        pytest.skip("installed without compiled kernels")
    shape = (6, 3, 67, 65)
    output, x0 = randn(shape, seed=3), pixels(shape)
    t = torch.tensor([0, 999, 500, 3, 7, 100])
    ids = torch.arange(50, 56)

    def losses(part=slice(None)):
        return denoising_loss(
            output[part], t[part], SCHEDULE, prediction="v_prediction", x0=x0[part], seed=1,
            sample_ids=ids[part],
        )  # fmt: skip

    expected, threads, isa = losses(), torch.get_num_threads(), native.isa()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(losses(), expected)
        for name in native.supported_isas():
            native.set_isa(name)
            assert torch.equal(losses(), expected)
    finally:
        torch.set_num_threads(threads)
        native.set_isa(isa)
    for size in (1, 2, 4):
        parts = [losses(slice(i, i + size)) for i in range(0, 6, size)]
        assert torch.equal(torch.cat(parts), expected)


def test_is_the_mean_over_randn():
    """mean((ε − ε_θ)²) with ε drawn by randn at the same address; 0 where the model is right."""
    shape = (3, 2, 16, 16)
    for stream, index in ((2, 0), (2, 5), (4, torch.tensor([9, 2**24 - 1, 0]))):
        address = {"seed": torch.tensor([1, -2, 3]), "stream": stream, "index": index}
        eps = randn(shape, **address)
        assert torch.equal(denoising_loss(eps, T, SCHEDULE, **address), torch.zeros(3))
        output = randn(shape, seed=8)
        expected = ((eps.double() - output.double()) ** 2).flatten(1).mean(1)
        found = denoising_loss(output, T, SCHEDULE, **address)
        torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=0)
        given = denoising_loss(output, T, SCHEDULE, seed=99, noise=eps)
        assert torch.equal(given, found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_half_is_left_alone(dtype, layout, isa):
    shape = (3, 3, 9, 8)
    both = torch.cat([randn(shape, seed=3), torch.full(shape, torch.nan)], 1).to(dtype)
    output = laid_out(both, layout)
    first = output.chunk(2, 1)[0].contiguous()
    losses, gradient = loss_and_gradient(output, T, SCHEDULE, variance="learned_range", seed=2)
    expected, expected_gradient = loss_and_gradient(first, T, SCHEDULE, seed=2)
    torch.testing.assert_close(losses, expected, rtol=3e-7, atol=0)
    # float16's is kept times another power of two, twice as many elements being there
    rtol = 1e-3 if dtype == torch.float16 else 0
    torch.testing.assert_close(gradient.chunk(2, 1)[0], expected_gradient, rtol=rtol, atol=1e-7)
    assert torch.equal(gradient.chunk(2, 1)[1], torch.zeros(shape, dtype=dtype))


def test_weights_and_upstream_gradients():
    shape = (3, 2, 5, 7)
    output, weights = randn(shape, seed=1), torch.tensor([0.5, 0.0, 3.0])
    losses, gradient = loss_and_gradient(output, T, SCHEDULE, seed=2)
    weighted, weighted_gradient = loss_and_gradient(output, T, SCHEDULE, seed=2, weights=weights)
    torch.testing.assert_close(weighted, weights * losses)
    torch.testing.assert_close(weighted_gradient, gradient * weights.reshape(3, 1, 1, 1))
    m = output.clone().requires_grad_()
    found = denoising_loss(m, T, SCHEDULE, seed=2)
    (again,) = torch.autograd.grad(found, m, weights, retain_graph=True)
    torch.testing.assert_close(again, weighted_gradient)
    (once_more,) = torch.autograd.grad(found, m, torch.ones(3), retain_graph=True)
    assert torch.equal(once_more, gradient)
    batch = torch.stack([weights, torch.ones(3)])
    (both,) = torch.autograd.grad(found, m, batch, is_grads_batched=True, retain_graph=True)
    assert torch.equal(both, torch.stack([again, gradient]))
    (last,) = torch.autograd.grad(found, m, weights)
    assert torch.equal(last, again)


def test_half_precision_gradients_keep_their_digits():
    """A mean over many elements has gradients below float16's range before a loss is scaled."""
    shape = (2, 3, 128, 128)
    output = randn(shape, seed=1).half().requires_grad_()
    weights = torch.full((2,), 0.5)
    losses = denoising_loss(output, 500, SCHEDULE, seed=2, weights=weights)
    (losses.sum() * 65536).backward()
    eps = randn(shape, seed=2, stream=2).double()
    exact = 65536 * (output.detach().double() - eps) / eps[0].numel()
    torch.testing.assert_close(output.grad.double(), exact, rtol=1.5e-3, atol=2e-7)


def test_gradients_against_differences():
    """The reference in float64 by gradcheck, and the kernel's gradient against it."""
    eps = randn([2, 2, 3, 3], seed=4, stream=2).double()
    m = randn([2, 2, 3, 3], seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: reference.regression(eps, m), (m,))
    (exact,) = torch.autograd.grad(reference.regression(eps, m).sum(), m)
    by_hand = reference.regression_gradient(eps, m.detach(), torch.ones(2).double())
    torch.testing.assert_close(by_hand, exact)
    _, gradient = loss_and_gradient(m.float(), 3, SCHEDULE, seed=4)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-6, atol=1e-9)


def test_nothing_of_xs_size_is_stored_but_the_gradient():
    output = randn([4, 3, 64, 64], seed=1).requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        denoising_loss(output, 10, SCHEDULE, seed=2).sum().backward()
    allocated = [e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0]
    large = [size for size in allocated if size >= output.nbytes // 2]
    assert large == [output.nbytes]


def test_without_gradients_none_is_made():
    output = randn([2, 3, 8, 8], seed=1)
    expected = denoising_loss(output, 9, SCHEDULE, seed=2)
    with torch.no_grad():
        assert torch.equal(denoising_loss(output.requires_grad_(), 9, SCHEDULE, seed=2), expected)
    assert not expected.requires_grad


def test_opcheck():
    output, x0 = randn([3, 4, 5, 7], seed=1), pixels([3, 2, 5, 7])
    weights, ids = SCHEDULE.forward_weights(output.device), torch.tensor([5, 6, 7])
    op = torch.ops.ddpm_fast.denoising_loss.default
    simple = (None, 3, None, weights, 0, False, 1, None, None, 2, 0, None, None, None, False, 1.0)
    torch.library.opcheck(op, (output, *simple))
    last = output.to(memory_format=torch.channels_last).requires_grad_()
    arguments = (x0, 0, T, weights, 2, True, 1, ids, ids, 2, 0, ids, None, T.float(), True, 1.0)
    torch.library.opcheck(op, (last, *arguments))


def test_compiles_whole():
    def f(output, t):
        return denoising_loss(output * 2, t, SCHEDULE, seed=7).sum() + 1

    results = []
    for function in (f, torch.compile(f, fullgraph=True)):
        output = randn([3, 2, 5, 7], seed=1).requires_grad_()
        function(output, T).backward()
        results.append(output.grad)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


def test_empty():
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4)):
        losses, gradient = loss_and_gradient(torch.empty(shape), 3, SCHEDULE, seed=0)
        assert losses.shape == shape[:1]
        assert gradient.shape == shape
        assert losses.isnan().all()


M = torch.zeros(2, 4, 4, 4)


@pytest.mark.parametrize(
    ("output", "arguments", "error", "message"),
    [
        (M.double(), {}, TypeError, "model_output must be float32, bfloat16, float16"),
        ([1.0], {}, TypeError, "model_output must be a tensor; got list"),
        (M, {"prediction": "noise"}, ValueError, "prediction must be one of 'epsilon'"),
        (M, {"variance": "small"}, ValueError, "variance must be one of 'fixed_small'"),
        (M, {"prediction": "sample"}, ValueError, "prediction='sample' needs x0"),
        (M[:, :3], {"variance": "learned"}, ValueError, "even number of channels"),
        (M, {"x0": M[:1]}, ValueError, r"x0 must have shape \[2, 4, 4, 4\]"),
        (M, {"x0": M.double()}, TypeError, "x0 must be float32"),
        (M, {"noise": M[:, :2]}, ValueError, "noise must have shape"),
        (M, {"x0": M.clone().requires_grad_()}, ValueError, "x0 requires grad, but only"),
        (M, {"weights": torch.ones(2, requires_grad=True)}, ValueError, "weights requires grad"),
        (M, {"weights": torch.ones(3)}, ValueError, r"weights must have shape \[2\]"),
        (M, {"weights": torch.ones(2).double()}, TypeError, "weights must be float32"),
        (M, {"t": 1000}, ValueError, "t must lie in 0 … 999; got 1000"),
        (M, {"t": torch.tensor([0, -1])}, ValueError, "t must lie in 0 … 999; got -1 … 0"),
        (M, {"schedule": None}, TypeError, "schedule must be a NoiseSchedule"),
        (M, {"index": -1}, ValueError, "index must lie in"),
        (M, {"stream": 256}, ValueError, "stream must lie in 0 … 255"),
        (M, {"sample_ids": [1, -2]}, ValueError, "sample_ids must lie in"),
        (M, {"seed": -1}, ValueError, "seed must lie in"),
    ],
)
def test_bad_arguments(output, arguments, error, message):
    arguments = {"t": 0, "schedule": SCHEDULE, "seed": 0, **arguments}
    with pytest.raises(error, match=message):
        denoising_loss(output, arguments.pop("t"), arguments.pop("schedule"), **arguments)
