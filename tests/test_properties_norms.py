"""group_norm_silu at any shape, strides, dtype, groups and operands, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from property_cases import FLOATS, cut, examples, part_of, plain, shapes, tensors, values

from ddpm_fast import group_norm_silu, use_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


@st.composite
def calls(draw):
    """x, groups, and the rest by name."""
    shape = draw(shapes(least_ndim=2))
    assume(shape[1] > 0)
    groups = draw(st.sampled_from([g for g in range(1, shape[1] + 1) if shape[1] % g == 0]))
    dtype = draw(st.sampled_from(FLOATS))
    x = draw(tensors(shape, dtype))
    if draw(st.booleans()):
        x = x + draw(st.sampled_from([-30, 0.5, 3]))
    options = {"silu": draw(st.booleans()), "eps": draw(st.sampled_from([0.0, 1e-6, 1e-5, 1.0]))}
    assume(options["eps"] or x.numel() == 0 or _varies(x, groups))
    small = st.sampled_from([torch.float32, dtype])
    for name in ("weight", "bias"):
        if draw(st.booleans()):
            options[name] = draw(tensors((shape[1],), draw(small)))
    for name in ("emb", "scale", "shift"):
        if draw(st.integers(0, 2)) == 0:
            rows = draw(st.sampled_from([1, shape[0]]))
            halves = values((rows, 2 * shape[1]), draw(small), draw(st.integers(0, 9)))
            options[name] = halves[:, draw(st.sampled_from([0, shape[1]])) :][:, : shape[1]]
    if draw(st.integers(0, 2)) == 0:
        options["residual"] = draw(tensors(shape, dtype))
    return x, groups, options


def _varies(x, groups):
    """No variance is near 0, where everything is rounding."""
    variance = x.double().reshape(len(x), groups, -1).var(2, correction=0)
    return bool((variance > 1e-2).all())


def evaluate(x, groups, options):
    """y, the sum, and the gradients of both together."""
    x = x.detach().requires_grad_()
    names = [name for name, value in options.items() if isinstance(value, torch.Tensor)]
    leaves = {name: options[name].detach().requires_grad_() for name in names}
    found = group_norm_silu(x, groups, **{**options, **leaves})
    found = found if isinstance(found, tuple) else (found,)
    upstream = [values(tuple(t.shape), torch.float32, i).to(t.dtype) for i, t in enumerate(found)]
    gradients = torch.autograd.grad(found, [x, *leaves.values()], upstream)
    return [t.detach() for t in found], list(gradients)


def as_contiguous(x, groups, options):
    return evaluate(plain(x), groups, {name: plain(value) for name, value in options.items()})


def assert_near(found, expected, factor):
    """By the largest of them: a sum's terms cancel."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if found.numel() == 0:
        return
    assert found.isfinite().all()
    eps = max(2e-5, 2 * torch.finfo(found.dtype).eps)
    allowed = factor * eps * max(1.0, expected.abs().max().item())
    assert (found.double() - expected.double()).abs().max().item() <= allowed


@examples(110)
@given(calls())
def test_any_call(call):
    x, groups, options = call
    results, gradients = evaluate(*call)
    contiguous = as_contiguous(*call)
    with use_backend("reference"):
        expected = as_contiguous(*call)
    varied = x if "residual" not in options else x + options["residual"]
    if "emb" in options:
        varied = varied + options["emb"].reshape(-1, x.shape[1], *[1] * (x.ndim - 2))
    steep = x.numel() == 0 or not _varies(varied, groups)
    for ours in ((results, gradients), contiguous):
        for found, wanted in zip(ours[0], expected[0], strict=True):
            assert_near(found, wanted, 200 if steep else 4)
        if not steep:  # else a gradient is a difference of large numbers
            for found, wanted in zip(ours[1], expected[1], strict=True):
                assert_near(found, wanted, 30)


@examples(50)
@given(calls(), st.data())
def test_a_batch_is_its_parts(call, data):
    """The same bits for any split, in the same layout."""
    x, groups, options = call
    x, options = plain(x), {name: plain(value) for name, value in options.items()}
    whole = group_norm_silu(x, groups, **options)
    whole = whole if isinstance(whole, tuple) else (whole,)
    samples = len(x)
    for part in data.draw(cut(samples)):
        some = dict(options)
        for name in ("emb", "scale", "shift", "residual"):
            if name in some and len(some[name]) == samples:
                some[name] = part_of(some[name], part, samples)
        found = group_norm_silu(x[part], groups, **some)
        found = found if isinstance(found, tuple) else (found,)
        for ours, theirs in zip(found, whole, strict=True):
            assert torch.equal(ours, theirs[part])


@examples(60)
@given(calls(), st.data())
def test_into_memory_with_gaps(call, data):
    """The interior of a larger tensor takes the same result, and nothing around it is touched."""
    x, groups, options = call
    assume(x.ndim == 4 and x.numel() > 0)
    x = x.contiguous(memory_format=torch.channels_last)
    assume(not x.is_contiguous())
    expected = group_norm_silu(x, groups, **options)
    n, c, h, w = x.shape
    around = [data.draw(st.integers(0, 2)) for _ in range(4)]
    memory = torch.full((n, h + sum(around[:2]), w + sum(around[2:]), c), torch.nan, dtype=x.dtype)
    inside = memory[:, around[0] : around[0] + h, around[2] : around[2] + w]
    found = group_norm_silu(x, groups, out=inside.movedim(3, 1), **options)
    if isinstance(expected, tuple):
        found, expected = found[0], expected[0]
    assert torch.equal(found, expected)
    inside.fill_(torch.nan)
    assert memory.isnan().all()
