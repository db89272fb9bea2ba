"""group_norm_silu as a function: where results go, what is refused, torch.compile, derivatives of
derivatives."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import group_norm_silu, reference, use_backend

X = torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(0))
LAST = X.contiguous(memory_format=torch.channels_last)
WEIGHT, BIAS = torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8)


def padded(x: torch.Tensor, fill: float = 7.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A channels_last buffer with a border of a pixel and two more channels; x's place in it."""
    n, c, h, w = x.shape
    buffer = torch.full((n, h + 2, w + 2, c + 2), fill, dtype=x.dtype)
    return buffer, buffer[:, 1:-1, 1:-1, 2:].permute(0, 3, 1, 2)


def assert_same(found: torch.Tensor, expected: torch.Tensor, isa: str) -> None:
    """To the bit; CUDA's kernels add up in another order what no vector of theirs reaches."""
    if isa == "cuda-on-host":
        ulp = torch.finfo(found.dtype).eps
        torch.testing.assert_close(found, expected, rtol=32 * ulp, atol=32 * ulp)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gaps_between_pixels_and_rows(dtype, isa):
    """x, residual and out each in a larger tensor, which stays what it was around them."""
    x = LAST.to(dtype)
    _, x_view = padded(x)
    x_view.copy_(x)
    buffer, out = padded(x)
    expected = group_norm_silu(x, 2, WEIGHT, BIAS)
    assert group_norm_silu(x_view, 2, WEIGHT, BIAS, out=out) is out
    assert_same(out, expected, isa)
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside[:, 1:-1, 1:-1, 2:] = False
    assert (buffer[outside] == 7).all()
    assert torch.equal(x_view, x)
    fresh = group_norm_silu(x_view, 2, WEIGHT, BIAS)
    assert_same(fresh, expected, isa)
    assert fresh.is_contiguous(memory_format=torch.channels_last)
    y, s = group_norm_silu(x, 2, WEIGHT, BIAS, residual=x_view, out=out)
    assert torch.equal(s, x + x)
    assert_same(y, group_norm_silu(x + x, 2, WEIGHT, BIAS), isa)
    # and where it is differentiated
    leaf = x_view.detach().requires_grad_()
    plain = x.detach().requires_grad_()
    for t in (leaf, plain):
        group_norm_silu(t, 2, WEIGHT, BIAS).float().square().sum().backward()
    assert_same(leaf.grad, plain.grad, isa)


def test_out_in_place_and_beside(isa):
    expected = group_norm_silu(X, 4, WEIGHT, BIAS)
    x = X.clone()
    assert group_norm_silu(x, 4, WEIGHT, BIAS, out=x) is x
    assert torch.equal(x, expected)
    both = torch.zeros(2, 4, 6, 16)
    left, right = (both[..., part].permute(0, 3, 1, 2) for part in (slice(8), slice(8, 16)))
    left.copy_(X)
    group_norm_silu(left, 4, WEIGHT, BIAS, out=right)
    assert torch.equal(right, group_norm_silu(LAST, 4, WEIGHT, BIAS))
    pixel, one = X[:, :, :1, :1].contiguous(), torch.empty(2, 3, 8)[:, 1].reshape(2, 8, 1, 1)
    group_norm_silu(pixel, 4, WEIGHT, BIAS, out=one)
    torch.testing.assert_close(one, group_norm_silu(pixel, 4, WEIGHT, BIAS))


def test_out_where_an_input_lies():
    """Over x itself and between its pixels, however sides of one element say they lie; over
    nothing else."""
    one = X[:1, :, :, :1].contiguous(memory_format=torch.channels_last)
    expected = group_norm_silu(one, 2)
    x = one.clone().as_strided(one.shape, (1 << 20, 1, 8, 0))
    out = x.as_strided(one.shape, (1, 1, 8, 3))
    assert torch.equal(group_norm_silu(x, 2, out=out), expected)
    wide = torch.zeros(4, 16)  # rows of one pixel
    left, right = (wide[:, i:].as_strided(one.shape, (0, 1, 16, 0), i) for i in (0, 8))
    left.copy_(one)
    assert torch.equal(group_norm_silu(left, 2, out=right), expected)
    with pytest.raises(ValueError, match="out must not overlap x in part"):
        group_norm_silu(left, 2, out=wide.as_strided(one.shape, (0, 1, 16, 0), 4))

    row, rows = torch.zeros(384)[8:16], torch.zeros(2, 192)
    for name in ("weight", "bias", "emb", "scale", "shift"):
        memory = row if name in ("weight", "bias") else rows
        x = memory.as_strided((2, 8, 4, 6), (192, 24, 6, 1), 0)
        given = memory if memory is row else rows[:, 100:108]
        with pytest.raises(ValueError, match=f"out must not overlap {name}$"):
            group_norm_silu(x, 2, out=x, **{name: given})
        assert x.count_nonzero() == 0
        group_norm_silu(x, 2, out=x, **{name: given.clone() + 1})
        memory.as_strided((384,), (1,), 0).zero_()


def test_refused():
    x, halves = torch.zeros(2, 8, 4, 6), torch.zeros(2, 8, 8, 6)
    cases = [
        (TypeError, "x must be a tensor; got list", [[1]], {}),
        (TypeError, "x must be float32, bfloat16, float16; got torch.float64", [x.double()], {}),
        (ValueError, r"x must be \[N, C, …\]; got \[8\]", [x[0, :, 0, 0]], {}),
        (TypeError, "num_groups must be an integer", [x], {"num_groups": 2.0}),
        (ValueError, "num_groups must divide x's 8 channels; got 3", [x], {"num_groups": 3}),
        (ValueError, "num_groups must divide x's 8 channels; got 0", [x], {"num_groups": 0}),
        (TypeError, "eps must be a number; got str", [x], {"eps": "1e-5"}),
        (ValueError, "eps must be a number from 0 on; got -1", [x], {"eps": -1.0}),
        (ValueError, r"weight must have shape \[8\]; got \[4\]", [x], {"weight": torch.ones(4)}),
        (TypeError, "bias must be float32; got torch.float16", [x], {"bias": BIAS.half()}),
        (TypeError, "bias must be float32, float16; got", [x.half()], {"bias": BIAS.bfloat16()}),
        (ValueError, r"emb must have shape \[2, 8\] or \[1, 8\]; got \[8\]", [x], {"emb": BIAS}),
        (ValueError, r"scale must have shape .* got \[3, 8\]", [x], {"scale": torch.ones(3, 8)}),
        (ValueError, "shift must be on cpu, as the others are", [x],
         {"shift": torch.ones(2, 8, device="meta")}),
        (TypeError, "residual must be float32; got torch.float16", [x], {"residual": x.half()}),
        (ValueError, r"residual must have shape \[2, 8, 4, 6\]", [x], {"residual": x[:, :, 1:]}),
        (TypeError, "out must be float32; got torch.float16", [x], {"out": x.half()}),
        (ValueError, r"out must have shape \[2, 8, 4, 6\]", [x], {"out": x[:, :, 1:].clone()}),
        (ValueError, "out must be contiguous, as x is or is made", [x],
         {"out": torch.empty_like(LAST)}),
        (ValueError, "out must be contiguous, as x is or is made", [x], {"out": halves[:, :, ::2]}),
        (ValueError, "out must be channels_last, as x is or is made", [LAST],
         {"out": torch.empty_like(x)}),
        (ValueError, "no element of it in another's place", [LAST],
         {"out": torch.empty(2, 1, 6, 8).expand(2, 4, 6, 8).permute(0, 3, 1, 2)}),
        (ValueError, "out must not overlap x in part", [halves[:, :, :4].permute(0, 3, 2, 1)],
         {"num_groups": 1, "out": halves[:, :, 1:5].permute(0, 3, 2, 1)}),
        (ValueError, "out cannot be differentiated through", [x.clone().requires_grad_()],
         {"out": x}),
    ]  # fmt: skip
    for error, message, arguments, options in cases:
        with pytest.raises(error, match=message):
            group_norm_silu(*arguments, **{"num_groups": 4, **options})
    assert x.count_nonzero() == 0, "refused before anything is written"


def test_empty():
    for shape in ((0, 8, 4, 4), (2, 8, 0, 4), (2, 0, 3, 3)):
        x = torch.zeros(shape, requires_grad=True)
        weight = torch.ones(shape[1], requires_grad=True)
        y = group_norm_silu(x, 1 if shape[1] == 0 else 4, weight)
        y.sum().backward()
        assert y.shape == shape
        assert x.grad.shape == shape
        assert torch.equal(weight.grad, torch.zeros(shape[1]))


@pytest.mark.parametrize("seen", [False, True], ids=["", "dispatched"])
def test_derivatives_of_derivatives(seen, isa):
    """A gradient penalty: by PyTorch's graph of the formula; also where a mode sees each call."""
    generator = torch.Generator().manual_seed(1)
    names = ("x", "weight", "emb", "scale", "residual")
    values = [X, WEIGHT, *(torch.randn(2, 8, generator=generator) for _ in range(2)), X.flip(0)]

    def penalty(function, dtype):
        leaves = {
            k: v.detach().to(dtype, copy=True).requires_grad_()
            for k, v in zip(names, values, strict=True)
        }
        others = dict(leaves)
        y, s = function(others.pop("x"), 4, **others)
        outputs = y.square().sum() + s.pow(3).sum()
        gradients = torch.autograd.grad(outputs, list(leaves.values()), create_graph=True)
        total = sum(g.square().sum() for g in gradients)
        return torch.autograd.grad(total, list(leaves.values()))

    with Seen() if seen else contextlib.nullcontext():
        found = penalty(group_norm_silu, torch.float32)
    expected = penalty(reference.group_norm_silu, torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_batch_of_gradients(create_graph, isa):
    """Of autograd's own transform, older than torch.func's."""
    x, emb = LAST.clone().requires_grad_(), X[:, :, 0, 0].clone().requires_grad_()
    y, s = group_norm_silu(x, 4, WEIGHT, emb=emb, residual=X)
    upstream = torch.stack([X, X.square(), X.flip(0)])

    def gradients(upstream, batched):
        return torch.autograd.grad(
            (y, s), (x, emb), (upstream, 2 * upstream), retain_graph=True,
            is_grads_batched=batched, create_graph=create_graph,
        )  # fmt: skip

    one_by_one = zip(*(gradients(u, False) for u in upstream), strict=True)
    for a, b in zip(gradients(upstream, True), one_by_one, strict=True):
        torch.testing.assert_close(a, torch.stack(b), rtol=1e-5, atol=1e-5)


def test_registered_with_torch():
    x = LAST.clone().requires_grad_()
    emb = torch.randn(2, 8, requires_grad=True)
    arguments = (x, 4, WEIGHT.clone().requires_grad_(), None, 1e-5, emb, None, None, LAST, True)
    op = torch.ops.ddpm_fast
    torch.library.opcheck(op.group_norm_silu.default, (*arguments, True))
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    outputs = {"out": torch.empty_like(LAST), "sum_out": torch.empty_like(LAST)}
    torch.library.opcheck(op.group_norm_silu_out.default, tuple(detached), outputs)


def test_compiled():
    """One graph, forward and backward, with the results of the op as it is."""

    def step(x, weight, emb):
        y, s = group_norm_silu(x, 4, weight, emb=emb, residual=x)
        return (y.float() * s).sum() + group_norm_silu(y, 2, silu=False).square().sum()

    def run(function):
        leaves = [t.detach().clone().requires_grad_() for t in (LAST, WEIGHT, X[:, :, 0, 0])]
        result = function(*leaves)
        result.backward()
        return result.detach(), *(leaf.grad for leaf in leaves)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled), run(step), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_transforms_of_torch_func():
    def loss(x):
        return group_norm_silu(x, 4, WEIGHT).square().sum()

    expected = torch.autograd.functional.jacobian(
        lambda x: F.silu(F.group_norm(x, 4, WEIGHT)).square().sum(), X
    )
    torch.testing.assert_close(torch.func.grad(loss)(X), expected, rtol=1e-4, atol=1e-4)


def test_under_inference_mode_and_each_backend():
    with torch.inference_mode():
        y = group_norm_silu(LAST, 4, WEIGHT, BIAS)
        with use_backend("reference"):
            buffer, out = padded(LAST)
            torch.testing.assert_close(group_norm_silu(LAST, 4, WEIGHT, BIAS, out=out), y)
            assert (buffer[:, 0] == 7).all()


@pytest.mark.parametrize("shape", [(3, 8), (2, 8, 5), (2, 8, 3, 4)], ids=str)
def test_gradients_of_the_reference_backend(shape):
    found = []
    for backend in ("reference", "auto"):
        x = torch.linspace(-2, 3, math.prod(shape)).reshape(shape).requires_grad_()
        with use_backend(backend):
            group_norm_silu(x, 2, torch.linspace(-1, 1, 8), torch.ones(8)).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)
