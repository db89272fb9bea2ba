"""The CUDA bodies of group_norm_silu on the host, all kernels in their order of additions: errors
against float64, every option, layout and stride, and bits in which the batch has no say."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from helpers import DTYPES, assert_as_good_as_eager, laid_out, ulp

from ddpm_fast import group_norm_silu, randn, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Shape, groups, and the layouts that take it in float32 and in 16 bits: contiguous, channels_last.
NOT_HELD = (3, 2, 4104)  # two groups of more elements than a block holds
CHANNELS, PIXELS, SINGLES = "ChannelVectors", "PixelVectors", "Singles"
SHAPES = [
    ((2, 64, 8, 8), 8, (PIXELS, PIXELS), (CHANNELS, CHANNELS)),
    ((1, 12, 20, 18), 3, (PIXELS, PIXELS), (CHANNELS, SINGLES)),
    ((2, 136, 4, 4), 17, (PIXELS, PIXELS), (CHANNELS, CHANNELS)),  # more channels than lanes
    ((2, 24, 6, 6), 8, (PIXELS, SINGLES), (CHANNELS, CHANNELS)),  # a group ends within a vector
    ((2, 6, 5, 7), 2, (SINGLES, SINGLES), (SINGLES, SINGLES)),
    ((2, 8, 2, 4, 12), 1, (PIXELS, PIXELS), (CHANNELS, CHANNELS)),
    (NOT_HELD, 1, (PIXELS, PIXELS), None),  # five chunks, the last shorter
    ((2, 20, 12, 12), 10, (PIXELS, PIXELS), (CHANNELS, SINGLES)),  # the last tile has fewer groups
    ((3, 40), 5, (SINGLES, SINGLES), None),
]
CASES = [
    pytest.param(shape, groups, layout, bodies, id=f"{shape}-{layout}")
    for shape, groups, *both in SHAPES
    for layout, bodies in zip(("contiguous", "channels_last"), both, strict=True)
    if bodies is not None
]
# What is given, and whether the SiLU is taken.
OPTIONS = [("", True), ("weight bias", False), ("emb residual weight", True), ("scale shift", True)]
ALL = "weight bias emb scale shift residual"


def arguments(shape, layout, dtype, options):
    """x with a mean and a spread of its own in each channel, and what options name."""
    samples, channels, *sides = shape
    ones = [1] * len(sides)
    x = randn(shape, seed=1) * (0.5 + randn((1, channels), seed=2).abs().view(1, channels, *ones))
    x = x + 3 * randn((samples, channels), seed=3).view(samples, channels, *ones)
    wide = randn((samples, 2 * channels), seed=6).to(dtype)
    found = {
        "weight": 1 + randn((1, channels), seed=4)[0],
        "bias": randn((1, channels), seed=5)[0],
        "emb": randn((1, channels), seed=7).to(dtype),
        "scale": wide[:, :channels],
        "shift": wide[:, channels:],
        "residual": laid_out(randn(shape, seed=8).to(dtype), layout),
    }
    return laid_out(x.to(dtype), layout), {name: found[name] for name in options.split()}


def formula(x, groups, given, silu, dtype):
    """The reference in a dtype, s rounded to x's."""
    s = x + given["residual"] if "residual" in given else x
    others = {name: tensor.to(dtype) for name, tensor in given.items() if name != "residual"}
    return reference.group_norm_silu(s.to(dtype), groups, **others, silu=silu)[0]


def short(on_host: ModuleType) -> str:
    """The layout that took a problem; whole: as groups that a block holds."""
    name = on_host.last_body().replace("ddpm_fast::", "").replace("cuda::", "")
    whole = "whole " * name.startswith("GroupNormSiluWhole")
    for last, layout in (("true>", CHANNELS), ("false>", PIXELS)):
        if "WholeVectors" in name and last in name:
            return whole + layout
    return name


@pytest.mark.parametrize("chunks_only", [False, True], ids=["", "chunks"])
@pytest.mark.parametrize(("shape", "groups", "layout", "bodies"), CASES)
def test_forward(shape, groups, layout, bodies, chunks_only, on_host):
    on_host.set_chunks_only(chunks_only)
    for dtype in DTYPES:
        for options, silu in [*OPTIONS, (ALL, True)]:
            x, given = arguments(shape, layout, dtype, options)
            found = on_host.run(
                lambda x=x, a=given, b=silu: group_norm_silu(x, groups, **a, silu=b)
            )
            y, s = found if isinstance(found, tuple) else (found, None)
            if s is not None:
                assert torch.equal(s, x + given["residual"])
                assert s.stride() == x.stride()
            assert y.stride() == x.stride()
            exact = formula(x, groups, given, silu, torch.float64)
            assert_as_good_as_eager(y, formula(x, groups, given, silu, dtype), exact)
            body = bodies[dtype != torch.float32]
            held = not chunks_only and body != SINGLES and shape != NOT_HELD
            assert short(on_host) == "whole " * held + body


def gradients(run, x, groups, given, silu, dtype=None):
    """Of every tensor; dtype: of the formula, in the place of the op."""
    tensors = {"x": x, **given}
    leaves = {k: t.detach().to(dtype or t.dtype).requires_grad_() for k, t in tensors.items()}
    others = {name: leaf for name, leaf in leaves.items() if name != "x"}

    def call():
        if dtype is not None:
            y, s = reference.group_norm_silu(leaves["x"], groups, **others, silu=silu)
        else:
            found = group_norm_silu(leaves["x"], groups, **others, silu=silu)
            y, s = found if isinstance(found, tuple) else (found, leaves["x"])
        by_y, by_s = (laid_out(randn(x.shape, seed=i).to(x.dtype), "contiguous") for i in (9, 10))
        loss = (y * by_y.to(y.dtype)).sum()
        if "residual" in given:
            loss = loss + (s * by_s.to(s.dtype)).sum()
        return torch.autograd.grad(loss, list(leaves.values()))

    return dict(zip(leaves, run(call), strict=True))


def assert_close_to_eager(found, eager, exact):
    """The acceptance rule for sums of many terms, of which there may be but a few: 4 ulp more."""
    error, of_eager = ((t.double() - exact).abs().max().item() for t in (found, eager))
    allowed = 2 * of_eager + 4 * ulp(found.dtype) * max(1.0, exact.abs().max().item())
    assert found.shape == exact.shape
    assert error <= allowed  # false for NaN


@pytest.mark.parametrize(("shape", "groups", "layout", "bodies"), CASES)
def test_gradients(shape, groups, layout, bodies, on_host):
    for dtype in DTYPES:
        for options, silu in [*OPTIONS[:2], (ALL, True)]:
            x, given = arguments(shape, layout, dtype, options)
            if "residual" in given:  # so that s is the same in every dtype
                given["residual"] = torch.zeros_like(given["residual"])
            found = gradients(on_host.run, x, groups, given, silu)
            assert short(on_host) == bodies[dtype != torch.float32]
            exact = gradients(lambda call: call(), x, groups, given, silu, torch.float64)
            eager = gradients(lambda call: call(), x, groups, given, silu, dtype)
            for name in found:
                assert_close_to_eager(found[name], eager[name], exact[name])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_batch_has_no_say(layout, on_host):
    """A sample's results and sums have the same bits alone and in any batch."""
    for shape, groups in (((5, 24, 6, 6), 8), ((3, 8, 12, 400), 2), ((4, 6, 5, 7), 3)):
        x, given = arguments(shape, layout, torch.float32, "weight bias residual")
        residual = given.pop("residual")

        def call(a, b, given=given, groups=groups):
            leaf = a.detach().requires_grad_()
            y, _ = group_norm_silu(leaf, groups, **given, residual=b)
            return y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]

        together = on_host.run(lambda x=x, residual=residual, call=call: call(x, residual))
        for n in range(shape[0]):
            alone = on_host.run(lambda a=x[n : n + 1], b=residual[n : n + 1], call=call: call(a, b))
            for found, expected in zip(alone, together, strict=True):
                assert torch.equal(found[0], expected[n])


def test_samples_that_vectors_cannot_reach(on_host):
    """Nor is one of them taken by vectors when it is alone."""
    memory = randn((2, 8 * 16 + 1), seed=1)
    x = memory[:, :-1].unflatten(1, (4, 4, 8)).permute(0, 3, 1, 2)
    together = on_host.run(lambda: group_norm_silu(x, 2))
    alone = on_host.run(lambda: group_norm_silu(x[:1], 2))
    assert short(on_host) == SINGLES
    assert torch.equal(alone[0], together[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "body"), [(16, f"whole {CHANNELS}"), (16, CHANNELS), (6, SINGLES)]
)
def test_tensors_with_gaps(dtype, channels, body, on_host):
    """x and the residual are slices of channels, the result the interior of a padded buffer: what
    lies between is neither read nor written."""
    wide = torch.full((2, 3 * channels, 5, 7), torch.nan, dtype=dtype)
    wide = wide.contiguous(memory_format=torch.channels_last)
    values, given = arguments((2, channels, 5, 7), "channels_last", dtype, "weight emb residual")
    x, residual = wide[:, :channels], wide[:, 2 * channels :]
    x.copy_(values)
    residual.copy_(given.pop("residual"))
    buffer = torch.full((2, 7, 9, channels), 3.0, dtype=dtype)
    out = buffer[:, 1:-1, 1:-1].permute(0, 3, 1, 2)
    on_host.set_chunks_only(body == CHANNELS)
    on_host.run(lambda: group_norm_silu(x, 2, **given, residual=residual, out=out))
    assert short(on_host) == body
    dense = on_host.run(lambda: group_norm_silu(values, 2, **given, residual=residual))
    assert torch.equal(out, dense[0])
    border = buffer.clone()
    border[:, 1:-1, 1:-1] = 3
    assert (border == 3).all()
    assert wide[:, channels : 2 * channels].isnan().all()


@pytest.mark.parametrize("body", [f"whole {CHANNELS}", CHANNELS])
def test_in_place_and_offsets_of_64_bits(body, on_host):
    """Of a tensor whose elements lie further apart than 2^31."""
    torch.use_deterministic_algorithms(False)  # pages that nobody touches are never there
    memory = torch.empty(2**32 + 2**31, dtype=torch.bfloat16)
    x = memory.as_strided((2, 8, 2, 2), (2**32, 1, 2**30 + 2**20, 64))
    values, _ = arguments((2, 8, 2, 2), "channels_last", torch.bfloat16, "")
    x.copy_(values)
    on_host.set_chunks_only(body == CHANNELS)
    on_host.run(lambda: group_norm_silu(x, 2, out=x))
    assert short(on_host) == body
    expected = on_host.run(lambda: group_norm_silu(values, 2))
    assert torch.equal(x, expected)


@pytest.mark.parametrize("chunks_only", [False, True], ids=["", "chunks"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_mean_far_from_zero(layout, chunks_only, on_host):
    """10^4 standard deviations away: E[x^2] - E[x]^2 would leave nothing of the variance."""
    on_host.set_chunks_only(chunks_only)
    x = laid_out(1e4 + randn((2, 16, 24, 24), seed=1), layout)
    y = on_host.run(lambda: group_norm_silu(x, 4, silu=False))
    exact = formula(x, 4, {}, False, torch.float64)
    assert (y.double() - exact).abs().max() < 1e-3  # x - mean is good to 5e-4
    assert abs(y.double().var().item() - 1) < 1e-3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_values_that_are_not_finite(layout, on_host):
    """NaN stays in its group; SiLU of what lies far below 0 is 0."""
    x = laid_out(randn((2, 8, 4, 4), seed=1), layout)
    x[0, 0, 1, 1] = torch.nan
    y = on_host.run(lambda: group_norm_silu(x, 2))
    assert y[0, :4].isnan().all()
    assert not y[0, 4:].isnan().any()
    assert not y[1].isnan().any()
    far = on_host.run(lambda: group_norm_silu(x[1:], 2, bias=torch.full((8,), -1e30)))
    assert (far.abs() < 1e-30).all()


def test_memory_that_vectors_cannot_reach(on_host):
    x, _ = arguments((2, 8, 4, 4), "contiguous", torch.float32, "")
    shifted = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    y = on_host.run(lambda: group_norm_silu(shifted, 2))
    assert short(on_host) == SINGLES
    torch.testing.assert_close(y, on_host.run(lambda: group_norm_silu(x, 2)), rtol=1e-5, atol=1e-6)
