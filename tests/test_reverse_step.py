"""reverse_step against the formula in float64: every table, dtype, layout and instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    DTYPES,
    ISAS,
    LAYOUTS,
    SHAPES,
    assert_as_good_as_eager,
    laid_out,
    poisoned_like,
    ulp,
)
from reverse_step_cases import (
    PREDICTIONS,
    SCHEDULE,
    SEED,
    VARIANCES,
    eagerly,
    exactly,
    inputs,
    noise_for,
    steps_for,
    table_of,
)

from ddpm_fast import randn, reference, reverse_step, use_backend
from ddpm_fast.backends import native

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_layouts(shape, dtype, layout, isa):
    for variance in ("fixed_large", "learned_range"):
        table = table_of("v_prediction", variance)
        x, m, _ = inputs(shape, dtype, table)
        steps = steps_for(shape[0], table)
        x_in, m_in = laid_out(x, layout), laid_out(m, layout)
        out, x0 = reverse_step(x_in, m_in, table, steps, seed=SEED, return_x0=True)
        z = noise_for(shape, table, steps)
        exact = exactly(x, m, table, steps, z, clip=(-1.0, 1.0))
        eager = eagerly(x, m, table, steps, z, clip=(-1.0, 1.0))
        assert out.dtype == dtype
        assert_as_good_as_eager(out, eager[0], exact[0])
        assert_as_good_as_eager(x0, eager[1], exact[1])
        if layout != "strided" and x.numel():
            assert out.stride() == x_in.stride()


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", ["ddpm", "ddim-x0", "ddim-model"])
@pytest.mark.parametrize("clip", [(-1.0, 1.0), (-0.2, 3.0), None])
def test_every_table(method, prediction, variance, clip, isa):
    kwargs = {} if method == "ddpm" else {"method": "ddim", "eta": 0.7, "eps_source": method[5:]}
    table = table_of(prediction, variance, num_steps=77, spacing="trailing", **kwargs)
    shape = (3, 2, 9, 11)
    for dtype in DTYPES:
        x, m, uncond = inputs(shape, dtype, table)
        steps = steps_for(3, table)
        z = noise_for(shape, table, steps)
        scales = torch.tensor([0.0, 1.0, 2.5])
        out, x0 = reverse_step(
            x,
            m,
            table,
            steps,
            seed=SEED,
            clip=clip,
            return_x0=True,
            model_output_uncond=uncond,
            guidance_scale=scales,
        )
        options = {
            "clip": clip or (-math.inf, math.inf),
            "model_output_uncond": uncond,
            "guidance_scale": scales,
        }
        exact = exactly(x, m, table, steps, z, **options)
        eager = eagerly(x, m, table, steps, z, **options)
        for i in range(3):  # a sample at a time: their scales differ by 10⁴
            if eager[0][i].isfinite().all():
                assert_as_good_as_eager(out[i], eager[0][i], exact[0][i])
            if eager[1][i].isfinite().all():
                assert_as_good_as_eager(x0[i], eager[1][i], exact[1][i])


@pytest.mark.parametrize("variance", VARIANCES)
def test_same_bits_on_every_path(variance, isa):
    """Instruction sets, layouts and in-place; the reference too, but for its own exp."""
    table = table_of("epsilon", variance)
    x, m, uncond = inputs((3, 3, 19, 23), torch.float32, table)
    steps = steps_for(3, table)
    options = {"seed": SEED, "model_output_uncond": uncond, "guidance_scale": 1.7}
    with use_backend("reference"):
        expected = reverse_step(x, m, table, steps, **options)
    for layout in LAYOUTS:
        out = reverse_step(laid_out(x, layout), laid_out(m, layout), table, steps, **options)
        if variance.startswith("learned"):
            torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)
        else:
            assert torch.equal(out, expected)
    portable_bits = reverse_step(x, m, table, steps, **options)
    in_place = x.clone()
    assert reverse_step(in_place, m, table, steps, out=in_place, **options) is in_place
    assert torch.equal(in_place, portable_bits)


def test_learned_bits_agree_between_instruction_sets():
    table = table_of("epsilon", "learned_range")
    x, m, _ = inputs((2, 3, 33, 31), torch.float32, table)
    before, results = native.isa(), []
    try:
        for isa in [isa for isa in ISAS if isa in native.supported_isas()]:
            native.set_isa(isa)
            results.append(reverse_step(x, m, table, 400, seed=1))
    finally:
        native.set_isa(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("model_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_and_model_may_differ_in_dtype(dtype, model_dtype, isa):
    table = table_of()
    x, m, _ = inputs((2, 3, 16, 17), dtype, table, model_dtype)
    steps = torch.tensor([0, 600])
    z = noise_for(x.shape, table, steps)
    out = reverse_step(x, m, table, steps, seed=SEED)
    exact = exactly(x, m, table, steps, z, clip=(-1.0, 1.0))[0]
    assert_as_good_as_eager(out, eagerly(x, m, table, steps, z, clip=(-1.0, 1.0))[0], exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_the_float32_step_rounded_once(dtype, isa):
    for variance in ("fixed_small", "learned_range"):
        table = table_of("epsilon", variance, num_steps=50)
        x, m, _ = inputs((2, 3, 16, 17), dtype, table)
        wide = reverse_step(x.float(), m.float(), table, 7, seed=SEED)
        for layout in LAYOUTS:
            low = reverse_step(laid_out(x, layout), laid_out(m, layout), table, 7, seed=SEED)
            assert torch.equal(low, wide.to(dtype))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_odd_strides_and_empty(backend):
    """Transposed, expanded, of size 1, empty: as their contiguous copies."""
    table = table_of(num_steps=50)
    base = randn((5, 3, 4, 6), seed=1)
    views = [
        base.transpose(2, 3),
        base.transpose(0, 1),
        base[:, :1].expand(5, 3, 4, 6),
        base[:1, :, :, :1].transpose(0, 3),
        base[:, 1:2],
        base.flip(0)[:0],
        base[:, :0],
        base[0, 0, 0],
    ]
    with use_backend(backend):
        for x in views:
            m = torch.sin(x)
            expected = reverse_step(x.contiguous(), m.contiguous(), table, 7, seed=1)
            assert torch.equal(reverse_step(x, m, table, 7, seed=1), expected)
            into = torch.empty(x.shape)
            assert torch.equal(reverse_step(x, m, table, 7, seed=1, out=into), expected)
            noise = torch.cos(x)
            given = reverse_step(x, m, table, 7, seed=1, noise=noise)
            contiguous = reverse_step(x.contiguous(), m, table, 7, seed=1, noise=noise.contiguous())
            assert torch.equal(given, contiguous)


def test_learned_variance_at_the_edges():
    """Beyond float32's exponents, and NaN where σ is 0: the backends agree."""
    for variance in ("learned", "learned_range"):
        table = table_of("epsilon", variance, num_steps=50)
        x, m, _ = inputs((1, 1, 1, 5), torch.float32, table)
        m[0, 1, 0] = torch.tensor([200.0, -300.0, 1e30, -1e30, 5.0])
        with use_backend("reference"):
            expected = reverse_step(x, m, table, 7, seed=0)
        found = reverse_step(x, m, table, 7, seed=0)
        torch.testing.assert_close(found, expected, rtol=3e-6, atol=1e-6)
        m[0, 1] = torch.nan
        assert reverse_step(x, m, table, 49, seed=0).isfinite().all()


def test_steps_as_int_scalar_and_per_sample(isa):
    table = table_of(num_steps=50)
    x, m, _ = inputs((4, 3, 8, 8), torch.float32, table)
    by_int = reverse_step(x, m, table, 7, seed=SEED)
    assert torch.equal(by_int, reverse_step(x, m, table, torch.tensor(7), seed=SEED))
    assert torch.equal(by_int, reverse_step(x, m, table, torch.tensor([7] * 4), seed=SEED))
    mixed = reverse_step(x, m, table, torch.tensor([7, 0, 49, 7]), seed=SEED)
    for i, step in enumerate([7, 0, 49, 7]):
        assert torch.equal(mixed[i], reverse_step(x, m, table, step, seed=SEED)[i])


def test_noise_is_the_addressed_one(isa):
    """Stream 1, the timestep as index, ids and per-sample seeds; the last row draws none."""
    table = table_of(num_steps=50)
    x, m, _ = inputs((3, 2, 9, 5), torch.float32, table)
    ids, seeds = torch.tensor([4, 1, 2**40]), torch.tensor([5, -1, 7])
    for layout in LAYOUTS:
        drawn = reverse_step(laid_out(x, layout), m, table, 7, seed=seeds, sample_ids=ids)
        z = randn(x.shape, seed=seeds, sample_ids=ids, stream=1, index=int(table.timesteps[7]))
        given = reverse_step(x, m, table, 7, seed=0, noise=laid_out(z, layout))
        assert torch.equal(drawn, given)
    last = reverse_step(x, m, table, 49, seed=1)
    assert torch.equal(last, reverse_step(x, m, table, 49, seed=2))
    assert torch.equal(last, reverse_step(x, m, table, 49, seed=0, noise=z * torch.nan))


def test_outputs(isa):
    table = table_of(num_steps=50)
    x, m, _ = inputs((3, 3, 13, 11), torch.float32, table)
    expected, x0 = reverse_step(x, m, table, 7, seed=SEED, return_x0=True)
    for layout in ("contiguous", "channels_last"):
        x_in = laid_out(x, layout)
        for low in (torch.bfloat16, torch.float16):
            out, narrow = poisoned_like(x_in), poisoned_like(x_in, low)
            result = reverse_step(
                x_in, m, table, 7, seed=SEED, out=out, out_lowp=narrow, return_x0=True
            )
            assert result[0] is out
            assert torch.equal(out, expected)
            assert torch.equal(result[1], x0)
            assert torch.equal(narrow, expected.to(low))
    assert torch.equal(x0, x0.clamp(-1, 1))


def test_given_x0_takes_the_place_of_the_models():
    table = table_of("v_prediction", method="ddim", eps_source="model", num_steps=50)
    x, m, _ = inputs((3, 3, 13, 11), torch.float32, table)
    given = 1.5 * randn(x.shape, seed=77)
    steps, z = torch.full((3,), 7), torch.zeros_like(x)
    out, x0 = reverse_step(x, m, table, 7, seed=0, x0=given, return_x0=True)
    exact = exactly(x, m, table, steps, z, x0=given, clip=(-1.0, 1.0))[0]
    assert torch.equal(x0, given.clamp(-1, 1))
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = reverse_step(x, m, table, 7, seed=0, x0=given.to(dtype), return_x0=True)[1]
        assert torch.equal(rounded, given.to(dtype).float().clamp(-1, 1))


def test_nan_passes_and_is_noted(isa):
    table = table_of(num_steps=50)
    for variance in ("fixed_small", "learned_range"):
        table = table_of("epsilon", variance, num_steps=50)
        x, m, _ = inputs((3, 3, 13, 11), torch.float32, table)
        word = torch.full((1,), 1000, dtype=torch.int32)
        reverse_step(x, m, table, 7, seed=0, nan_step=word)
        assert word.item() == 1000
        for layout in LAYOUTS:
            reverse_step(laid_out(x, layout), laid_out(m, layout), table, 7, seed=0, nan_step=word)
            assert word.item() == 1000
        m[1, 2, 12, 10] = torch.nan
        out = reverse_step(x, m, table, torch.tensor([9, 7, 3]), seed=0, nan_step=word)
        assert word.item() == 7
        assert out.isnan().sum() == 1
        assert out[1, 2, 12, 10].isnan()
        reverse_step(x, m, table, 8, seed=0, nan_step=word)
        assert word.item() == 7  # the first row stays
        with use_backend("reference"):
            word = torch.full((1,), 1000, dtype=torch.int32)
            reverse_step(x, m, table, torch.tensor([9, 7, 3]), seed=0, nan_step=word)
            assert word.item() == 7


@pytest.mark.parametrize("clip", [(-1.0, 1.0), None])
def test_infinite_output_with_and_without_clip(clip, isa):
    table = table_of(num_steps=50)
    x, m, _ = inputs((1, 3, 8, 8), torch.float32, table)
    m[0, 0, 0, 0] = -torch.inf
    _, x0 = reverse_step(x, m, table, 7, seed=0, clip=clip, return_x0=True)
    assert x0[0, 0, 0, 0] == (torch.inf if clip is None else 1.0)


def test_cosine_end_keeps_its_digits():
    """At the last cosine step 1/√ᾱ is above 10⁴: multiplying it out would lose 1e-2."""
    table = table_of()
    assert table.rows[0, 0] > 1e4
    x0 = randn((1, 3, 64, 64), seed=1).clamp(-1, 1)
    eps = randn((1, 3, 64, 64), seed=2)
    t = torch.tensor([999])
    x = reference.q_sample(x0.double(), t, SCHEDULE, eps.double()).float()
    steps, z = torch.zeros(1, dtype=torch.int64), torch.zeros_like(x)
    found = reverse_step(x, eps, table, 0, seed=0, noise=z, clip=None, return_x0=True)[1]
    exact = exactly(x, eps, table, steps, z)[1]
    error = (found.double() - exact).abs().max()
    assert error < 4e-3  # two ulp of 1 times 1/√ᾱ
    naive = table.rows[0, 0] * x - (table.rows[0, 0] * -table.rows[0, 2]) * eps
    assert (naive.double() - exact).abs().max() > 2 * error


def test_error_bound_is_tight_enough_to_fail():
    """The acceptance rule rejects a result that is off by a few ulp."""
    exact = randn((1, 100), seed=1).double()
    good = exact.float()
    assert_as_good_as_eager(good, good, exact)
    with pytest.raises(AssertionError, match="allowed"):
        assert_as_good_as_eager(good + 20 * ulp(torch.float32), good, exact)
