"""Nothing is read back from a device: steps of tensors that cannot be read at all."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

diffusers = pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DDPMScheduler  # noqa: E402
from fast_scheduler_cases import BOTH, SHAPE, generator, output_of_model, pair  # noqa: E402

from ddpm_fast import randn, use_backend  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

X, M = randn(SHAPE, seed=1), output_of_model(0)
READS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class OnDevice(torch.Tensor):
    """A tensor of the host that passes for one of a device, and forbids to read its values."""

    is_cpu = False

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in (*READS, "tolist", "numpy", "cpu", "__int__", "__bool__", "__index__")
        return super().__torch_function__(function, types, args, kwargs or {})


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in READS, function
        return function(*args, **(kwargs or {}))


def foreign(t):
    return torch.tensor(t).as_subclass(OnDevice)


def read(tensor):
    """The values, for the test itself."""
    return torch.Tensor.as_subclass(tensor, torch.Tensor)


def more_of(stock):
    return {"eta": 0.7} if stock is DDIMScheduler else {}


@pytest.mark.parametrize("stock", BOTH)
@pytest.mark.parametrize("limit", [{}, {"thresholding": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("t", [950, 500, 0, [950, 0]])
def test_timesteps_on_a_device(stock, limit, dtype, t):
    _, fast = pair(stock, 20, **limit)
    m, x, more = M.to(dtype), X.to(dtype), more_of(stock)
    on_host = torch.tensor(t) if isinstance(t, list) else t
    expected = fast.step(m, on_host, x, **more, generator=generator(3))
    with NoReads():
        out = fast.step(m, foreign(t), x, **more, generator=generator(3))
    for name in ("prev_sample", "pred_original_sample"):
        assert (read(getattr(out, name)) - getattr(expected, name)).abs().max() < 1e-6
    fast.set_noise(seed=4)
    expected = fast.step(m, on_host, x, **more).prev_sample
    out = read(fast.step(m, foreign(t), x, **more).prev_sample)
    assert (out - expected).abs().max() < 1e-6


def test_noise_is_drawn_where_the_timestep_cannot_tell():
    """And has no effect at t = 0."""
    _, fast = pair(DDPMScheduler)
    drawn = generator(0)
    without = fast.step(M, 0, X, drawn).prev_sample
    assert torch.equal(drawn.get_state(), generator(0).get_state())
    assert torch.equal(read(fast.step(M, foreign(0), X, drawn).prev_sample), without)
    assert not torch.equal(drawn.get_state(), generator(0).get_state())


@pytest.mark.parametrize("stock", BOTH)
def test_a_new_seed_for_every_step_that_cannot_be_told(stock):
    _, fast = pair(stock, 20)
    seeds = []
    for t in (950, 900, 850):
        fast.step(M, foreign(t), X, **more_of(stock))
        seeds.append(fast._seed)
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("stock", BOTH)
def test_elements_of_the_list_are_recognised(stock):
    _, fast = pair(stock, 20)
    fast.timesteps = listed = fast.timesteps.as_subclass(OnDevice)
    fast._host_timesteps = listed, listed._version, torch.arange(950, -1, -50)
    seeds = []
    for i, t in enumerate(range(950, 0, -50)):
        drawn = generator(i)
        with NoReads():
            out = fast.step(M, listed[i], X, **more_of(stock), generator=drawn).prev_sample
        expected = fast.step(M, t, X, **more_of(stock), generator=generator(i)).prev_sample
        assert torch.equal(read(out), expected)
    for i in range(20):
        fast.step(M, listed[i], X, **more_of(stock))
        seeds.append(fast._seed)
    assert len(set(seeds)) == 1
    untouched = generator(0)
    if stock is DDPMScheduler:  # its t = 0 is known
        fast.step(M, listed[-1], X, generator=untouched)
        assert torch.equal(untouched.get_state(), generator(0).get_state())


def test_a_timestep_that_the_list_does_not_hold_shows_by_nan():
    _, fast = pair(DDPMScheduler, 20)
    out = read(fast.step(M, foreign([500, 501]), X).prev_sample)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def everything_on_meta(stock, num_steps, how, **config):
    _, fast = pair(stock, **config)
    if how == "moved by set_timesteps":
        fast.set_timesteps(num_steps, device="meta")
    else:
        fast.set_timesteps(num_steps)
        if how == "put there by hand":
            fast.timesteps = fast.timesteps.to("meta")
            fast.alphas_cumprod = fast.alphas_cumprod.to("meta")
    return fast


@pytest.mark.parametrize(
    ("stock", "variance"),
    [
        (DDIMScheduler, None),
        (DDPMScheduler, "fixed_small"),
        (DDPMScheduler, "learned_range"),
        (DDPMScheduler, "learned"),
    ],
)
@pytest.mark.parametrize("how", ["moved by set_timesteps", "put there by hand", "on the host"])
@pytest.mark.parametrize("limit", [{}, {"thresholding": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_whose_tensors_hold_no_values(stock, how, variance, limit, dtype):
    """Tensors of device "meta" raise where they are read: no plan and no step does."""
    config = limit if variance is None else {**limit, "variance_type": variance}
    fast = everything_on_meta(stock, 2, how, **config)
    doubled = variance in ("learned", "learned_range")
    x = X.to("meta", dtype)
    m = output_of_model(0, doubled=doubled).to("meta", dtype)
    with use_backend("reference"):
        for t in (500, torch.tensor(500, device="meta"), torch.tensor([500, 0], device="meta")):
            for given in ({}, {"generator": generator()}):
                out = fast.step(m, t, x, **more_of(stock), **given)
                assert out.prev_sample.device.type == "meta"
                assert out.prev_sample.shape == out.pred_original_sample.shape == SHAPE
                assert out.prev_sample.dtype == out.pred_original_sample.dtype == dtype
        for t in fast.timesteps:
            fast.step(m, t, x, **more_of(stock))


def test_reading_a_meta_tensor_raises():
    """What the test above rests on."""
    with pytest.raises(RuntimeError):
        torch.tensor(900, device="meta").item()
    with pytest.raises(NotImplementedError):
        X.to("meta").cpu()


def test_training_leaves_the_tables_where_the_images_are_and_at_hand():
    """The stock add_noise moves ᾱ; steps after it do not read it back."""
    _, fast = pair(DDPMScheduler, 10)
    x = X.to("meta")
    values = fast.alphas_cumprod
    with use_backend("reference"):
        fast.add_noise(x, x, torch.tensor([900, 0], device="meta"))
        assert fast.alphas_cumprod.device.type == "meta"
        fast.step(x, 900, x)
    out = fast.step(M, 900, X, generator()).prev_sample
    assert out.isfinite().all()
    assert fast._alphas_on_host() is values


def test_a_device_without_kernels_takes_the_stock_step_with_one_warning():
    _, fast = pair(DDPMScheduler)
    x = X.to("meta")
    with pytest.warns(RuntimeWarning, match="no ddpm_fast kernels for meta"):
        assert fast.step(x, 999, x).prev_sample.shape == SHAPE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.step(x, 998, x)
        fast.add_noise(x, x, torch.tensor([1, 2], device="meta"))
