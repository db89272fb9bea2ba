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

from ddpm_fast import NoiseSchedule, randn, reference, reverse_step, use_backend
from ddpm_fast.backends import native

SCHEDULE = NoiseSchedule.cosine()
pytestmark = pytest.mark.usefixtures("poisoned_memory")
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
VARIANCES = ["fixed_small", "fixed_large", "learned", "learned_range"]
SEED = 2**63 + 12345


def table_of(prediction="epsilon", variance="fixed_small", **kwargs):
    return SCHEDULE.step_table(prediction=prediction, variance=variance, **kwargs)


def inputs(shape, dtype, table, model_dtype=None, seed=1):
    """x, a model output, its unconditional one; log-variances of a plausible size."""
    doubled = table.model_variance != "none"
    model_shape = (shape[0], 2 * shape[1], *shape[2:]) if doubled else shape
    outputs = []
    for i in (1, 2):
        m = randn(model_shape, seed=seed + i)
        if table.model_variance == "learned":
            m[:, shape[1] :] = m[:, shape[1] :] - 4
        outputs.append(m.to(model_dtype or dtype))
    return randn(shape, seed=seed).to(dtype), *outputs


def steps_for(n, table):
    return torch.tensor([0, len(table) - 1, len(table) // 2])[:n]


def exactly(x, m, table, steps, z, **kwargs):
    """The formula in float64, from the same float32 rows."""
    names = ("model_output_uncond", "guidance_scale", "x0")
    wide = {k: v.double() if k in names else v for k, v in kwargs.items()}
    return reference.reverse_step(
        x.double(),
        m.double(),
        table.rows.double(),
        steps,
        z.double(),
        variance=table.model_variance,
        **wide,
    )


def eagerly(x, m, table, steps, z, **kwargs):
    """The formula as plain PyTorch writes it, in x's dtype, without fma."""
    rows = [reference.at(table.rows[:, i], steps, x) for i in range(9)]
    v = None
    if table.model_variance != "none":
        m, v = m.chunk(2, 1)
    m = m.to(x.dtype)
    uncond = kwargs.get("model_output_uncond")
    if uncond is not None:
        uncond = uncond.to(x.dtype)[:, : x.shape[1]]
        scale = kwargs["guidance_scale"].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        m = uncond + scale * (m - uncond)
    x0 = rows[0] * (rows[2] * m + rows[1] * x)
    if kwargs.get("x0") is not None:
        x0 = kwargs["x0"].to(x.dtype)
    x0 = x0.clamp(*kwargs.get("clip", (-math.inf, math.inf)))
    sigma = rows[6]
    if table.model_variance in ("learned", "learned_range"):
        log_var = v.to(x.dtype)
        if table.model_variance == "learned_range":
            fraction = (log_var + 1) / 2
            log_var = fraction * rows[8] + (1 - fraction) * rows[7]
        sigma = sigma * torch.exp(0.5 * log_var)
    return rows[3] * x0 + rows[4] * x + rows[5] * m + sigma * z.to(x.dtype), x0


def noise_for(shape, table, steps):
    return randn(shape, seed=SEED, stream=1, index=table.timesteps[steps])


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


# Gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range", "learned"])
@pytest.mark.parametrize("return_x0", [False, True])
def test_gradient_against_float64_differences(variance, return_x0):
    table = table_of("v_prediction", variance, num_steps=50)
    x, m, uncond = inputs((2, 2, 3, 3), torch.float32, table)
    steps = torch.tensor([3, 30])
    z = noise_for(x.shape, table, steps)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, m, uncond)]
    weights = [randn(x.shape, seed=50 + i) for i in range(2)]
    result = reverse_step(
        leaves[0],
        leaves[1],
        table,
        steps,
        seed=SEED,
        model_output_uncond=leaves[2],
        guidance_scale=1.5,
        return_x0=return_x0,
    )
    outputs = result if return_x0 else (result,)
    sum((out * w).sum() for out, w in zip(outputs, weights, strict=False)).backward()

    def total(x, m, uncond):
        results = exactly(
            x,
            m,
            table,
            steps,
            z,
            clip=(-1.0, 1.0),
            model_output_uncond=uncond,
            guidance_scale=torch.tensor(1.5),
        )
        chosen = results if return_x0 else results[:1]
        return sum((out * w).sum() for out, w in zip(chosen, weights, strict=False))

    h = 1e-6
    for which, leaf in enumerate(leaves):
        for flat in range(0, leaf.numel(), 5):
            values = [tensor.double() for tensor in (x, m, uncond)]
            moved = values[which].clone()
            moved.view(-1)[flat] += h
            up = total(*[moved if i == which else v for i, v in enumerate(values)])
            moved = moved.clone()
            moved.view(-1)[flat] -= 2 * h
            down = total(*[moved if i == which else v for i, v in enumerate(values)])
            difference = ((up - down) / (2 * h)).item()
            assert leaf.grad.view(-1)[flat].item() == pytest.approx(difference, rel=1e-3, abs=1e-4)


def test_what_autograd_cannot_follow_is_refused():
    table = table_of()
    x, m, _ = inputs((1, 3, 4, 4), torch.float32, table)
    weight = torch.ones_like(x, requires_grad=True)
    y = (weight * x).sum()
    reverse_step(x, m, table, 4, seed=3, out=x)  # x is saved for y's backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            reverse_step(dual, m, table, 4, seed=3)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        reverse_step(leaf, m, table, 4, seed=3).square().sum(), leaf, create_graph=True
    )
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


def test_out_may_not_overlap_in_part():
    table = table_of()
    buffer = randn((5, 3, 4, 4), seed=1)
    m = randn((4, 3, 4, 4), seed=2)
    with pytest.raises(ValueError, match="out must not overlap x in part"):
        reverse_step(buffer[:4], m, table, 0, seed=0, out=buffer[1:])
    with pytest.raises(ValueError, match="out must not overlap model_output in part"):
        reverse_step(m, buffer[:4], table, 0, seed=0, out=buffer[1:])
    expected = reverse_step(m, buffer[:4], table, 0, seed=0)
    assert torch.equal(reverse_step(m, buffer[:4], table, 0, seed=0, out=buffer[:4]), expected)


def test_out_and_gradients_do_not_mix():
    table = table_of()
    x = torch.zeros(1, 3, 4, 4, requires_grad=True)
    with pytest.raises(ValueError, match="out, out_lowp and nan_step cannot be differentiated"):
        reverse_step(x, torch.zeros(1, 3, 4, 4), table, 0, seed=0, out=torch.empty(1, 3, 4, 4))


# torch.library ------------------------------------------------------------------------------


def op_inputs(x, m, table, step, steps, uncond=None, scales=None, noise=None):
    return (
        x, m, table.rows, table.timesteps, step, steps, 1, None, None, 0, -1.0, 1.0,
        uncond, 1.5, scales, noise, None,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    table = table_of()
    x, m, uncond = inputs((3, 2, 5, 7), dtype, table)
    op, out_op = torch.ops.ddpm_fast.reverse_step, torch.ops.ddpm_fast.reverse_step_out
    steps, scales = torch.tensor([3, 4, 5]), torch.tensor([1.0, 2.0, 3.0])
    torch.library.opcheck(op.default, (*op_inputs(x, m, table, 4, None), False))
    last = x.to(memory_format=torch.channels_last)
    arguments = op_inputs(last, m, table, 0, steps, uncond, scales, torch.zeros_like(x))
    torch.library.opcheck(op.default, (*arguments, True))
    if dtype == torch.float32:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, m, uncond)]
        arguments = op_inputs(leaves[0], leaves[1], table, 0, steps, leaves[2], scales)
        torch.library.opcheck(op.default, (*arguments, True))
    outputs = {
        "out": torch.empty_like(x),
        "out_x0": torch.empty(x.shape),
        "out_lowp": None,
        "nan_step": torch.full((1,), 9, dtype=torch.int32),
    }
    torch.library.opcheck(out_op.default, op_inputs(x, m, table, 4, None), outputs)


def test_compiles_whole():
    table = table_of(variance="learned_range")
    x, m, _ = inputs((3, 2, 5, 7), torch.float32, table)

    def f(x, m, step):
        y, x0 = reverse_step(x, m, table, step, seed=3, return_x0=True)
        return y + x0

    compiled = torch.compile(f, fullgraph=True)
    for step in (torch.tensor(4), torch.tensor(900)):
        assert torch.equal(compiled(x, m, step), f(x, m, step))
    by_int = torch.compile(lambda x, m, i: reverse_step(x, m, table, i, seed=3), fullgraph=True)
    for step in (4, 5, 6):
        assert torch.equal(by_int(x, m, step), reverse_step(x, m, table, step, seed=3))


def test_compiles_whole_with_out():
    table = table_of()
    x, m, _ = inputs((3, 2, 5, 7), torch.float32, table)

    def f(x, m):
        return reverse_step(x, m, table, 4, seed=3, out=torch.empty_like(x)) * 2

    assert torch.equal(torch.compile(f, fullgraph=True)(x, m), f(x, m))


def test_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    table = table_of()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, 8, 8)
        out = reverse_step(x, torch.empty(2, 3, 8, 8), table, 0, seed=0)
        assert out.shape == x.shape


# Bad input ----------------------------------------------------------------------------------

X = torch.zeros(2, 3, 4, 4)
META = torch.zeros(2, 3, 4, 4, device="meta")


@pytest.mark.parametrize(
    ("x", "m", "step", "arguments", "error", "message"),
    [
        (X.double(), X, 0, {}, TypeError, "x must be float32, bfloat16, float16; got torch.float"),
        (None, X, 0, {}, TypeError, "x must be a tensor; got NoneType"),
        (X, X.double(), 0, {}, TypeError, "model_output must be float32"),
        (X, X[:, :2], 0, {}, ValueError, r"model_output must have shape \[2, 3, 4, 4\]; got"),
        (X, META, 0, {}, ValueError, "model_output must be on cpu, as the others are; got meta"),
        (X, X, 10, {}, ValueError, "step must lie in 0 … 9; got 10"),
        (X, X, -1, {}, ValueError, "step must lie in 0 … 9; got -1"),
        (X, X, 1.0, {}, TypeError, "step must be an integer; got 1.0 .float"),
        (X, X, torch.tensor([0, 10]), {}, ValueError, "step must lie in 0 … 9; got 0 … 10"),
        (X, X, torch.tensor(-1), {}, ValueError, "step must lie in 0 … 9; got -1 … -1"),
        (X, X, torch.tensor([0, 1, 2]), {}, ValueError, r"step must have shape \[2\]; got \[3\]"),
        (X, X, torch.tensor([0.0, 1.0]), {}, TypeError, "step must be int64"),
        (X, X, 0, {"clip": (1.0, -1.0)}, ValueError, "clip must be"),
        (X, X, 0, {"clip": (math.nan, 1.0)}, ValueError, "clip must be"),
        (X, X, 0, {"noise": X[:1]}, ValueError, r"noise must have shape \[2, 3, 4, 4\]"),
        (X, X, 0, {"x0": X.long()}, TypeError, "x0 must be float32"),
        (X, X, 0, {"guidance_scale": 2.0}, ValueError, "both or neither"),
        (X, X, 0, {"model_output_uncond": X}, ValueError, "both or neither"),
        (X, X, 0, {"model_output_uncond": X.half(), "guidance_scale": 2.0}, TypeError,
         "model_output_uncond must be torch.float32, as model_output is"),
        (X, X, 0, {"model_output_uncond": X, "guidance_scale": torch.zeros(3)}, ValueError,
         r"guidance_scale must have shape \[2\]"),
        (X, X, 0, {"sample_ids": torch.tensor([-1, 0])}, ValueError, "sample_ids must not be neg"),
        (X, X, 0, {"out": X[:1].clone()}, ValueError, r"out must have shape \[2, 3, 4, 4\]"),
        (X, X, 0, {"out": X.half()}, TypeError, "out must be float32"),
        (X, X, 0, {"out": X.to(memory_format=torch.channels_last)}, ValueError,
         "out must be contiguous, as x is"),
        (X, X, 0, {"out_lowp": X.clone()}, TypeError, "out_lowp must be bfloat16, float16"),
        (X, X, 0, {"nan_step": torch.zeros(2, dtype=torch.int32)}, ValueError, "nan_step must"),
        (X, X, 0, {"nan_step": torch.zeros(1)}, TypeError, "nan_step must be int32"),
    ],
)  # fmt: skip
def test_bad_arguments(x, m, step, arguments, error, message):
    table = table_of(num_steps=10)
    with pytest.raises(error, match=message):
        reverse_step(x, m, table, step, **{"seed": 0, **arguments})


def test_bad_model_channels():
    table = table_of(variance="learned_range")
    with pytest.raises(ValueError, match=r"shape \[2, 6, 4, 4\], twice x's channels"):
        reverse_step(X, X, table, 0, seed=0)
    with pytest.raises(ValueError, match="channels on dimension 1"):
        reverse_step(torch.zeros(2), torch.zeros(2), table, 0, seed=0)


def test_error_bound_is_tight_enough_to_fail():
    """The acceptance rule rejects a result that is off by a few ulp."""
    exact = randn((1, 100), seed=1).double()
    good = exact.float()
    assert_as_good_as_eager(good, good, exact)
    with pytest.raises(AssertionError, match="allowed"):
        assert_as_good_as_eager(good + 20 * ulp(torch.float32), good, exact)
