"""Training losses, their gradients and bits/dim of accelerated OpenAI objects against the stock
code, with the same noise. What is float32 is measured against float64 tables in float64."""

from __future__ import annotations

import pytest
import torch
from openai_cases import (
    LOSSES,
    MEANS,
    PEERS,
    SHAPE,
    VARIANCES,
    assert_close_in_units,
    diffusion_of,
    images,
    model_of,
    same_noise,  # noqa: F401
    start,
)

from ddpm_fast import accelerate, bits_per_dim, randn

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:losses and bits/dim stay the stock formulas"),
]
T = torch.tensor([0, 9, 4, 1])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 3.0])
USES = {
    "weighted": lambda terms: (terms["loss"] * WEIGHTS).mean(),
    "sum": lambda terms: terms["loss"].sum(),
    "mse": lambda terms: terms["mse"].mean(),
    "vb": lambda terms: (terms["vb"] * WEIGHTS).sum(),
}


class Model(torch.nn.Module):
    """With a parameter for each element, so that gradients are those of the model's output."""

    def __init__(self, mean, variance, dtype=torch.float32):
        super().__init__()
        self.model = model_of(mean, variance)
        channels = SHAPE[1] * (2 if variance.startswith("LEARNED") else 1)
        shape = (SHAPE[0], channels, *SHAPE[2:])
        self.offset = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))

    def forward(self, x, t, shift=0.0):
        return self.model(x, t, shift) + self.offset


def losses(diffusion, mean, variance, dtype=torch.float32, use="weighted", **options):
    """The terms, the gradient of what is made of them, and the generator's next number."""
    model = Model(mean, variance, dtype)
    torch.manual_seed(5)
    terms = diffusion.training_losses(model, images(dtype), T, **options)
    after = torch.rand(1).item()
    if use in terms or use in ("weighted", "sum"):
        USES[use](terms).backward()
    return {k: v.detach() for k, v in terms.items()}, model.offset.grad, after


def ulps_of(name):
    """Of float32: the exact values by the real classes come of float32's tables."""
    return 16 if name.endswith("_diffusion") else 4


def objects(name, *choices, **more):
    """Of float64 tables where they are stand-ins, the stock one, and an accelerated one."""
    exact = None if name.endswith("_diffusion") else torch.float64
    return (
        diffusion_of(name, *choices, coefficients=exact, **more),
        diffusion_of(name, *choices, **more),
        accelerate(diffusion_of(name, *choices, **more), noise="torch"),
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", PEERS)
def test_losses(name, mean, variance, loss, same_noise):  # noqa: F811
    exact, stock, fast = objects(name, mean, variance, loss, spacing="10", rescale=True)
    options = {"model_kwargs": {"shift": 0.05}}
    for use in USES:
        truth, true_gradient, _ = losses(exact, mean, variance, torch.float64, use, **options)
        expected, gradient, after = losses(stock, mean, variance, use=use, **options)
        found, our_gradient, our_after = losses(fast, mean, variance, use=use, **options)
        assert our_after == after
        assert found.keys() == expected.keys()
        for key in found:
            assert_close_in_units(found[key], expected[key], truth[key], ulps=ulps_of(name))
        if gradient is None:
            assert our_gradient is None
        else:
            assert_close_in_units(our_gradient, gradient, true_gradient, ulps=ulps_of(name))
        wide, wide_gradient, _ = losses(stock, mean, variance, torch.float64, use, **options)
        found, our_gradient, _ = losses(fast, mean, variance, torch.float64, use, **options)
        torch.testing.assert_close(found, wide, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(our_gradient, wide_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["MSE", "RESCALED_KL"])
@pytest.mark.parametrize("variance", ["FIXED_SMALL", "LEARNED_RANGE"])
def test_whole_processes(variance, loss, same_noise):  # noqa: F811
    """Of a GaussianDiffusion, with noise that is given."""
    exact, stock, fast = objects("guided", "EPSILON", variance, loss, rescale=True)
    truth, true_gradient, _ = losses(
        exact, "EPSILON", variance, torch.float64, noise=start(torch.float64)
    )
    expected, gradient, _ = losses(stock, "EPSILON", variance, noise=start())
    found, our_gradient, _ = losses(fast, "EPSILON", variance, noise=start())
    for key in found:
        assert_close_in_units(found[key], expected[key], truth[key])
    assert_close_in_units(our_gradient, gradient, true_gradient)


def test_what_the_kernels_do_not_differentiate_stays_stock():
    """By x_start or by the noise, and models in float64."""
    _, stock, fast = objects("guided", "EPSILON", "LEARNED_RANGE", "RESCALED_MSE")
    model, gradients = model_of("EPSILON", "LEARNED_RANGE"), []
    for diffusion in (stock, fast):
        x0, noise = images().requires_grad_(), start().requires_grad_()
        diffusion.training_losses(model, x0, T, noise=noise)["loss"].sum().backward()
        diffusion.q_sample(x0, T, noise).square().sum().backward()
        gradients += [x0.grad, noise.grad]
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[1], gradients[3])
    wide = [
        d.training_losses(lambda x, t: model(x, t).double(), images(), T, noise=start())
        for d in (stock, fast)
    ]
    torch.testing.assert_close(wide[1], wide[0], rtol=1e-6, atol=0)
    assert wide[1]["loss"].dtype == torch.float64


def test_torch_func():
    """Transforms of torch.func go through the stock formula."""
    _, stock, fast = objects("guided", "EPSILON", "LEARNED_RANGE", "RESCALED_MSE")
    model = model_of("EPSILON", "LEARNED_RANGE")

    def loss(factor, diffusion):
        scaled = lambda x, t: factor * model(x, t)  # noqa: E731
        return diffusion.training_losses(scaled, images(), T, noise=start())["loss"].mean()

    theirs, ours = (torch.func.grad(loss)(torch.tensor(0.3), d) for d in (stock, fast))
    torch.testing.assert_close(ours, theirs)


def test_low_precision_models():
    """As autocast leaves a model's output."""
    _, stock, fast = objects("guided", "EPSILON", "LEARNED_RANGE", "RESCALED_MSE")
    model = model_of("EPSILON", "LEARNED_RANGE")
    found = [
        d.training_losses(
            lambda x, t: model(x, t).bfloat16(), images()[1:3], T[1:3], noise=start()[1:3]
        )
        for d in (stock, fast)
    ]
    assert found[1]["loss"].dtype == torch.float32
    torch.testing.assert_close(found[1]["mse"], found[0]["mse"].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1]["vb"], found[0]["vb"].float(), rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("name", PEERS)
def test_q_sample(name):
    stock, fast = objects(name)[1:]
    for dtype in (torch.float32, torch.float64, torch.float16):
        results = []
        for diffusion in (stock, fast):
            torch.manual_seed(0)
            results.append(diffusion.q_sample(images(dtype), T))
            results.append(diffusion.q_sample(images(dtype), T, start(dtype)))
        torch.testing.assert_close(results[2:], results[:2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PEERS)
def test_q_sample_by_timesteps_that_broadcast(name):
    stock, fast = objects(name)[1:]
    for t in (T[1:2], T[1], T.reshape(4, 1), T.int(), T[1:2].int()):
        for dtype in (torch.float32, torch.float64):
            results = []
            for diffusion in (stock, fast):
                torch.manual_seed(0)
                results.append(diffusion.q_sample(images(dtype), t))
            torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
    for diffusion in (stock, fast):
        with pytest.raises(RuntimeError, match="expanded size of the tensor"):
            diffusion.q_sample(images(), T[:2])
    fast.set_noise(seed=7)
    first = fast.q_sample(images(), T[1:2])
    assert fast.noise_source.consumed == 4
    fast.set_noise(seed=7)
    assert torch.equal(fast.q_sample(images(), T[1:2].expand(4)), first)


def test_timesteps_of_32_bits():
    _, stock, fast = objects("guided", "EPSILON", "LEARNED_RANGE", "RESCALED_MSE")
    model = model_of("EPSILON", "LEARNED_RANGE")
    found, expected, whole = (
        d.training_losses(model, images(), t, noise=start())
        for d, t in ((fast, T.int()), (stock, T.int()), (fast, T))
    )
    for key, values in found.items():
        assert torch.equal(values, whole[key])
        torch.testing.assert_close(values[1:], expected[key][1:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", PEERS)
def test_bits_per_dim(name, mean, variance, clip, same_noise):  # noqa: F811
    exact, stock, fast = objects(name, mean, variance, spacing="10", rescale=True)
    model, options = model_of(mean, variance), {"clip_denoised": clip, "model_kwargs": {"shift": 0}}

    def of(diffusion, dtype):
        torch.manual_seed(5)
        return diffusion.calc_bpd_loop(model, images(dtype), **options), torch.rand(1).item()

    truth, _ = of(exact, torch.float64)
    expected, after = of(stock, torch.float32)
    found, our_after = of(fast, torch.float32)
    wide, _ = of(stock, torch.float64)
    our_wide, _ = of(fast, torch.float64)
    assert our_after == after
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(our_wide[key], wide[key], rtol=1e-9, atol=1e-12)
        # ε's error is that of x̂₀ over √(1/ᾱ − 1), which is 1/30 at t = 0.
        ulps = 30 * ulps_of(name) if key == "mse" else ulps_of(name)
        assert_close_in_units(found[key], expected[key], truth[key], ulps=ulps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_addressed_losses(dtype):
    """With a seed the samples count on; ε is add_noise's at seed and id."""
    fast = accelerate(diffusion_of("guided", "EPSILON", "LEARNED_RANGE", "RESCALED_MSE"), seed=7)
    model, ids = model_of("EPSILON", "LEARNED_RANGE"), torch.arange(8)
    x0 = torch.cat([images(dtype), images(dtype).flip(0)])
    t = torch.cat([T, T])
    eps = randn(x0.shape, seed=7, sample_ids=ids, stream=2).to(dtype)
    expected = fast.training_losses(model, x0, t, noise=eps)
    assert fast.noise_source.consumed == 0
    parts = [fast.training_losses(model, x0[i], t[i]) for i in (slice(3), slice(3, 8))]
    assert fast.noise_source.consumed == 8
    for key in expected:
        together = torch.cat([part[key] for part in parts])
        torch.testing.assert_close(together, expected[key], rtol=1e-6, atol=0)
    again = fast.q_sample(x0, t)
    assert fast.noise_source.consumed == 16
    eps = randn(x0.shape, seed=7, sample_ids=ids + 8, stream=2).to(dtype)
    torch.testing.assert_close(again, fast.q_sample(x0, t, eps), rtol=1e-6, atol=1e-7)
    fresh = accelerate(fast)
    first, second = (fresh.training_losses(model, x0, t)["loss"] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variance", ["FIXED_LARGE", "LEARNED_RANGE"])
def test_addressed_bits_per_dim(variance, dtype):
    """bits_per_dim's, whatever the batch."""
    diffusion = diffusion_of("guided", "START_X", variance)
    fast = accelerate(diffusion, seed=7, sample_ids=[3, 0, 2**40, 5])
    model = model_of("START_X", variance)
    found = fast.calc_bpd_loop(model, images(dtype))
    expected = bits_per_dim(
        model,
        images(dtype),
        fast._tables.schedule,
        prediction="sample",
        variance=variance.lower(),
        seed=7,
        sample_ids=[3, 0, 2**40, 5],
        cdf="tanh",
    )
    torch.testing.assert_close(found["vb"], expected.vlb.flip(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["mse"], expected.mse.flip(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["total_bpd"], expected.total, rtol=1e-5, atol=1e-6)
    fast.set_noise(seed=7, sample_ids=[5])
    alone = fast.calc_bpd_loop(model, images(dtype)[3:])
    torch.testing.assert_close(alone["vb"][0], found["vb"][3], rtol=1e-6, atol=1e-9)
