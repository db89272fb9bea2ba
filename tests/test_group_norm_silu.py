"""group_norm_silu and its gradient against the formula in float64, over dtypes, shapes, layouts and
instruction sets."""

from __future__ import annotations

import pytest
import torch
from group_norm_cases import CASES, COMBINATIONS, eager, exact, problem
from helpers import DTYPES, LAYOUTS, assert_as_good_as_eager, laid_out

from ddpm_fast import group_norm_silu, reference, use_backend
from ddpm_fast.backends import native

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(tensors, groups, silu, **options):
    others = dict(tensors)
    result = group_norm_silu(others.pop("x"), groups, silu=silu, **others, **options)
    return result if isinstance(result, tuple) else (result, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype, isa):
    shape, groups = case
    for layout in LAYOUTS:
        for given, silu in COMBINATIONS if dtype == torch.float32 else COMBINATIONS[3:5]:
            tensors = problem(shape, given, dtype, layout)
            x = tensors["x"]
            y, s = run(tensors, groups, silu)
            assert y.dtype == dtype
            if layout != "strided":
                assert y.stride() == x.stride()
            if s is not None:
                assert torch.equal(s, x + tensors["residual"])
            wanted = exact(tensors, groups, silu)
            assert_as_good_as_eager(y, eager(tensors, groups, silu), wanted)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES[1::4] + CASES[-1:], ids=str)
def test_a_mean_far_from_zero(case, layout, isa):
    """A thousand standard deviations, which E[x²] − E[x]² would lose."""
    shape, groups = case
    for given, silu in COMBINATIONS[:4]:
        tensors = problem(shape, given, torch.float32, layout, mean=1e3)
        y, _ = run(tensors, groups, silu)
        assert_as_good_as_eager(y, eager(tensors, groups, silu), exact(tensors, groups, silu))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 32, 16, 16), (2, 4, 32, 32)], ids=str)
def test_values_that_differ_in_space(shape, layout, isa):
    """The first rows, or the first of every eight pixels, thirty standard deviations off: what a
    few pixels of a chunk would say of its mean."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pixels = torch.arange(noise[0, 0].numel()).view(shape[2:])
    chunk = 4096 // shape[1]
    for off in (pixels < 2 * shape[3], pixels % chunk < chunk // 8, pixels % 8 == 0):
        tensors = {"x": laid_out(noise + 30 * off, layout)}
        y, _ = run(tensors, shape[1] // 4, False)
        wanted = exact(tensors, shape[1] // 4, False)
        assert_as_good_as_eager(y, eager(tensors, shape[1] // 4, False), wanted)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_squares_that_are_infinite(layout, isa):
    """Then rstd is 0, and the bias is what remains."""
    tensors = problem((2, 32, 16, 16), {"bias"}, torch.float32, layout)
    for scale in (1e20, 1e30):
        y, _ = run(tensors | {"x": tensors["x"] * scale}, 8, False)
        assert torch.equal(y, tensors["bias"].view(32, 1, 1).expand_as(y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_against_float64(case, dtype, isa):
    shape, groups = case
    layouts = ["contiguous", "channels_last"] if len(shape) > 3 else ["strided"]
    combinations = COMBINATIONS if dtype == torch.float32 else COMBINATIONS[3:5]
    for layout, (given, silu) in zip(3 * layouts, combinations, strict=False):
        tensors = problem(shape, given, dtype, layout)
        upstream = problem(shape, {"residual"}, dtype, layout)["residual"]

        def gradients(function, tensors=tensors, upstream=upstream, silu=silu):
            leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
            y = function(leaves, groups, silu)
            y.backward(upstream.to(y.dtype))
            return {name: leaf.grad for name, leaf in leaves.items()}

        found = gradients(lambda *args: run(*args)[0])
        low, wanted = gradients(eager), gradients(exact)
        for name, gradient in found.items():
            assert gradient.dtype == tensors[name].dtype
            wide = wanted[name].double()
            # scaled to about 1, so that the ulp allowed is one of the gradient's own, but for those
            # that are 0, as emb's in a group of one channel
            scale = 2.0 ** max(wide.abs().max().log2().ceil().item(), 0.0)
            assert_as_good_as_eager(gradient / scale, low[name] / scale, wide / scale)


def test_gradients_of_the_sum(isa):
    """What comes back to x + residual is added to what comes through the norm."""
    for given in ({"weight", "residual"}, {"residual", "emb"}):
        tensors = problem((2, 12, 5, 6), given, torch.float32, "channels_last")
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        y, s = run(leaves, 3, True)
        (3 * s).sum().backward()
        assert torch.equal(leaves["x"].grad, torch.full_like(s, 3.0))
        for t in leaves.values():
            t.grad = None
        y, s = run(leaves, 3, True)
        (y.square().sum() + s.pow(3).sum()).backward()
        wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
        others = dict(wide)
        y, s = reference.group_norm_silu(others.pop("x"), 3, **others)
        (y.square().sum() + s.pow(3).sum()).backward()
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad.double(), wide[name].grad, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_order_of_additions(layout):
    """The same bits for each instruction set, number of threads and split of the batch."""
    if native is None:
        pytest.skip("installed without compiled kernels")
    shape, groups = (5, 24, 31, 29), 3
    tensors = problem(shape, {"weight", "scale", "residual"}, torch.float32, layout)

    def results(part=slice(None)):
        shared = {"weight"}
        leaves = {
            name: (t if name in shared else t[part]).detach().requires_grad_()
            for name, t in tensors.items()
        }
        y, _ = run(leaves, groups, True)
        y.backward(torch.ones_like(y))
        return y.detach(), leaves["x"].grad, leaves["scale"].grad

    expected, threads, isa = results(), torch.get_num_threads(), native.isa()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, results(), expected))
        for name in native.supported_isas():
            native.set_isa(name)
            assert all(map(torch.equal, results(), expected))
    finally:
        torch.set_num_threads(threads)
        native.set_isa(isa)
    for size in (1, 3):
        parts = [results(slice(i, i + size)) for i in range(0, 5, size)]
        for i, whole in enumerate(expected):
            assert torch.equal(torch.cat([part[i] for part in parts]), whole)


def test_like_the_reference_backend(isa):
    for given, silu in COMBINATIONS:
        tensors = problem((2, 12, 9, 8), given, torch.float32, "channels_last")
        y, _ = run(tensors, 4, silu)
        with use_backend("reference"):
            expected, _ = run(tensors, 4, silu)
        assert expected.stride() == y.stride()
        torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-6)


def test_not_numbers_and_infinities_stay_in_their_group(isa):
    tensors = problem((2, 8, 5, 5), {"weight", "bias"}, torch.float32, "channels_last")
    expected, _ = run(tensors, 4, True)
    for value in (torch.nan, torch.inf):
        tensors["x"][1, 3, 2, 2] = value
        y, _ = run(tensors, 4, True)
        assert y[1, 2:4].isnan().all()
        y[1, 2:4] = expected[1, 2:4]
        assert torch.equal(y, expected)
    # a bias that is so is met by the SiLU alone
    tensors = problem((1, 4, 3, 3), {"bias"}, torch.float32)
    tensors["bias"] = torch.tensor([torch.inf, -torch.inf, torch.nan, 200.0])
    y, _ = run(tensors, 2, True)
    assert (y[0, 0] == torch.inf).all()
    assert (y[0, 1].abs() < 1e-30).all()
    assert y[0, 2].isnan().all()
    assert (y[0, 3] > 190).all()
