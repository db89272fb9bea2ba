"""denoising_loss, vlb_terms and hybrid_loss by Triton, in its interpreter: gradients with the bits
of the CPU's, sums that differ from the CPU's by float32's rounding and not at all with the batch,
and the decoder, which is float32 here and float64 there, against the formula."""

from __future__ import annotations

import itertools
import math
from importlib import import_module

import pytest
import torch
from helpers import DTYPES, laid_out
from test_vlb_terms import model_output, pixels, run
from triton_on_host import lend_arithmetic, needs_interpreter

from ddpm_fast import (
    NoiseSchedule,
    denoising_loss,
    hybrid_loss,
    randn,
    reference,
    use_backend,
    vlb_terms,
)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
decoder = pytest.importorskip("ddpm_fast.kernels.decoder")

SCHEDULE = NoiseSchedule.cosine(200)
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
VARIANCES = ["fixed_small", "fixed_large", "learned", "learned_range"]
LAYOUTS = ["contiguous", "channels_last"]
T = torch.tensor([0, 1, 150])
# Whole vectors of 4 and of 8 and tiles that end early, of each layout; single elements.
SHAPES = [(2, 3, 12, 20), (2, 4, 8, 20), (2, 2, 10, 10), (3, 3, 5, 7), (2, 3, 2, 3, 5), (2, 1023)]


@triton.jit
def tail_kernel(z_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tail, _ = decoder.normal_tail(tl.load(z_ptr + i))
    tl.store(out_ptr + i, tail)


@triton.jit
def term_kernel(x0_ptr, mean_ptr, log_std_ptr, out_ptr, CDF: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x0, mean, log_std = tl.load(x0_ptr + i), tl.load(mean_ptr + i), tl.load(log_std_ptr + i)
    nats, by_mean, by_log_std = decoder.decoder_term(x0, mean, log_std, CDF)
    tl.store(out_ptr + i, nats)
    tl.store(out_ptr + N + i, by_mean)
    tl.store(out_ptr + 2 * N + i, by_log_std)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch, poisoned_memory):
    needs_interpreter()
    lend_arithmetic(monkeypatch)


def both(function, output, *args, **kwargs):
    """Terms and gradient by Triton, and by the CPU's kernels."""
    with use_backend("triton"):
        found = run(function, output, *args, **kwargs)
    return found, run(function, output, *args, **kwargs)


def close(found, expected):
    """Sums of the same numbers in another order."""
    torch.testing.assert_close(found, expected, rtol=5e-7, atol=1e-12, equal_nan=True)


def same(found, expected):
    assert not found.isnan().any()
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


def check_regression(shape, layout, prediction, variance, dtype, **options):
    x0 = laid_out(options.pop("x0", pixels(shape)), layout)
    output = laid_out(model_output(x0, prediction, variance, seed=5).to(dtype), layout)
    weights = torch.tensor([0.3, 1.7, 2.9])[: shape[0]]
    arguments = {"prediction": prediction, "variance": variance, "x0": x0, "weights": weights}
    arguments |= {"seed": 5, "sample_ids": torch.tensor([7, 3, 2**40])[: shape[0]], **options}
    arguments = {name: argument for name, argument in arguments.items() if argument is not None}
    found, expected = both(denoising_loss, output, T[: shape[0]], SCHEDULE, **arguments)
    close(found[0], expected[0])
    same(found[1], expected[1])


def check_terms(shape, layout, prediction, variance, dtype, **options):
    """At t = 0 the decoder's float32 is looked at elsewhere: here it is like its float64."""
    function = options.pop("function", vlb_terms)
    x0 = laid_out(options.pop("x0", pixels(shape)), layout)
    output = laid_out(model_output(x0, prediction, variance, seed=5).to(dtype), layout)
    arguments = {"prediction": prediction, "variance": variance, "seed": 5, **options}
    found, expected = both(function, output, x0, T[: shape[0]], SCHEDULE, **arguments)
    close(found[0][1:], expected[0][1:])
    torch.testing.assert_close(found[0][0], expected[0][0], rtol=2e-6, atol=0)
    same(found[1][1:], expected[1][1:])
    ours, theirs = (gradient[:1].float().chunk(2, 1) for gradient in (found[1], expected[1]))
    if function is hybrid_loss:
        same(ours[0], theirs[0])
    for half, other in zip(ours, theirs, strict=True):
        rtol = {torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
        least = 2.0**-24 if dtype == torch.float16 else 0.0  # a step between the smallest numbers
        limit = max(1e-5 * other.abs().max().item(), least)
        torch.testing.assert_close(half, other, rtol=rtol, atol=limit)


CASES = [(shape, layout) for shape in SHAPES for layout in LAYOUTS[: 1 + (len(shape) > 2)]]


@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_shapes(shape, layout):
    """Of each shape the plain loss in float32, and what varies in turn."""
    i = 2 * SHAPES.index(shape) + LAYOUTS.index(layout)
    variance = VARIANCES[i % 4] if len(shape) > 2 else "fixed_large"
    learned = VARIANCES[2 + i % 2] if len(shape) > 2 else "fixed_small"
    check_regression(shape, layout, "epsilon", learned, torch.float32, weights=None)
    check_regression(shape, layout, PREDICTIONS[i % 3], variance, DTYPES[1 + i % 2])
    clip = (-0.5, 0.5)
    check_terms(shape, layout, PREDICTIONS[(i + 1) % 3], variance, DTYPES[(i + 2) % 3], clip=clip)
    check_terms(shape, layout, "epsilon", learned, DTYPES[i % 2], cdf=["exact", "tanh"][i % 2])
    if learned.startswith("learned"):
        weights = torch.tensor([2.0, 0.5, 0.0])[: shape[0]]
        options = {"function": hybrid_loss, "simple_weights": weights, "vlb_weights": 3 * weights}
        check_terms(shape, layout, PREDICTIONS[i % 3], learned, torch.float32, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_everything_with_everything(shape, layout):
    variances = VARIANCES if len(shape) > 2 else VARIANCES[:2]
    for prediction, variance, dtype in itertools.product(PREDICTIONS, variances, DTYPES):
        case = (shape, layout, prediction, variance, dtype)
        check_regression(*case)
        check_terms(*case, clip=(-0.5, 0.5))
        check_terms(*case, cdf="tanh")
        if variance.startswith("learned"):
            check_terms(*case, function=hybrid_loss)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 3, 12, 20), (3, 3, 5, 7)], ids=str)
def test_what_is_given(shape, layout):
    """x_0 of every type, noise of every type, an address for each sample."""
    wide = reference.unit_from_pixel(pixels(shape))
    noise = laid_out(randn(shape, seed=8), layout)
    address = {"seed": torch.tensor([1, -2, 3]), "stream": 4, "index": torch.tensor([9, 0, 77])}
    for x0, options in (
        (wide, address),
        (wide.half(), {"noise": noise.bfloat16()}),
        (pixels(shape), {"noise": noise}),
    ):
        check_regression(shape, layout, "v_prediction", "learned", torch.float32, x0=x0, **options)
        check_terms(shape, layout, "epsilon", "fixed_small", torch.bfloat16, x0=x0, **options)


@pytest.mark.parametrize(("shape", "dtype"), [((3, 3, 12, 20), 0), ((5, 1, 2, 6), 1)], ids=str)
def test_sums_do_not_depend_on_the_batch(shape, dtype):
    ids, t = torch.arange(50, 55)[: shape[0]], torch.tensor([0, 199, 50, 3, 0])[: shape[0]]
    x0 = pixels(shape)
    output = torch.randn(shape[0], 2 * shape[1], *shape[2:]).to(DTYPES[dtype])

    def results(part=slice(None)):
        arguments = {"variance": "learned_range", "seed": 5, "sample_ids": ids[part]}
        given = (output[part], x0[part], t[part], SCHEDULE)
        with use_backend("triton"):
            loss = denoising_loss(output[part], t[part], SCHEDULE, **arguments)
            return torch.stack([loss, hybrid_loss(*given, **arguments),
                                *vlb_terms(*given, return_mse=True, **arguments)])  # fmt: skip

    expected = results()
    parts = [results(slice(0, 1)), results(slice(1, None))]
    assert torch.equal(torch.cat(parts, 1), expected)


def test_without_a_gradient():
    x0 = pixels((3, 3, 6, 6))
    output = model_output(x0, "epsilon", "learned", seed=5)
    for function, given in ((denoising_loss, ()), (vlb_terms, (x0,))):
        for t in (T, 7):
            arguments = {"variance": "learned", "seed": 5}
            with use_backend("triton"):
                expected, _ = run(function, output, *given, t, SCHEDULE, **arguments)
                found = function(output, *given, t, SCHEDULE, **arguments)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
def test_no_elements(shape):
    x0, output = pixels(shape), torch.zeros(shape)
    for function, given in ((denoising_loss, ()), (vlb_terms, (x0,))):
        found, expected = both(function, output, *given, 3, SCHEDULE, seed=5)
        assert torch.equal(found[0].nan_to_num(9), expected[0].nan_to_num(9))
        assert found[1].shape == shape


def test_out_of_range_on_the_device(monkeypatch):
    """As on a GPU, where nobody reads them back: the last timestep, and the index's low 24 bits."""
    monkeypatch.setattr(
        import_module("ddpm_fast.ops.checks"), "check_range_on_host", lambda *_: None
    )
    x0 = pixels((3, 3, 5, 5))
    output = torch.randn(3, 6, 5, 5)
    outside, inside = torch.tensor([-1, 200, 7]), torch.tensor([199, 199, 7])
    far, near = torch.tensor([2**24 + 3, 3, 2**40 + 9]), torch.tensor([3, 3, 9])
    for function, given in ((denoising_loss, ()), (hybrid_loss, (x0,))):
        arguments = {"variance": "learned_range", "seed": 1}
        with use_backend("triton"):
            found = run(function, output, *given, outside, SCHEDULE, index=far, **arguments)
        expected = run(function, output, *given, inside, SCHEDULE, index=near, **arguments)
        close(found[0], expected[0])
        same(found[1], expected[1])


def test_nan_is_told():
    x0 = pixels((3, 3, 6, 6))
    output = model_output(x0, "epsilon", "learned", seed=5)
    output[1, 2, 4, 4] = math.nan
    for function, given in ((denoising_loss, ()), (vlb_terms, (x0,)), (hybrid_loss, (x0,))):
        for t in (0, 50):
            with use_backend("triton"):
                arguments = {"variance": "learned", "seed": 5}
                found = run(function, output, *given, t, SCHEDULE, **arguments)
            assert found[0].isnan().tolist() == [False, True, False]
            assert found[1][[0, 2]].isfinite().all()
            if given:  # the variance of that pixel
                assert found[1][:, 3:].isnan().nonzero().tolist() == [[1, 2, 4, 4]]


def test_many_samples_and_many_shares(monkeypatch):
    """Grids that are 2 samples wide, and second kernels that take 2 shares at a time."""
    for op, name, value in itertools.product(
        ("denoising_loss", "vlb_terms"), ("SAMPLES_Y", "BLOCK"), (2,)
    ):
        monkeypatch.setattr(import_module(f"ddpm_fast.kernels.{op}"), name, value)
    x0 = pixels((5, 3, 20, 44))  # three tiles of a sample, or more
    output = torch.randn(5, 6, 20, 44)
    t = torch.tensor([3, 9, 199, 8, 100])
    for function, given in ((denoising_loss, ()), (hybrid_loss, (x0,))):
        found, expected = both(
            function, output, *given, t, SCHEDULE, variance="learned_range", seed=5
        )
        close(found[0], expected[0])
        same(found[1], expected[1])


def test_shares_have_room():
    """One for at least 128 elements, but for the last: what the ops make room for."""
    launch = import_module("ddpm_fast.kernels.launch")
    room = import_module("ddpm_fast.ops.objective").SCRATCH_ELEMENTS
    for channels, pixels_, last, vector, warp, of_thread in itertools.product(
        (1, 2, 3, 4, 5, 64), (*range(1, 70), 1024, 65536), (False, True), (1, 4, 8), (32, 64),
        (8, 16),
    ):  # fmt: skip
        cut = launch.cut(channels, pixels_, last, vector, warp, of_thread)
        assert cut.grid(1)[0] <= -(-channels * pixels_ // room)
        assert cut.tiling.tile % (4 * cut.num_warps * warp) == 0


def test_the_normal_distributions_tail():
    """Relative error at most 3.5e-7 wherever a probability is not clamped."""
    z, found = torch.linspace(0, 8, 1 << 18), torch.empty(1 << 18)
    tail_kernel[(1,)](z, found, 1 << 18)
    exact = 0.5 * torch.special.erfc(z.double() * math.sqrt(0.5))
    error = (found.double() / exact - 1).abs()
    assert error.max() < 3.5e-7
    assert error.square().mean().sqrt() < 1e-7
    far = torch.linspace(8, 14, 1 << 10)
    tail_kernel[(1,)](far, found, 1 << 10)
    assert (found[: 1 << 10] < 7e-16).all()
    assert (found[: 1 << 10] >= 0).all()


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
def test_decoder(cdf):
    """Every pixel's bin with means from right to wrong, standard deviations from 1e-4 to 1.

    Derivatives by the mean are in units of 1 / std.
    """
    x0 = reference.unit_from_pixel(torch.arange(256).byte())[:, None, None]
    std = torch.logspace(-4, 0, 16)[None, :, None]
    off = torch.tensor([0.0, 0.3, -0.7, 1.1, -2.0, 3.0, -4.5, 6.0])[None, None, :]
    x0, std, off = torch.broadcast_tensors(x0, std, off)
    mean, log_std = (x0 + off * (std + 1 / 255)).contiguous(), std.log().contiguous()
    x0 = x0.contiguous()
    found = torch.empty(3, *x0.shape)
    term_kernel[(1,)](x0, mean, log_std, found, cdf, x0.numel())
    wide = [v.double() for v in (x0, mean, log_std)]
    nats = reference.decoder_nll(*wide, cdf)
    by_mean, by_log_std = reference.decoder_nll_gradient(*wide, cdf)
    assert ((found[0] - nats).abs() <= 6e-6 * nats.clamp(min=1)).all()
    for ours, exact, unit in ((found[1], by_mean, std), (found[2], by_log_std, 1.0)):
        assert ((ours - exact).abs() * unit <= 2e-5 * (1 + exact.abs() * unit)).all()


def test_decoder_of_what_is_not_finite():
    """Variances that a model makes of anything: clamped, and no NaN but of NaN."""
    x0 = torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0, -1.0, 1.0, 0.0])
    mean = torch.tensor([0.1, 1e30, -50.0, -1.5, 0.0, 0.0, 1.0, math.nan])
    log_std = torch.tensor([-200.0, -3.0, 1.0, -90.0, 300.0, -300.0, -60.0, 0.0])
    found = torch.empty(3, 8)
    wide = [v.double() for v in (x0, mean, log_std)]
    for cdf in ("exact", "tanh"):
        term_kernel[(1,)](x0, mean, log_std, found, cdf, 8)
        exact = (reference.decoder_nll(*wide, cdf), *reference.decoder_nll_gradient(*wide, cdf))
        assert found[0, 7].isnan()
        expected = torch.stack(exact)[:, :7].float()
        torch.testing.assert_close(found[:, :7], expected, rtol=1e-5, atol=1e-6)
