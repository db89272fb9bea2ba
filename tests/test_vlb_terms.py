"""vlb_terms and hybrid_loss against the reference in float64."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_as_good_as_eager, laid_out

from ddpm_fast import (
    NoiseSchedule,
    add_noise,
    denoising_loss,
    hybrid_loss,
    randn,
    reference,
    use_backend,
    vlb_table,
    vlb_terms,
)
from ddpm_fast.schedule import Prediction, Variance

SCHEDULE = NoiseSchedule.cosine(200)
PREDICTIONS, VARIANCES = get_args(Prediction), get_args(Variance)
LEARNED = ["learned", "learned_range"]
T = torch.tensor([0, 1, 150, 60])
SHAPES = [(1, 1), (2, 1023), (4, 3, 5, 7), (2, 3, 32, 32), (3, 4, 16, 16), (2, 3, 2, 3, 5)]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def pixels(shape, seed=17):
    """Both outermost bins and what lies between."""
    levels = torch.randint(-20, 276, shape, generator=torch.Generator().manual_seed(seed))
    return levels.clamp(0, 255).byte()


def model_output(x0, prediction, variance, schedule=SCHEDULE, error=0.05, **address):
    """float32, of a model that is a little wrong: the worse, the less is lost to rounding."""
    t = T[: len(x0)]
    wide = reference.unit_from_pixel(x0.double())
    eps = randn(x0.shape, **{"stream": 2, **address}).double()
    predicted = reference.denoising_target(wide, eps, t, schedule, prediction)
    predicted = predicted + error * randn(x0.shape, seed=9).double()
    if variance in LEARNED:
        v = 0.5 * randn(x0.shape, seed=10).double()
        if variance == "learned":
            v = v + reference.at(schedule.posterior_log_variance_clipped, t, wide)
        predicted = torch.cat([predicted, v], 1)
    return predicted.float()


def run(function, output, *args, **kwargs):
    output = output.detach().requires_grad_()
    terms = function(output, *args, **kwargs)
    terms.sum().backward()
    return terms.detach(), output.grad


def scaled(gradient, other):
    """By a power of two near ``other``'s largest: what is allowed is an ulp of 1."""
    return gradient / 2.0 ** other.abs().max().clamp(min=1e-30).log2().ceil()


def check_against_float64(shape, prediction, variance, dtype, layout, clip=None, cdf="exact"):
    x0, t = pixels(shape), T[: shape[0]]
    address = {"seed": 5, "sample_ids": [7, 3, 2**40, 0][: shape[0]], "index": 3}
    output = laid_out(model_output(x0, prediction, variance, **address).to(dtype), layout)
    terms, gradient = run(
        vlb_terms, output, laid_out(x0, layout), t, SCHEDULE, prediction=prediction,
        variance=variance, clip=clip, cdf=cdf, **address,
    )  # fmt: skip
    eps = randn(shape, stream=2, **address)

    def formula(real):
        wide = reference.unit_from_pixel(x0.to(torch.float64)).to(real)
        m = output.detach().to(real).requires_grad_()
        x_t = reference.q_sample(wide, t, SCHEDULE, eps.to(real))
        found = reference.vlb_terms(
            wide, x_t, m, t, SCHEDULE, prediction=prediction, variance=variance,
            clip=clip or (-math.inf, math.inf), cdf=cdf,
        )  # fmt: skip
        found.sum().backward()
        return found.detach(), m.grad

    exact, exact_gradient = formula(torch.float64)
    eager, eager_gradient = formula(torch.float32)
    assert_as_good_as_eager(terms, eager, exact)
    assert_as_good_as_eager(
        scaled(gradient.float(), exact_gradient).to(dtype),
        scaled(eager_gradient, exact_gradient).to(dtype),
        scaled(exact_gradient, exact_gradient),
    )
    if layout != "strided":
        assert gradient.stride() == output.stride()


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, prediction, variance, isa):
    check_against_float64(shape, prediction, variance, torch.float32, "contiguous")


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_layouts_and_dtypes(layout, dtype, clip, variance, isa):
    check_against_float64((3, 3, 20, 24), "epsilon", variance, dtype, layout, clip=clip)


@pytest.mark.parametrize("variance", VARIANCES)
def test_tanh(variance, isa):
    """The approximation of the cdf loses its digits in float32's upper tail, ours as eager's."""
    check_against_float64((3, 3, 16, 16), "epsilon", variance, torch.float32, "strided", cdf="tanh")


def test_the_terms_are_those_of_the_table():
    """vlb_table.terms, which the kernels follow, is the reference and its derivatives."""
    for prediction in PREDICTIONS:
        for variance in VARIANCES:
            for clip, cdf in (((-math.inf, math.inf), "tanh"), ((-1.0, 1.0), "exact")):
                _check_table(prediction, variance, clip, cdf)


def _check_table(prediction, variance, clip, cdf):
    schedule = NoiseSchedule.linear(30)
    t = torch.arange(30)
    x0 = pixels([30, 2, 3, 3]).double() / 127.5 - 1
    eps = randn(x0.shape, seed=1).double()
    m = reference.denoising_target(x0, eps, t, schedule, prediction)
    m = (m + 0.05 * randn(x0.shape, seed=2).double()).requires_grad_()
    v = None
    if variance in LEARNED:
        v = 0.5 * randn(x0.shape, seed=3).double()
        if variance == "learned":
            v = v + reference.at(schedule.posterior_log_variance_clipped, t, v)
        v.requires_grad_()
    x_t = reference.q_sample(x0, t, schedule, eps)
    output = m if v is None else torch.cat([m, v], 1)
    expected = reference.vlb_terms(
        x0, x_t, output, t, schedule, prediction=prediction, variance=variance, clip=clip, cdf=cdf
    )
    rows = vlb_table.vlb_rows(schedule, prediction, variance, m.device)
    assert rows.dtype == torch.float32
    rows = vlb_table._rows(schedule, prediction, variance)
    terms = vlb_table.terms(x0, eps, m, v, rows, t, variance=variance, clip=clip, cdf=cdf)
    to_bits = vlb_table.bits_per_nat(x0.shape)
    torch.testing.assert_close(terms.nats.flatten(1).sum(1) * to_bits, expected)
    gradients = torch.autograd.grad(expected.sum(), [m] if v is None else [m, v])
    torch.testing.assert_close(terms.by_m * to_bits, gradients[0], rtol=1e-6, atol=1e-10)
    if v is not None:
        torch.testing.assert_close(terms.by_v * to_bits, gradients[1], rtol=1e-6, atol=1e-10)


def test_gradcheck_of_the_reference():
    schedule, t = NoiseSchedule.linear(20), torch.tensor([0, 7])
    x0 = pixels([2, 1, 2, 3]).double() / 127.5 - 1
    eps = randn(x0.shape, seed=1).double()
    x_t = reference.q_sample(x0, t, schedule, eps)
    output = torch.cat([eps + 0.05, 0.3 * randn(x0.shape, seed=2).double()], 1).requires_grad_()
    for variance in LEARNED:
        start = output if variance == "learned_range" else (output - 4).detach().requires_grad_()
        for cdf in ("exact", "tanh"):
            assert torch.autograd.gradcheck(
                lambda m, variance=variance, cdf=cdf: reference.vlb_terms(
                    x0, x_t, m, t, schedule, variance=variance, cdf=cdf
                ),
                (start,),
            )


@pytest.mark.parametrize("clip", [None, (-0.5, 0.5)])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_like_the_reference_backend(layout, variance, clip, isa):
    x0 = laid_out(pixels((4, 3, 21, 19)), layout)
    output = laid_out(model_output(x0, "v_prediction", variance, seed=5), layout)
    arguments = {"prediction": "v_prediction", "variance": variance, "seed": 5, "clip": clip}
    terms, gradient = run(vlb_terms, output, x0, T, SCHEDULE, **arguments)
    with use_backend("reference"):
        expected, expected_gradient = run(vlb_terms, output, x0, T, SCHEDULE, **arguments)
    torch.testing.assert_close(terms, expected, rtol=3e-6, atol=1e-7)
    for ours, theirs in zip(gradient, expected_gradient, strict=True):  # t = 0 first, in float32
        limit = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * limit)


def test_terms_have_one_order_of_sums():
    from ddpm_fast.backends import native

    if native is None:
        pytest.skip("installed without compiled kernels")
    x0 = pixels((4, 3, 67, 65))
    output = model_output(x0, "epsilon", "learned_range", seed=5)
    ids = torch.arange(4)

    def terms(part=slice(None)):
        arguments = {"variance": "learned_range", "seed": 5, "sample_ids": ids[part]}
        vlb, error = vlb_terms(
            output[part], x0[part], T[part], SCHEDULE, return_mse=True, **arguments
        )
        hybrid = hybrid_loss(output[part], x0[part], T[part], SCHEDULE, **arguments)
        return torch.stack([vlb, error, hybrid])

    expected, threads, isa = terms(), torch.get_num_threads(), native.isa()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(terms(), expected)
        for name in native.supported_isas():
            native.set_isa(name)
            assert torch.equal(terms(), expected)
    finally:
        torch.set_num_threads(threads)
        native.set_isa(isa)
    parts = [terms(slice(i, i + 1)) for i in range(4)]
    assert torch.equal(torch.cat(parts, 1), expected)


def test_x_t_is_add_noises(isa):
    """The term at an address is the one of the x_t that add_noise draws there."""
    x0, index = pixels((4, 3, 8, 8)), T.clone()
    address = {"seed": 3, "stream": 4, "index": index}
    x_t = add_noise(x0, T, SCHEDULE, **address)
    output = model_output(x0, "epsilon", "fixed_small", **address)
    found = vlb_terms(output, x0, T, SCHEDULE, **address)
    wide = reference.unit_from_pixel(x0)
    expected = reference.vlb_terms(wide.double(), x_t.double(), output.double(), T, SCHEDULE)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    eps = randn(x0.shape, **address)
    assert torch.equal(vlb_terms(output, x0, T, SCHEDULE, seed=99, noise=eps), found)
    assert torch.equal(vlb_terms(output, wide, T, SCHEDULE, **address), found)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_error_of_x0_times_snr_is_that_of_eps(prediction, isa):
    x0 = pixels((4, 3, 8, 8))
    output = model_output(x0, prediction, "fixed_small", seed=3)
    _, error = vlb_terms(
        output, x0, T, SCHEDULE, prediction=prediction, seed=3, clip=(-1, 1), return_mse=True
    )
    wide, eps = reference.unit_from_pixel(x0.double()), randn(x0.shape, seed=3, stream=2).double()
    x_t = reference.q_sample(wide, T, SCHEDULE, eps)
    x0_hat = reference.x0_from_output(x_t, output.double(), T, SCHEDULE, prediction).clamp(-1, 1)
    predicted = reference.eps_from_x0(x_t, x0_hat, T, SCHEDULE)
    expected = reference.regression(eps, predicted)
    torch.testing.assert_close(error.double() * SCHEDULE.snr[T], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", LEARNED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hybrid(variance, prediction, layout, isa):
    """Both parts in one pass; the bound's gradient reaches the variance alone, eq. 16."""
    x0 = laid_out(pixels((4, 3, 9, 8)), layout)
    output = laid_out(model_output(x0, prediction, variance, seed=5), layout)
    simple, bound = torch.tensor([1.0, 0.5, 2.0, 0.0]), torch.tensor([3.0, 0.1, 0.0, 1.0])
    arguments = {"prediction": prediction, "variance": variance, "seed": 5}
    total, gradient = run(
        hybrid_loss, output, x0, T, SCHEDULE, simple_weights=simple, vlb_weights=bound, **arguments
    )
    regression, of_m = run(
        lambda m, *rest, **kwargs: denoising_loss(m, *rest, x0=x0, weights=simple, **kwargs),
        output, T, SCHEDULE, **arguments,
    )  # fmt: skip
    terms, of_both = run(vlb_terms, output, x0, T, SCHEDULE, weights=bound, **arguments)
    torch.testing.assert_close(total, regression + terms, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient.chunk(2, 1)[0], of_m.chunk(2, 1)[0], rtol=1e-6, atol=1e-9)
    assert torch.equal(gradient.chunk(2, 1)[1], of_both.chunk(2, 1)[1])


def test_variances_close_to_qs(isa):
    """½ (e^r − 1 − r) keeps its digits where r is near 0, and e^r − 1 in the gradient does."""
    x0 = pixels((4, 1, 8, 8))
    eps = randn(x0.shape, seed=3, stream=2)
    t = torch.tensor([40, 100, 150, 190])
    v = torch.linspace(-1 + 2**-14, -1 + 2**-6, 64).reshape(1, 1, 8, 8).expand_as(eps)
    wide = reference.unit_from_pixel(x0)
    arguments = {"prediction": "sample", "variance": "learned_range", "seed": 3}
    found, gradient = run(vlb_terms, torch.cat([wide, v], 1), x0, t, SCHEDULE, **arguments)
    rows = vlb_table.vlb_rows(SCHEDULE, "sample", "learned_range", x0.device).double()
    exact = vlb_table.terms(
        wide.double(), eps.double(), wide.double(), v.double(), rows, t,
        variance="learned_range", clip=(-math.inf, math.inf), cdf="exact",
    )  # fmt: skip
    to_bits = vlb_table.bits_per_nat(x0.shape)
    expected = exact.nats.flatten(1).sum(1) * to_bits
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    by_v = gradient.chunk(2, 1)[1].double()
    torch.testing.assert_close(by_v, exact.by_v * to_bits, rtol=1e-5, atol=0)


def test_variances_past_floats_range(isa):
    """log σ² counts as at most 87 away from log β̃, in the term and in its gradient."""
    x0 = pixels((1, 1, 2, 2))
    for t in (0, 50):
        at = SCHEDULE.posterior_log_variance_clipped[t].item()
        results = []
        for distance in (87.0, 88.0, 150.0, 1e30):
            v = torch.full((1, 1, 2, 2), at + distance)
            output = torch.cat([torch.zeros(1, 1, 2, 2), v], 1)
            arguments = {"variance": "learned", "seed": 1}
            results.append(run(vlb_terms, output, x0, t, SCHEDULE, **arguments))
            with use_backend("reference"):
                reference_too, _ = run(vlb_terms, output, x0, t, SCHEDULE, **arguments)
            torch.testing.assert_close(results[-1][0], reference_too, rtol=1e-4, atol=0)
        for terms, gradient in results[1:]:
            torch.testing.assert_close(terms, results[0][0], rtol=1e-6, atol=0)
            torch.testing.assert_close(gradient, results[0][1], rtol=1e-6, atol=1e-30)


def test_clip_holds_the_gradient():
    x0 = torch.zeros(1, 1, 1, 4)
    output = torch.tensor([-3.0, -0.5, 0.5, math.nan]).reshape(1, 1, 1, 4)
    arguments = {"prediction": "sample", "seed": 0, "clip": (-1, 1)}
    _, gradient = run(vlb_terms, output, x0, 50, SCHEDULE, **arguments)
    assert gradient[0, 0, 0, 0] == 0
    assert gradient[0, 0, 0, 1] < 0 < gradient[0, 0, 0, 2]


def test_nan_is_told(isa):
    """In the term and in the gradient, of that element alone."""
    x0 = torch.zeros(2, 1, 4, 4)
    output = torch.zeros(2, 1, 4, 4)
    output[1, 0, 2, 2] = math.nan
    for t in (0, 50):
        found, gradient = run(vlb_terms, output, x0, t, SCHEDULE, seed=0)
        assert found.isnan().tolist() == [False, True]
        assert gradient.isnan().nonzero().tolist() == [[1, 0, 2, 2]]


def test_half_precision_gradients_of_steep_terms():
    """In float16's range where T · L_t trains the bound, and not lost where it is flat."""
    shape = (8, 3, 16, 16)
    x0, t = pixels(shape), torch.tensor([1, 2, 5, 10, 50, 100, 150, 199])
    weights = torch.full((8,), 200 / 8)
    output = (randn(shape, seed=5, stream=2) + 0.2 * randn(shape, seed=9)).half()
    _, gradient = run(vlb_terms, output, x0, t, SCHEDULE, seed=5, weights=weights)
    _, exact = run(vlb_terms, output.float(), x0, t, SCHEDULE, seed=5, weights=weights)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.float(), exact, rtol=2e-3, atol=3e-7)


def test_opcheck():
    x0, output = pixels([3, 2, 5, 7]), randn([3, 4, 5, 7], seed=1)
    ids, t = torch.tensor([5, 6, 7]), T[:3]
    rows = vlb_table.vlb_rows(SCHEDULE, "epsilon", "learned_range", output.device)
    op = torch.ops.ddpm_fast.vlb_terms.default
    address = (1, None, None, 2, 0, None)
    of_output = (rows, 0, 3, -1.0, 1.0, 0)
    simple = (*address, None, False, None, None, False, 1.0)
    torch.library.opcheck(op, (output, x0, 3, None, *of_output, *simple))
    last = output.to(memory_format=torch.channels_last).requires_grad_()
    address, w = (1, ids, ids, 2, 0, ids), torch.ones(3)
    torch.library.opcheck(
        op,
        (last, x0, 0, t, rows, 0, 3, -1.0, 1.0, 1, *address, None, True, w, w, True, 1.0),
    )


def test_compiles_whole():
    x0 = pixels([4, 2, 5, 7])
    schedule = NoiseSchedule.linear(200)  # whose tables are first made while it is traced

    def f(output, t):
        return hybrid_loss(output * 2, x0, t, schedule, seed=7).sum() + 1

    results = []
    for function in (torch.compile(f, fullgraph=True), f):
        output = randn([4, 4, 5, 7], seed=1).requires_grad_()
        function(output, T).backward()
        results.append(output.grad)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_zero_terminal_snr():
    schedule = NoiseSchedule.linear(50).rescale_zero_terminal_snr()
    x0 = pixels([2, 1, 4, 4])
    with pytest.raises(ValueError, match="timestep 49 has no float32 form: alphas_cumprod is 0"):
        vlb_terms(torch.zeros(x0.shape), x0, 49, schedule, seed=0)
    v = torch.zeros(x0.shape)
    assert vlb_terms(v, x0, 49, schedule, prediction="v_prediction", seed=0).isfinite().all()


X0 = torch.zeros(2, 2, 4, 4)


@pytest.mark.parametrize(
    ("output", "arguments", "error", "message"),
    [
        (X0.double(), {}, TypeError, "model_output must be float32, bfloat16, float16"),
        (X0, {"variance": "learned"}, ValueError, r"x0 must have shape \[2, 1, 4, 4\]"),
        (X0, {"variance": "none"}, ValueError, "variance must be one of"),
        (X0, {"cdf": "erf"}, ValueError, "cdf must be one of 'exact', 'tanh'; got 'erf'"),
        (X0, {"clip": (1, -1)}, ValueError, "clip must be"),
        (X0, {"t": 200}, ValueError, "t must lie in 0 … 199; got 200"),
        (X0, {"x0": X0.int()}, TypeError, "x0 must be float32"),
        (X0, {"weights": torch.ones(1)}, ValueError, r"weights must have shape \[2\]"),
        (X0, {"noise": X0.double()}, TypeError, "noise must be float32"),
        (X0, {"index": torch.tensor([0, 1 << 24])}, ValueError, "index must lie in"),
    ],
)
def test_bad_arguments(output, arguments, error, message):
    arguments = {"x0": X0, "t": 0, "seed": 0, **arguments}
    with pytest.raises(error, match=message):
        vlb_terms(output, arguments.pop("x0"), arguments.pop("t"), SCHEDULE, **arguments)


def test_hybrid_needs_a_learned_variance():
    with pytest.raises(ValueError, match="'learned' or 'learned_range'; got 'fixed_small'"):
        hybrid_loss(X0, X0, 0, SCHEDULE, variance="fixed_small", seed=0)
