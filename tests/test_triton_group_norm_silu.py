"""group_norm_silu by Triton, in its interpreter: errors against float64, every option, layout and
stride, and bits in which the batch has no say."""

from __future__ import annotations

import itertools
from importlib import import_module

import pytest
import torch
from helpers import DTYPES, assert_as_good_as_eager, laid_out
from test_cuda_group_norm_silu import ALL, arguments, assert_close_to_eager, formula, gradients
from triton_on_host import lend_arithmetic, needs_interpreter

from ddpm_fast import group_norm_silu, randn, use_backend

pytest.importorskip("triton")
cuts = import_module("ddpm_fast.kernels.group_norm_silu_cut")

LAYOUTS = ["contiguous", "channels_last"]
# Groups of 4 channels, of 3, of more than a tile has; odd sides; what has other dimensions.
SHAPES = [
    ((1, 16, 4, 6), 4),
    ((1, 24, 3, 5), 8),
    ((1, 80, 2, 2), 1),
    ((1, 6, 2, 3, 5), 3),
    ((2, 6), 2),
]
CASES = [(*case, layout) for case in SHAPES for layout in LAYOUTS[: 1 + (len(case[0]) > 3)]]
OPTIONS = [(ALL, True), ("", True), ("weight bias emb", False), ("scale shift residual", True)]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch, poisoned_memory):
    needs_interpreter()
    lend_arithmetic(monkeypatch)


@pytest.fixture
def small_tiles(monkeypatch):
    """So that small tensors have many chunks of several tiles each, and pieces of groups."""
    monkeypatch.setattr(cuts, "ELEMENTS", 64)
    monkeypatch.setattr(cuts, "CHUNKS", 3)
    cuts.cut_of_groups.cache_clear()
    cuts.cut_of_channels.cache_clear()
    yield
    cuts.cut_of_groups.cache_clear()
    cuts.cut_of_channels.cache_clear()


def run(call):
    with use_backend("triton"):
        return call()


def check(x, groups, given, silu):
    """The result and, of a residual of zeros, so that s is the same in every dtype, gradients."""
    found = run(lambda: group_norm_silu(x, groups, **given, silu=silu))
    y, s = found if isinstance(found, tuple) else (found, x)
    if "residual" in given:
        assert torch.equal(s, x + given["residual"])
        given = {**given, "residual": torch.zeros_like(x)}
    assert y.stride() == s.stride() == x.stride()
    exact = formula(s, groups, {**given}, silu, torch.float64)
    assert_as_good_as_eager(y, formula(s, groups, given, silu, x.dtype), exact)
    found = gradients(run, x, groups, given, silu)
    exact, eager = (
        gradients(lambda call: call(), x, groups, given, silu, dtype)
        for dtype in (torch.float64, x.dtype)
    )
    for name in found:
        assert_close_to_eager(found[name], eager[name], exact[name])


@pytest.mark.parametrize(("shape", "groups", "layout"), CASES, ids=str)
def test_shapes(shape, groups, layout):
    """Of each in float32 with everything, and what varies in turn in 16 bits."""
    i = CASES.index((shape, groups, layout))
    for dtype, (options, silu) in (
        (torch.float32, OPTIONS[0]),
        (DTYPES[1 + i % 2], OPTIONS[1 + i % 3]),
    ):
        x, given = arguments(shape, layout, dtype, options)
        check(x, groups, given, silu)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "groups", "layout"), CASES, ids=str)
def test_everything_with_everything(shape, groups, layout):
    for dtype, (options, silu) in itertools.product(DTYPES, OPTIONS):
        x, given = arguments(shape, layout, dtype, options)
        check(x, groups, given, silu)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), [((1, 6, 5, 23), 3), ((1, 48, 3, 5), 1)], ids=str)
def test_chunks_of_several_tiles(shape, groups, layout, small_tiles):
    cut = cuts.cut_of_groups(
        shape[1], groups, shape[2] * shape[3], layout == "channels_last", 4, False, False, 1
    )
    assert cut.chunks > 1 or cut.pieces > 1
    assert cut.blocks.tiles > 1 or shape[1] == 48
    x, given = arguments(shape, layout, torch.float32, ALL)
    check(x, groups, given, True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_batch_has_no_say(layout, small_tiles, monkeypatch):
    """A sample's result and gradients, alone and in a batch: the same bits. Grids are 2 samples
    wide."""
    for module in ("_cut", "", "_sums", "_bwd"):
        monkeypatch.setattr(
            import_module(f"ddpm_fast.kernels.group_norm_silu{module}"), "SAMPLES_Y", 2
        )
    x, given = arguments((3, 6, 4, 6), layout, torch.bfloat16, "weight bias scale emb")

    def call(part):
        of_part = {**given, "scale": given["scale"][part]}
        leaf = x[part].detach().requires_grad_()
        y = group_norm_silu(leaf, 3, **of_part)
        return y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]

    together = run(lambda: call(slice(None)))
    parts = [run(lambda: call(slice(0, 1))), run(lambda: call(slice(1, 3)))]
    for whole, *of_parts in zip(together, *parts, strict=True):
        assert torch.equal(torch.cat(of_parts), whole)


@pytest.mark.parametrize(("channels", "dtype"), [(16, torch.bfloat16), (6, torch.float32)])
def test_tensors_with_gaps(channels, dtype):
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
    run(lambda: group_norm_silu(x, 2, **given, residual=residual, out=out))
    dense = run(lambda: group_norm_silu(values, 2, **given, residual=residual.contiguous()))
    torch.testing.assert_close(
        out, dense[0], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0
    )
    border = buffer.clone()
    border[:, 1:-1, 1:-1] = 3
    assert (border == 3).all()
    assert wide[:, channels : 2 * channels].isnan().all()
    inside = buffer.clone()[:, 1:-1, 1:-1].permute(0, 3, 1, 2).copy_(values)
    found = run(lambda: group_norm_silu(inside, 2, **given, out=inside))
    assert torch.equal(found, run(lambda: group_norm_silu(values, 2, **given)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mean_far_from_zero(layout, small_tiles):
    """10^4 standard deviations away: E[x^2] - E[x]^2 would leave nothing of the variance."""
    x = laid_out(1e4 + randn((1, 8, 12, 12), seed=1), layout)
    y = run(lambda: group_norm_silu(x, 4, silu=False))
    exact = formula(x, 4, {}, False, torch.float64)
    assert (y.double() - exact).abs().max() < 1.5e-3  # x - mean is good to 5e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_that_are_not_finite(layout):
    """NaN stays in its group; SiLU of what lies far below 0 is 0."""
    x = laid_out(randn((2, 8, 4, 4), seed=1), layout)
    x[0, 0, 1, 1] = torch.nan
    y = run(lambda: group_norm_silu(x, 2))
    assert y[0, :4].isnan().all()
    assert not y[0, 4:].isnan().any()
    assert not y[1].isnan().any()
    far = run(lambda: group_norm_silu(x[1:], 2, bias=torch.full((8,), -1e30)))
    assert (far.abs() < 1e-30).all()


def test_the_silu_is_the_cpus():
    """Of mean 0 and variance 1, whose statistics round nowhere: its bits, and its derivative's."""
    x = torch.tensor([1.0, -1.0]).repeat(512).view(1, 512, 1, 2).contiguous()
    weight, bias = (20 * randn((1, 512), seed=i)[0] for i in (1, 2))
    leaf = bias.requires_grad_()
    both = []
    for backend in ("triton", "cpu"):
        with use_backend(backend):
            y = group_norm_silu(x, 1, weight, leaf, eps=0.0)
            both.append((y.detach(), *torch.autograd.grad(y[..., :1].sum(), leaf)))
    for found, expected in zip(*both, strict=True):
        assert torch.equal(found, expected)


def test_memory_that_vectors_cannot_reach():
    x, given = arguments((2, 8, 4, 4), "contiguous", torch.float32, "weight")
    shifted = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    y = run(lambda: group_norm_silu(shifted, 2, **given))
    torch.testing.assert_close(y, run(lambda: group_norm_silu(x, 2, **given)), rtol=1e-5, atol=1e-6)
    assert cuts.layout_of([x], (None,) * 5, False) == (False, True, 4)
    assert cuts.layout_of([x, shifted], (given["weight"][1:], *[None] * 4), False)[1:] == (False, 1)


def test_every_element_has_a_place():
    """Tiles hold all groups and all channels of each, and room for what is combined."""
    for of_group, groups, pixels, last, itemsize in itertools.product(
        (1, 3, 4, 10, 24, 33, 64, 65, 512), (1, 2, 7, 32), (1, 49, 1024, 65536), (True, False),
        (2, 4),
    ):  # fmt: skip
        channels = of_group * groups
        cut = cuts.cut_of_groups(channels, groups, pixels, last, itemsize, False, True, 4)
        blocks = cut.blocks
        assert (cut.chunks - 1) * blocks.pixels * blocks.tiles < pixels
        assert cut.chunks * blocks.pixels * blocks.tiles >= pixels
        assert cut.pieces * cut.chunks <= blocks.parts
        if blocks.groups > 1:
            assert blocks.groups * of_group <= blocks.channels
            assert cut.pieces == 1
        else:
            assert cut.pieces * blocks.channels >= of_group
        assert cut.channel_tiles == -(-groups // blocks.groups) * cut.pieces
        assert cut.chunks <= max(cuts.CHUNKS, 1)
        cut = cuts.cut_of_channels(channels, pixels, last, False, True, 4)
        assert cut.channel_tiles * cut.blocks.channels >= channels
        assert cut.chunks * cut.blocks.pixels * cut.blocks.tiles >= pixels
        assert cut.chunks <= cut.blocks.parts
