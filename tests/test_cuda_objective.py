"""The CUDA bodies of denoising_loss, vlb_terms and hybrid_loss on the host, both of their kernels:
the CPU's gradients bit for bit, its sums within float32's rounding, and an order of additions in
which the batch has no say. Their tests against float64 are the ops' own (fixture ``isa``)."""

from __future__ import annotations

import functools
import itertools
import math
from importlib import import_module

import pytest
import torch
from helpers import DTYPES, laid_out

from ddpm_fast import NoiseSchedule, denoising_loss, hybrid_loss, randn, vlb_terms

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SCHEDULE = NoiseSchedule.cosine(200)
# Vectors fit all of them but the last three.
SHAPES = [
    (2, 2, 260),
    (3, 3, 12, 14),
    (1, 3, 32, 32),
    (3, 4, 16, 20),
    (2, 8, 12, 12),
    (2, 3, 2, 8, 12),
    (2, 3, 9, 11),
    (2, 5, 20, 13),
    (5, 3, 1),
]
FORMATS = ["contiguous", "channels_last"]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
VARIANCES = ["fixed_small", "fixed_large", "learned", "learned_range"]
T = torch.tensor([150, 199, 60, 7, 1])
ADDRESS = {"stream": 7, "seed": torch.tensor([5, -9, 7, 2**40, 0])}


def tensors(shape, layout, dtype, x0_dtype, doubled):
    """A model's output that is a little wrong of x_0, and x_0."""
    x0 = (127.5 + 127.5 * randn(shape, seed=1).clamp(-1, 1)).byte()
    wide = x0.float() / 127.5 - 1
    parts = [wide + 0.1 * randn(shape, seed=2)]
    if doubled:
        parts.append(0.5 * randn(shape, seed=3) - (4 if doubled == "learned" else 0))
    output = torch.cat(parts, 1).to(dtype)
    x0 = x0 if x0_dtype == torch.uint8 else wide.to(x0_dtype)
    return laid_out(output, layout), laid_out(x0, layout)


def address(samples):
    ids = torch.arange(samples) * 2**33 + 5
    return {"stream": 7, "seed": ADDRESS["seed"][:samples], "sample_ids": ids, "index": 3}


def with_gradient(op, output, *args, **kwargs):
    """What the op gives, then its gradient."""
    output = output.detach().requires_grad_()
    found = op(output, *args, **kwargs)
    found = found if isinstance(found, tuple) else (found,)
    found[0].sum().backward()
    return [*(f.detach() for f in found), output.grad]


def agree(on_host, call):
    """The same gradient to the bit, the rest within what a sum in float32 loses."""
    (*expected, gradient), (*found, ours) = call(), on_host.run(call)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=4e-7, atol=1e-9)
    assert not ours.isnan().any()
    assert torch.equal(ours, gradient)
    assert ours.stride() == gradient.stride()
    return on_host.last_body().replace("ddpm_fast::", "").replace("cuda::", "")


def noises(shape, layout):
    noise = laid_out(randn(shape, seed=4), layout)
    return None, noise, noise.bfloat16(), noise.half()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_denoising_loss(shape, layout, on_host):
    samples = shape[0]
    weights = torch.tensor([0.3, 1.7, 0.01, 5.0, 1.0])[:samples]
    for dtype, x0_dtype in itertools.product(DTYPES, [*DTYPES, torch.uint8]):
        for doubled in (None, "learned_range"):
            output, x0 = tensors(shape, layout, dtype, x0_dtype, doubled)
            for prediction, noise in itertools.product(PREDICTIONS, noises(shape, layout)):
                kwargs = {"prediction": prediction, "variance": doubled or "fixed_small"}
                kwargs |= {"x0": x0, "noise": noise, **address(samples)}
                kwargs["weights"] = None if noise is None else weights
                call = functools.partial(
                    with_gradient, denoising_loss, output, T[:samples], SCHEDULE, **kwargs
                )
                agree(on_host, call)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vlb_terms(shape, layout, variance, on_host):
    samples = shape[0]
    weights = torch.tensor([0.3, 1.7, 0.01, 5.0, 1.0])[:samples]
    for dtype, x0_dtype in itertools.product(DTYPES, [*DTYPES, torch.uint8]):
        doubled = variance if variance.startswith("learned") else None
        output, x0 = tensors(shape, layout, dtype, x0_dtype, doubled)
        arguments = (output, x0, T[:samples], SCHEDULE)
        for prediction, noise in itertools.product(PREDICTIONS, noises(shape, layout)[:3]):
            kwargs = {"prediction": prediction, "variance": variance, "noise": noise}
            kwargs |= address(samples)
            bounds = None if noise is None else (-1.0, 1.0)
            agree(
                on_host,
                functools.partial(
                    with_gradient, vlb_terms, *arguments, clip=bounds, weights=weights,
                    return_mse=True, **kwargs,
                ),
            )  # fmt: skip
            if doubled:
                kwargs |= {"simple_weights": weights, "vlb_weights": weights.flip(0)}
                agree(on_host, functools.partial(with_gradient, hybrid_loss, *arguments, **kwargs))


def test_a_regression_beside_a_fixed_variance(on_host):
    """What the op's schema allows and no public function asks for."""
    from ddpm_fast import vlb_table

    output, x0 = tensors((3, 3, 12, 14), "contiguous", torch.float32, torch.uint8, None)
    rows = vlb_table.vlb_rows(SCHEDULE, "v_prediction", "fixed_large", output.device)

    def call():
        total, parts, gradient = torch.ops.ddpm_fast.vlb_terms(
            output, x0, 0, T[:3], rows, 2, 1, -math.inf, math.inf, 0, 5, None, None, 2, 0, None,
            None, True, None, None, True, 1.0,
        )  # fmt: skip
        return [total, parts, gradient]

    assert agree(on_host, call) == "VlbTermsBlock"


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_decoder(shape, layout, cdf, on_host):
    """t = 0 in float32, beside samples at t > 0, whose bits are the CPU's."""
    samples = shape[0]
    t = torch.tensor([0, 60, 0, 7, 0])[:samples]
    for variance, dtype in itertools.product(VARIANCES, DTYPES):
        doubled = variance if variance.startswith("learned") else None
        output, x0 = tensors(shape, layout, dtype, torch.uint8, doubled)
        kwargs = {"prediction": "sample", "variance": variance, "cdf": cdf, "clip": (-1.0, 1.0)}
        kwargs |= {"return_mse": True, **address(samples)}
        call = functools.partial(with_gradient, vlb_terms, output, x0, t, SCHEDULE, **kwargs)
        expected, found = call(), on_host.run(call)
        torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=1e-9)
        torch.testing.assert_close(found[1], expected[1], rtol=4e-7, atol=1e-9)
        assert torch.equal(found[2][t > 0], expected[2][t > 0])
        close = {"rtol": 1e-4, "atol": 1e-4 * expected[2].abs().max().item()}
        if dtype != torch.float32:
            close["rtol"] = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(found[2], expected[2], **close)


def test_decoder_far_from_its_bin(on_host):
    """Standard deviations from e^-60 to e^60, and a mean far off: clamped, and nothing is NaN."""
    x0 = torch.tensor([0, 1, 128, 254, 255], dtype=torch.uint8).reshape(1, 1, 5)
    for log_std, mean in itertools.product((-60.0, -5.0, 0.0, 60.0), (-1e3, -1.0, 0.0, 1.0, 1e3)):
        output = torch.cat([torch.full((1, 1, 5), mean), torch.full((1, 1, 5), 2 * log_std)], 1)
        call = functools.partial(
            with_gradient, vlb_terms, output, x0, 0, SCHEDULE, prediction="sample",
            variance="learned", seed=1,
        )  # fmt: skip
        (expected, gradient), (found, ours) = call(), on_host.run(call)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "options", "body"),
    [
        ((2, 3, 32, 32), "contiguous", "float32", {}, "Loss Float32, Contiguous<4>, false"),
        ((2, 3, 32, 32), "contiguous", "bfloat16", {}, "Loss BFloat16, Contiguous<8>, false"),
        ((2, 3, 32, 32), "channels_last", "float32", {}, "Loss Float32, ChannelsLast<3, 4, 4>"),
        ((2, 3, 32, 32), "channels_last", "float16", {}, "Loss Float16, ChannelsLast<3, 8, 8>"),
        ((2, 4, 32, 32), "channels_last", "bfloat16", {}, "Loss BFloat16, ChannelsLast<4, 4, 8>"),
        ((2, 3, 32, 32), "contiguous", "float32", {"prediction": "v_prediction"},
         "Loss Float32, Contiguous<4>, true"),
        ((2, 5, 32, 32), "channels_last", "float32", {}, "LossBlock"),
        ((2, 3, 31, 31), "contiguous", "float32", {}, "LossBlock"),
        ((2, 3, 9, 9), "contiguous", "float32", {}, "LossBlock"),
        ((2, 3, 32, 32), "contiguous", "float32", {"variance": "fixed_small"},
         "Terms Float32, Contiguous<4>, false, false"),
        ((2, 3, 32, 32), "contiguous", "bfloat16", {"variance": "learned"},
         "Terms BFloat16, Contiguous<8>, true, false"),
        ((2, 4, 32, 32), "channels_last", "float16", {"variance": "learned_range"},
         "Terms Float16, ChannelsLast<4, 4, 8>, true, false"),
        ((2, 3, 7, 9), "contiguous", "float32", {"variance": "fixed_small"}, "TermsBlock"),
    ],
)  # fmt: skip
def test_body_for_a_problem(shape, layout, dtype, options, body, on_host):
    doubled = options.get("variance", "").startswith("learned")
    output, x0 = tensors(shape, layout, getattr(torch, dtype), torch.uint8, doubled)
    t, kwargs = T[: shape[0]], {"seed": 1, **options}
    if "variance" in options:
        call = functools.partial(with_gradient, vlb_terms, output, x0, t, SCHEDULE, **kwargs)
    else:
        call = functools.partial(
            with_gradient, denoising_loss, output, t, SCHEDULE, x0=x0, **kwargs
        )
    kind, _, arguments = body.partition(" ")
    found = agree(on_host, call)
    assert kind in found
    assert arguments in found
    if doubled:
        hybrid = functools.partial(with_gradient, hybrid_loss, output, x0, t, SCHEDULE, **kwargs)
        assert agree(on_host, hybrid) == found.replace("false", "true")


# Samples of 260 elements begin at pixels and 16-bit numbers that 16 bytes do not divide.
@pytest.mark.parametrize("shape", [(5, 4, 65), (5, 3, 12, 14), (5, 4, 9, 7), (5, 7)], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_a_batch_in_parts(shape, layout, on_host):
    """A sample's result is the same to the last bit alone and in any company."""
    t = torch.tensor([150, 0, 60, 7, 1])
    weights = torch.tensor([0.3, 1.7, 0.01, 5.0, 1.0])
    for dtype, x0_dtype in itertools.product(DTYPES, [torch.float32, torch.uint8]):
        output, x0 = tensors(shape, layout, dtype, x0_dtype, None)
        double = tensors((5, 2, *shape[2:]), layout, dtype, x0_dtype, "learned_range")[0]
        noise = laid_out(randn(shape, seed=4).bfloat16(), layout)

        def results(part, output=output, x0=x0, double=double, noise=noise):
            where = {key: value[part] if isinstance(value, torch.Tensor) else value
                     for key, value in address(5).items()}  # fmt: skip
            arguments = (x0[part], t[part], SCHEDULE)
            loss = denoising_loss(
                output[part], t[part], SCHEDULE, prediction="v_prediction", x0=x0[part],
                weights=weights[part], **where,
            )  # fmt: skip
            terms = vlb_terms(output[part], *arguments, return_mse=True, **where)
            given = vlb_terms(output[part], *arguments, noise=noise[part], seed=0)
            found = [loss, *terms, given]
            if len(shape) > 2:
                half = laid_out(x0[part][:, :2], layout)
                found.append(hybrid_loss(double[part], half, t[part], SCHEDULE, **where))
            return torch.stack(found)

        for blocks_only in (False, True):
            on_host.set_blocks_only(blocks_only)
            whole = on_host.run(functools.partial(results, slice(None)))
            assert not whole.isnan().any()
            for size in (1, 2, 4):
                slices = [slice(i, i + size) for i in range(0, 5, size)]
                parts = [on_host.run(functools.partial(results, part)) for part in slices]
                assert torch.equal(torch.cat(parts, 1), whole)


def test_memory_that_vectors_cannot_reach(on_host):
    output, x0 = tensors((2, 3, 16, 16), "contiguous", torch.float32, torch.float32, None)
    noise = randn(x0.shape, seed=5)

    def shifted(tensor):
        return torch.empty(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor)

    for place in range(3):
        given = [output, x0, noise]
        given[place] = shifted(given[place])
        m, x, z = given
        arguments = {"noise": z, "seed": 1}
        call = functools.partial(with_gradient, vlb_terms, m, x, T[:2], SCHEDULE, **arguments)
        assert agree(on_host, call) == "VlbTermsBlock"
        call = functools.partial(
            with_gradient, denoising_loss, m, T[:2], SCHEDULE, prediction="v_prediction", x0=x,
            **arguments,
        )  # fmt: skip
        assert agree(on_host, call) == "DenoisingLossBlock"


def test_timesteps_and_indices_out_of_range(on_host, monkeypatch):
    """On a device they cannot be checked before the launch: t becomes T−1, of an index its low 24
    bits count."""
    monkeypatch.setattr(import_module("ddpm_fast.ops.checks"), "check_range_on_host", lambda *_: 0)
    out_t, out_index = torch.tensor([7, 200, -1]), torch.tensor([7, 2**24 + 5, -1])
    in_t, in_index = torch.tensor([7, 199, 199]), torch.tensor([7, 5, 2**24 - 1])
    for shape in ((3, 3, 16, 16), (3, 5)):
        output, x0 = tensors(shape, "contiguous", torch.float32, torch.uint8, None)
        for op in (
            lambda t, i, m=output, x=x0: denoising_loss(
                m, t, SCHEDULE, prediction="v_prediction", x0=x, seed=1, index=i
            ),
            lambda t, i, m=output, x=x0: vlb_terms(m, x, t, SCHEDULE, seed=1, index=i),
        ):
            found = on_host.run(lambda op=op: op(out_t, out_index))
            assert torch.equal(found, on_host.run(lambda op=op: op(in_t, in_index)))


@pytest.mark.parametrize("t", [0, 50])
@pytest.mark.parametrize("shape", [(3, 3, 20, 20), (3, 3, 9, 11)], ids=str)
def test_nan_and_infinity(shape, t, on_host):
    """A NaN is told in its sample alone, and reaches no gradient but its own."""
    output, x0 = tensors(shape, "contiguous", torch.float32, torch.uint8, None)
    output[1, 2, 4, 4] = math.nan
    output[2, 1, 3, 3] = 1e30
    losses, gradient = on_host.run(
        lambda: with_gradient(denoising_loss, output, t, SCHEDULE, seed=1)
    )
    assert losses.isnan().tolist() == [False, True, False]
    assert losses.isinf().tolist() == [False, False, True]
    assert gradient.isnan().nonzero().tolist() == [[1, 2, 4, 4]]
    arguments = (output, x0, t, SCHEDULE)
    call = functools.partial(with_gradient, vlb_terms, *arguments, return_mse=True, seed=1)
    terms, error, gradient = on_host.run(call)
    assert terms.isnan().tolist() == error.isnan().tolist() == [False, True, False]
    assert error.isinf().tolist() == [False, False, True]
    assert gradient[[0, 2]].isfinite().all()


def test_what_lies_past_a_samples_end_is_not_counted(on_host):
    """Lanes without elements add nothing, whatever the memory behind the tensor holds."""
    for dtype in DTYPES:
        memory = torch.full((2 * 520 + 4096,), torch.nan, dtype=dtype)
        output = memory[:1040].view(2, 520).copy_(randn((2, 520), seed=1))
        x0 = memory.float()[:1040].view(2, 520)
        assert on_host.run(lambda m=output: denoising_loss(m, 9, SCHEDULE, seed=1)).isfinite().all()
        found = on_host.run(lambda m=output, x=x0: vlb_terms(m, x, 9, SCHEDULE, seed=1))
        assert found.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 200, 256), (1, 3, 401, 399), (2, 200_000)], ids=str)
def test_many_shares(shape, on_host):
    """Hundreds of shares a sample, added up as in float64: the error does not grow with them."""
    output, x0 = tensors(shape, "contiguous", torch.float32, torch.float32, None)
    eps = randn(shape, seed=1, stream=2).double()
    exact = (output.double() - eps).square().flatten(1).mean(1)
    for blocks_only in (False, True):
        on_host.set_blocks_only(blocks_only)
        found = on_host.run(lambda: denoising_loss(output, 9, SCHEDULE, seed=1))
        torch.testing.assert_close(found.double(), exact, rtol=1e-7, atol=0)
        call = functools.partial(with_gradient, vlb_terms, output, x0, 9, SCHEDULE, seed=1)
        agree(on_host, call)


def test_the_sums_do_not_depend_on_the_gradient(on_host):
    output, x0 = tensors((3, 3, 20, 20), "contiguous", torch.bfloat16, torch.uint8, None)
    for call in (
        functools.partial(denoising_loss, output, T[:3], SCHEDULE, seed=1),
        functools.partial(vlb_terms, output, x0, T[:3], SCHEDULE, seed=1),
    ):
        alone = on_host.run(call)
        (first, *rest), function = call.args, call.func
        both = on_host.run(
            lambda f=function, m=first, rest=rest: with_gradient(f, m, *rest, seed=1)
        )
        assert torch.equal(alone, both[0])
