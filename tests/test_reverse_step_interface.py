"""reverse_step as torch sees it: gradients, registration, compilation; and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DTYPES
from reverse_step_cases import SEED, exactly, inputs, noise_for, table_of

from ddpm_fast import randn, reverse_step

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
    for upstream in (1.0, leaf):  # also where it is a constant, which torch itself lets pass
        step = (upstream * reverse_step(leaf, m, table, 4, seed=3)).sum()
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(step, leaf, create_graph=True)


def test_out_lowp_may_not_overlap_in_part():
    table = table_of(num_steps=50)
    x, memory = randn((1, 3, 4, 4), seed=1), torch.zeros(2 * 48, dtype=torch.bfloat16)
    m, low = memory[:48].view(x.shape), memory[8:56].view(x.shape)
    with pytest.raises(ValueError, match="out_lowp must not overlap model_output in part"):
        reverse_step(x, m, table, 7, seed=1, out=x, out_lowp=low)


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
