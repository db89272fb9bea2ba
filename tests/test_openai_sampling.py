"""Sampling by accelerated OpenAI objects against the stock code, from the same torch generator."""

from __future__ import annotations

import itertools

import pytest
import torch
from openai_cases import (
    MEANS,
    PEERS,
    SHAPE,
    VARIANCES,
    assert_close_in_units,
    diffusion_of,
    model_of,
    same_noise,  # noqa: F401
    start,
)

from ddpm_fast import accelerate

pytestmark = pytest.mark.usefixtures("one_thread")


def shrink(x0):
    return 0.9 * x0


def slope(x, t, shift=0.0):
    return torch.cos(x) + 0.001 * t.to(x.dtype).reshape(-1, 1, 1, 1) + shift


def both(name, *choices, **more):
    return diffusion_of(name, *choices, **more), accelerate(
        diffusion_of(name, *choices, **more), noise="torch"
    )


def options_of(name):
    """Every choice of arguments that such an object takes."""
    cond_fns = [None] if name.startswith("improved") else [None, slope]
    for clip, denoised_fn, cond_fn in itertools.product([True, False], [None, shrink], cond_fns):
        options = {
            "clip_denoised": clip,
            "denoised_fn": denoised_fn,
            "model_kwargs": {"shift": 0.1},
        }
        yield options if cond_fn is None else {**options, "cond_fn": cond_fn}


def run(diffusion, method, model, *args, **options):
    """All that a method gives, and the generator's next number."""
    torch.manual_seed(3)
    found = getattr(diffusion, method)(model, *args, **options)
    if isinstance(found, torch.Tensor):
        found = [{"sample": found}]
    found = [found] if isinstance(found, dict) else list(found)
    return [part[key] for part in found for key in ("sample", "pred_xstart") if key in part], (
        torch.rand(1).item()
    )


def assert_same_run(stock, fast, method, model, *args, **options):
    expected, after = run(stock, method, model, *args, **options)
    found, ours_after = run(fast, method, model, *args, **options)
    assert ours_after == after
    assert len(found) == len(expected)
    close = {"rtol": 1e-9, "atol": 1e-11}
    for ours, theirs in zip(found, expected, strict=True):
        if ours.dtype == torch.float32:
            close = {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(ours, theirs, **close)


def assert_as_good(exact, stock, fast, method, model, *args, **options):
    """Along a whole trajectory in float32, against the same one in float64."""

    def widened(value):
        return (
            value.double()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
        )

    wide = {k: widened(v) for k, v in options.items()}
    truth, _ = run(exact, method, model, *map(widened, args), **wide)
    expected, after = run(stock, method, model, *args, **options)
    found, ours_after = run(fast, method, model, *args, **options)
    assert ours_after == after
    assert_close_in_units(torch.stack(found), torch.stack(expected), torch.stack(truth))


LOOPS = {
    "p_sample_loop_progressive": [{}],
    "ddim_sample_loop_progressive": [{"eta": 0.0}, {"eta": 0.5}, {"eta": 1.0}],
}


@pytest.mark.parametrize("spacing", [None, "10"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", PEERS)
def test_whole_loops_in_float64(name, mean, variance, spacing):
    """Every step of every choice, to what rounding in float64 leaves."""
    rescale = variance in ("FIXED_LARGE", "LEARNED")
    stock, fast = both(name, mean, variance, spacing=spacing, rescale=rescale, steps=12)
    told = [], []
    models = [model_of(mean, variance, seen) for seen in told]
    for (method, etas), options in itertools.product(LOOPS.items(), options_of(name)):
        for eta in etas:
            arguments = {**options, **eta, "noise": start(torch.float64), "device": "cpu"}
            expected, after = run(stock, method, models[0], SHAPE, **arguments)
            found, ours_after = run(fast, method, models[1], SHAPE, **arguments)
            assert ours_after == after
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
            assert told[0] == told[1]


@pytest.mark.parametrize("spacing", [None, "10"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", ["guided", "guided_diffusion"])
def test_whole_loops_in_float32(name, mean, variance, spacing, same_noise):  # noqa: F811
    choices = (name, mean, variance)
    stock, fast = both(*choices, spacing=spacing, steps=12)
    exact = diffusion_of(*choices, spacing=spacing, steps=12)
    model = model_of(mean, variance)
    for (method, etas), options in itertools.product(LOOPS.items(), options_of(name)):
        for eta in etas:
            arguments = {**options, **eta, "noise": start(), "device": "cpu"}
            assert_as_good(exact, stock, fast, method, model, SHAPE, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", PEERS)
def test_single_steps(name, mean, variance, dtype, same_noise):  # noqa: F811
    """A timestep for each sample, in whichever direction."""
    choices, more = (name, mean, variance), {"spacing": "15", "rescale": True}
    stock, fast = both(*choices, **more)
    exact = diffusion_of(*choices, **more)
    t = torch.tensor([0, 14, 7, 1])
    model, x = model_of(mean, variance), start(dtype)
    for options in options_of(name):
        unconditional = {k: v for k, v in options.items() if k != "cond_fn"}
        calls = [("p_sample", options), ("ddim_reverse_sample", unconditional)]
        calls += [("ddim_sample", {**options, "eta": eta}) for eta in (0.0, 0.5, 1.0)]
        for method, arguments in calls:
            if dtype == torch.float64:
                assert_same_run(stock, fast, method, model, x, t, **arguments)
            else:
                assert_as_good(exact, stock, fast, method, model, x, t, **arguments)


@pytest.mark.parametrize("name", PEERS)
def test_ddim_there_and_back(name):
    """ddim_reverse_sample over all timesteps, then ddim_sample_loop from where it came to."""
    stock, fast = both(name, spacing="ddim10")
    ends = []
    for diffusion in (stock, fast):
        x = 0.5 * start(torch.float64)
        for i in range(10):
            t = torch.full((4,), i)
            x = diffusion.ddim_reverse_sample(model_of(), x, t, clip_denoised=False)["sample"]
        ends.append(x)
        back = diffusion.ddim_sample_loop(
            model_of(), SHAPE, noise=x, clip_denoised=False, device="cpu"
        )
        ends.append(back)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ends[3], ends[1], rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match=r"eta = 0; got 0\.5"):
        fast.ddim_reverse_sample(model_of(), start(), torch.zeros(4).long(), eta=0.5)


@pytest.mark.parametrize("method", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("name", PEERS)
def test_loops_draw_what_the_stock_code_draws(name, method):
    """x_T too, on the device of the model's parameters; the last of the progressive loop."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x, t):
            assert not torch.is_grad_enabled()
            return self.gain * x + 0.1 * torch.sin(x)

    stock, fast = both(name, spacing="3,2,2")
    model = Model()
    assert_same_run(stock, fast, method, model, SHAPE)
    [last], _ = run(fast, method, model, list(SHAPE))
    steps, _ = run(fast, f"{method}_progressive", model, SHAPE)
    assert torch.equal(steps[-2], last)
    assert len(steps) == 14


@pytest.mark.parametrize("name", PEERS)
def test_arguments_stand_where_the_stock_method_has_them(name):
    stock, fast = both(name, variance="LEARNED_RANGE")
    model, x, t = model_of("EPSILON", "LEARNED_RANGE"), start(torch.float64), torch.tensor([3] * 4)
    arguments = [False, shrink, {"shift": 0.2}]
    if not name.startswith("improved"):
        arguments.insert(2, slope)
    assert_same_run(stock, fast, "p_sample", model, x, t, *arguments)
    assert_same_run(stock, fast, "ddim_sample", model, x, t, *arguments, 0.7)
    assert_same_run(stock, fast, "p_sample_loop", model, SHAPE, x, *arguments, "cpu", False)
    for wrong in ({"clip": True}, {"eta": 1.0}):
        with pytest.raises(TypeError, match=rf"p_sample\(\): .*'{next(iter(wrong))}'"):
            fast.p_sample(model, x, t, **wrong)
    with pytest.raises(TypeError, match=r"p_sample\(\): multiple values for argument 'clip_denoi"):
        fast.p_sample(model, x, t, True, clip_denoised=True)
    with pytest.raises(TypeError, match="shape must be a tuple or a list; got int"):
        fast.p_sample_loop(model, 4, device="cpu")


def test_half_precision_states_become_float32():
    stock, fast = both("guided", "START_X", "FIXED_LARGE")
    t = torch.tensor([0, 5, 19, 1])
    for dtype in (torch.float16, torch.bfloat16):
        for method in ("p_sample", "ddim_sample"):
            results = []
            for diffusion in (stock, fast):
                torch.manual_seed(0)
                found = getattr(diffusion, method)(model_of("START_X"), start(dtype), t)
                results.append(found["sample"])
            torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
            assert results[1].dtype == torch.float32


def test_gradients_through_a_step():
    stock, fast = both("guided", variance="LEARNED_RANGE")
    t, gradients = torch.tensor([0, 5, 19, 1]), []
    for diffusion in (stock, fast):
        torch.manual_seed(0)
        x = start().requires_grad_()
        out = diffusion.p_sample(model_of("EPSILON", "LEARNED_RANGE"), x, t, clip_denoised=False)
        (out["sample"].square().sum() + out["pred_xstart"].sum()).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conditioning_of_the_users_own(dtype):
    """condition_mean may do more than add to the mean: then it gets the mean itself."""
    base = type(diffusion_of("guided", spacing="10"))

    class Halved(base):
        def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
            out = super().condition_mean(cond_fn, p_mean_var, x, t, model_kwargs=model_kwargs)
            assert (p_mean_var["pred_xstart"].abs() <= 1).all()
            return 0.5 * out

    stock, fast = both("guided", variance="FIXED_LARGE", spacing="10")
    stock.__class__ = Halved
    halved = diffusion_of("guided", variance="FIXED_LARGE", spacing="10")
    halved.__class__ = Halved
    fast = accelerate(halved, noise="torch")
    options = {"cond_fn": slope, "model_kwargs": {}, "device": "cpu", "noise": start(dtype)}
    assert_same_run(stock, fast, "p_sample_loop_progressive", model_of(), SHAPE, **options)
    addressed = accelerate(fast, seed=1)
    samples = [addressed.p_sample_loop(model_of(), SHAPE, **options) for _ in range(2)]
    assert torch.equal(*samples)


def test_steps_are_tensors_of_their_own_and_may_be_changed():
    _, fast = both("guided")
    options = {"device": "cpu", "noise": start()}
    torch.manual_seed(0)
    steps, copies = [], []
    for out in fast.p_sample_loop_progressive(model_of(), SHAPE, **options):
        steps.append(out)
        copies.append({k: v.clone() for k, v in out.items()})
    assert torch.equal(options["noise"], start())
    for out, copied in zip(steps, copies, strict=True):
        assert all(torch.equal(out[key], copied[key]) for key in copied)
    torch.manual_seed(0)
    pasted = []
    for out in fast.p_sample_loop_progressive(model_of(), SHAPE, **options):
        out["sample"][:2] = 0.25  # a known region
        pasted.append(out["sample"].clone())
    assert not torch.equal(pasted[1][:2], copies[1]["sample"][:2])
    for ours, before in zip(pasted, copies, strict=True):
        assert torch.equal(ours[2:], before["sample"][2:])


def test_progress(capsys):
    _, fast = both("guided")
    fast.p_sample_loop(model_of(), SHAPE, device="cpu", progress=True)
    assert "20/20" in capsys.readouterr().err
