"""Where a UNet's norms run as one op with what stands around them, and where as modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpm_fast import UNet, UNetConfig, use_backend
from ddpm_fast.nn import norms

pytestmark = pytest.mark.usefixtures("one_thread")
T = torch.tensor([3, 700])


def unet(**options) -> UNet:
    torch.manual_seed(0)
    config = {"image_size": 8, "in_channels": 2, "channels": (32,), "attention_resolutions": (8,)}
    model = UNet(UNetConfig(**config | {"dropout": 0.0} | options))
    for parameter in model.parameters():  # no norm is the identity, no convolution zero
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def calls(monkeypatch):
    """How often the op is taken."""
    found = []
    op = norms.unchecked
    monkeypatch.setattr(norms, "unchecked", lambda *args: found.append(1) or op(*args))
    return found


def gradients(model, x, call=None):
    model.zero_grad()
    y = model(x, T) if call is None else call(model, x, T)
    y.float().square().mean().backward()
    return y.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_same_function_as_the_modules(scale_shift, layout, calls):
    model = unet(scale_shift=scale_shift)
    x = torch.randn(2, 2, 8, 8).contiguous(memory_format=layout)
    y, found = gradients(model.to(memory_format=layout), x)
    assert len(calls) == sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    with use_backend("reference"):
        expected, wanted = gradients(model, x)
    assert len(calls) == sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * max(b.abs().max().item(), 1e-2))


def test_training_under_autocast(calls):
    """As good as what the modules' own float32 norms make of it."""
    model, x = unet(scale_shift=True), torch.randn(2, 2, 8, 8)
    exact = torch.cat([g.flatten() for g in gradients(model, x)[1]])
    calls.clear()

    def error():
        with torch.autocast("cpu", torch.bfloat16):
            y, found = gradients(model, x)
        assert y.dtype == torch.bfloat16
        return (torch.cat([g.flatten() for g in found]) - exact).norm() / exact.norm()

    by_op, usual = error(), len(calls)
    with use_backend("reference"):
        by_modules = error()
    assert len(calls) == usual > 0
    assert by_op <= 2 * by_modules < 0.1


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_a_checkpoint(reentrant, calls):
    """Run again in the backward pass, the op gives the same bits."""
    model, x = unet(), torch.randn(2, 2, 8, 8, requires_grad=True)
    y, expected = gradients(model, x)
    usual = len(calls)
    again, found = gradients(model, x, lambda *inputs: checkpoint(*inputs, use_reentrant=reentrant))
    assert len(calls) == 3 * usual
    assert torch.equal(again, y)
    assert all(map(torch.equal, found, expected))


def test_a_batch_of_gradients():
    """As autograd.functional.jacobian(vectorize=True) asks for them."""
    model, x = unet(), torch.randn(1, 2, 8, 8, requires_grad=True)
    y = model(x, T[:1])
    upstream = torch.randn(2, *y.shape)
    (found,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
    for gradient, of_y in zip(found, upstream, strict=True):
        (expected,) = torch.autograd.grad(y, x, of_y, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_norms_that_are_more_than_norms(calls):
    """Hooks fire, other classes and overrides are called, each leaving the other norms as they are;
    a hook for all modules is seen by all."""
    model, x = unet(), torch.randn(2, 2, 8, 8)
    expected = model(x, T)
    usual = len(calls)
    seen = []
    first = model.down[0].res[0]
    handles = [
        first.norm1.register_forward_hook(lambda *_: seen.append("forward")),
        first.norm2.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    model(x, T).sum().backward()
    assert seen == ["forward", "backward"]
    assert len(calls) == 2 * usual - 2
    for handle in handles:
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    model(x, T)
    handle.remove()
    assert len(calls) == 2 * usual - 2

    class Norm(nn.GroupNorm):
        def forward(self, x):
            return super().forward(x) + 1

    norm = Norm(32, 32)
    norm.load_state_dict(model.norm_out.state_dict())
    plain, model.norm_out = model.norm_out, norm
    assert not torch.allclose(model(x, T), expected)
    model.norm_out = plain
    plain.forward = lambda x: x
    assert not torch.allclose(model(x, T), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_everything_else_is_left_to_pytorch(calls):
    """float64, torch.func, forward mode, tracing; and a second derivative of what the op gave."""
    # without attention, whose second derivative PyTorch lacks
    model, x = unet(attention_resolutions=(), middle="none"), torch.randn(2, 2, 8, 8)
    y = model(x, T)
    usual = len(calls)

    def loss(x):
        return model(x, T).square().sum()

    expected = torch.autograd.functional.jvp(loss, x, x)[1]  # twice backward, by the op's formula
    assert len(calls) == 2 * usual
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (x,))[1], expected, rtol=1e-3, atol=1e-3)
    traced = torch.jit.trace(model, (x, T), check_trace=False)
    torch.testing.assert_close(traced(x, T), y)
    torch.testing.assert_close(torch.func.vmap(lambda x: model(x[None], T[:1]))(x)[0, 0], y[0],
                               rtol=1e-3, atol=1e-4)  # fmt: skip
    wide = model.double()(x.double(), T)
    torch.testing.assert_close(wide.float(), y, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2 * usual
