"""add_noise, get_velocity and derivatives, beside the stock schedulers."""

from __future__ import annotations

from importlib import import_module
from unittest import mock

import pytest
import torch
from helpers import laid_out, ulp

diffusers = pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DDPMScheduler  # noqa: E402
from fast_scheduler_cases import BOTH, FAST, SHAPE, generator, output_of_model, pair  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from ddpm_fast import randn  # noqa: E402
from ddpm_fast.integrations.diffusers import forward as forward_process  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

arguments_module = import_module("ddpm_fast.integrations.diffusers.arguments")
METHODS = ["add_noise", "get_velocity"]
X0, EPS = randn(SHAPE, seed=1).tanh(), randn(SHAPE, seed=2)
T = torch.tensor([999, 3])


@pytest.fixture
def fused(monkeypatch):
    """How often the kernel has been called."""
    calls = []
    real = forward_process.add_noise_now

    def counted(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(forward_process, "add_noise_now", counted)
    return calls


def both(stock, method, *arguments, **config):
    """ours, theirs"""
    one, two = pair(stock, **config)
    return getattr(two, method)(*arguments), getattr(one, method)(*arguments)


@pytest.mark.parametrize("stock", BOTH)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("noise_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_forward_process(stock, method, dtype, noise_dtype, layout, fused):
    x0, eps = laid_out(X0.to(dtype), layout), EPS.to(noise_dtype)
    ours, theirs = both(stock, method, x0, eps, T)
    assert len(fused) == 1
    assert ours.dtype == theirs.dtype
    # Weights rounded as theirs are; they round each product as well.
    assert (ours - theirs).abs().max() <= 3 * ulp(dtype) * max(1, theirs.abs().max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t", range(0, 1000, 111))
def test_weights_of_low_precision_are_rounded_as_theirs(method, t, fused):
    """1 − ᾱ in bfloat16 has its error; with it the model was trained."""
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for x0, eps in ((one, zero), (zero, one)):
            arguments = x0.to(dtype), eps.to(dtype), torch.tensor([t])
            ours, theirs = both(DDPMScheduler, method, *arguments)
            assert torch.equal(ours, theirs)
    assert len(fused) == 6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "t",
    [torch.tensor([7]), torch.tensor(7), torch.tensor([7, 7], dtype=torch.int32)],
    ids=["[1]", "0-d", "32 bits"],
)
def test_timesteps_that_broadcast_are_fused(method, t, fused):
    ours, theirs = both(DDPMScheduler, method, X0, EPS, t)
    assert len(fused) == 1
    assert (ours - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("x0", "eps", "t"),
    [
        (X0.double(), EPS.double(), T),
        (X0, EPS.double(), T),
        (X0, EPS[:, :1], T),
        (X0[:1], EPS, T),
        (X0[0], EPS, T[:1]),
        (X0[:, 0], EPS[:, 0], T.reshape(2, 1)),
    ],
    ids=["float64", "float64 noise", "one channel", "one sample", "no samples", "t [N, 1]"],
)
def test_what_the_kernel_does_not_take_is_the_stock_formulas(method, x0, eps, t, fused):
    ours, theirs = both(DDPMScheduler, method, x0, eps, t)
    assert torch.equal(ours, theirs)
    assert ours.dtype == theirs.dtype
    assert not fused


@pytest.mark.parametrize("method", METHODS)
def test_a_timestep_out_of_range(method):
    _, fast = pair(DDPMScheduler)
    with pytest.raises(ValueError, match="t must lie in 0 … 999; got 3 … 1000"):
        getattr(fast, method)(X0, EPS, torch.tensor([3, 1000]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", ["x0", "noise", "both"])
def test_derivatives_of_the_forward_process(method, wanted):
    found = []
    for scheduler in pair(DDPMScheduler):
        x0 = X0.clone().requires_grad_(wanted != "noise")
        eps = EPS.clone().requires_grad_(wanted != "x0")
        (getattr(scheduler, method)(x0, eps, T) ** 2).sum().backward()
        found.append([t.grad for t in (x0, eps) if t.requires_grad])
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize("method", METHODS)
def test_changed_tables_are_noticed(method):
    one, two = pair(DDPMScheduler)
    new = torch.linspace(0.9, 0.1, 1000)
    for change in (
        lambda s: s.alphas_cumprod.mul_(0.5),
        lambda s: setattr(s, "alphas_cumprod", new),
    ):
        results = []
        for scheduler in (one, two):
            getattr(scheduler, method)(X0, EPS, T)
            change(scheduler)
            results.append(getattr(scheduler, method)(X0, EPS, T))
        assert (results[0] - results[1]).abs().max() < 1e-6


def test_in_inference_mode(fused):
    with torch.inference_mode():
        ours, theirs = both(DDPMScheduler, "add_noise", X0, EPS, T)
        assert (ours - theirs).abs().max() < 1e-6
    assert len(fused) == 1


@pytest.mark.parametrize("method", METHODS)
def test_compiled(method):
    """As the stock method is: traced, in one graph."""
    torch.compiler.reset()
    one, two = pair(DDPMScheduler)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x0, eps, t):
        return getattr(two, method)(2 * x0, eps, t)

    expected = getattr(one, method)(2 * X0, EPS, T)
    assert (compiled(X0, EPS, T) - expected).abs().max() < 1e-6
    assert (getattr(two, method)(2 * X0, EPS, T) - expected).abs().max() < 1e-6


def test_a_step_under_compile():
    """It breaks the graph, as the stock step does, and takes the same step."""
    torch.compiler.reset()
    _, fast = pair(DDPMScheduler)

    @torch.compile(backend="eager")
    def compiled(m, x):
        return fast.step(2 * m, 500, x, generator=generator()).prev_sample + 1

    m, x = output_of_model(0), randn(SHAPE, seed=1)
    expected = fast.step(2 * m, 500, x, generator=generator()).prev_sample + 1
    assert (compiled(m, x) - expected).abs().max() < 1e-6


STEPS = {
    "ddpm": (DDPMScheduler, {}, {}),
    "v": (DDPMScheduler, {"prediction_type": "v_prediction"}, {}),
    "learned_range": (DDPMScheduler, {"variance_type": "learned_range"}, {}),
    "learned": (DDPMScheduler, {"variance_type": "learned"}, {}),
    "threshold": (DDPMScheduler, {"thresholding": True, "sample_max_value": 2.0}, {}),
    "ddim": (DDIMScheduler, {}, {"eta": 0.7}),
    "ddim, clipped": (DDIMScheduler, {}, {"eta": 0.7, "use_clipped_model_output": True}),
}


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("t", [950, 500, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_of_a_step(case, t, dtype):
    """Guidance by gradients goes through it."""
    stock, config, more = STEPS[case]
    doubled = case.startswith("learned")
    found = []
    for scheduler in pair(stock, 20, **config):
        x = randn(SHAPE, seed=1).to(dtype).requires_grad_()
        m = output_of_model(3, doubled=doubled)
        m = (m.abs() + 0.1 if case == "learned" else m).to(dtype).requires_grad_()
        out = scheduler.step(m, t, x, generator=generator(), **more)
        (out.prev_sample**2 + 3 * out.pred_original_sample).sum().backward()
        found.append((out.prev_sample.detach(), x.grad, m.grad))
    for theirs, ours in zip(*found, strict=True):
        scale = theirs.abs().max().clamp(min=1)
        assert (theirs - ours).abs().max() < 2e-6 * scale


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_derivatives_in_low_precision(case, dtype):
    """As near to those in float64 as the stock step's."""
    stock, config, more = STEPS[case]
    config = {**config, "clip_sample_range": 50.0}  # at a bound a rounding makes all the difference
    doubled = case.startswith("learned")
    start, output = randn(SHAPE, seed=1).to(dtype), output_of_model(3, doubled=doubled)
    output = (output.abs() + 0.1 if case == "learned" else output).to(dtype)

    def found(scheduler, dtype, **drawn):
        x, m = (kept.to(dtype, copy=True).requires_grad_() for kept in (start, output))
        out = scheduler.step(m, 500, x, **more, **drawn)
        (out.prev_sample**2 + 3 * out.pred_original_sample).double().sum().backward()
        return out.prev_sample.detach(), x.grad, m.grad

    one, two = pair(stock, 20, **config)
    wide = FAST[stock](**config)
    wide.set_timesteps(20)
    theirs = found(one, dtype, generator=generator())
    ours = found(two, dtype, generator=generator())
    with same_noise(dtype):
        exact = found(wide, torch.float64, generator=generator())
    for a, b, wanted in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype == dtype
        error, allowed = ((t.double() - wanted).abs().max() for t in (a, b))
        assert error <= 2 * allowed + 2 * ulp(dtype) * wanted.abs().max()


def same_noise(dtype):
    """In place of what is drawn in float64: the numbers that are drawn in ``dtype``."""

    def drawn(shape, generator, device, dtype_=dtype, dtype=None):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype_).double()

    return mock.patch.object(arguments_module, "randn_tensor", drawn)


class Counted(TorchDispatchMode):
    """The operations that run, views and allocations left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if isinstance(result, torch.Tensor) and result.numel() > 1 and not function.is_view:
            self.names.append(name)
        return result


@pytest.mark.parametrize("case", ["ddpm", "v", "learned_range", "learned", "ddim"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_step_with_derivatives_makes_fewer_passes_than_the_stock_one(case, dtype):
    stock, config, _ = STEPS[case]
    counts = []
    for scheduler in pair(stock, 20, **config):
        x = randn(SHAPE, seed=1).to(dtype).requires_grad_()
        m = output_of_model(3, doubled=case.startswith("learned")).abs().to(dtype)
        for _ in range(3):  # the first ones make rows
            with Counted() as counted:
                scheduler.step(m, 500, x, generator=generator())
        counts.append(counted.names)
    theirs, ours = counts
    assert "_to_copy" not in ours
    assert len(ours) < len(theirs)


def test_derivatives_with_addressed_noise_and_several_timesteps():
    _, fast = pair(DDPMScheduler, 20)
    fast.set_noise(seed=5)
    x, m = randn(SHAPE, seed=1), output_of_model(0)
    for t in (500, torch.tensor([500, 0])):
        plain = fast.step(m, t, x).prev_sample
        followed = fast.step(m, t, x.clone().requires_grad_()).prev_sample
        assert followed.requires_grad
        assert (followed.detach() - plain).abs().max() < 1e-6


def test_forward_mode_and_transforms():
    one, two = pair(DDPMScheduler)
    m, x = output_of_model(0), randn(SHAPE, seed=1)
    results = []
    for scheduler in (one, two):

        def mean(x, scheduler=scheduler):
            return scheduler.step(m, 0, x).prev_sample

        results.append(torch.func.jvp(mean, (x,), (x,))[1])
    assert (results[0] - results[1]).abs().max() < 1e-5
