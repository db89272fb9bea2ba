"""q_sample and p_losses of an accelerated GaussianDiffusion beside the stock one's."""

from __future__ import annotations

import copy
import random
import warnings
from importlib import import_module

import pytest
import torch
from helpers import ulp
from lucidrains_models import SIZE, TinyNet, both, images, seeded, stock_diffusion
from lucidrains_package import package_or_skip
from torch import nn

from ddpm_fast import accelerate, randn

package = package_or_skip()
pytestmark = pytest.mark.usefixtures("one_thread")

OBJECTIVES = ["pred_noise", "pred_x0", "pred_v"]
NOISES = ["torch", "addressed"]
FLOAT32 = ulp(torch.float32)


def gradients(diffusion, loss):
    return torch.autograd.grad(loss.sum(), [*diffusion.model.parameters()], retain_graph=True)


def assert_same_training(stock, fast, theirs, ours, tolerance=16 * FLOAT32):
    """The loss to rounding, and the gradients to roundings of their largest term."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert (theirs - ours).abs().max() <= tolerance * theirs.abs().max()
    for expected, found in zip(gradients(stock, theirs), gradients(fast, ours), strict=True):
        assert found.dtype == expected.dtype
        assert (expected - found).abs().max() <= 4 * tolerance * expected.abs().max()


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("min_snr", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_forward(objective, min_snr, offset, self_condition):
    """From images to the loss, several times, so that both sides of the coin come up."""
    stock, fast = both(
        package,
        objective=objective,
        min_snr_loss_weight=min_snr,
        offset_noise_strength=offset,
        self_condition=self_condition,
    )
    for seed in range(4):
        theirs, state = seeded(lambda: stock(images()), seed)
        coin = random.random()
        ours, our_state = seeded(lambda: fast(images()), seed)
        assert_same_training(stock, fast, theirs, ours)
        assert torch.equal(state, our_state)
        assert random.random() == coin
    theirs, _ = seeded(lambda: stock(images(), loss_reduction="none"))
    ours, _ = seeded(lambda: fast(images(), loss_reduction="none"))
    assert ours.shape == (4,)
    assert_same_training(stock, fast, theirs, ours)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("immiscible", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_given_noise(objective, immiscible, noise):
    """Offset noise is added to it in place, as there; of 0 here."""
    stock, fast = both(package, noise=noise, objective=objective, immiscible=immiscible)
    x0, eps = images() * 2 - 1, torch.randn(4, 3, SIZE, SIZE)
    t = torch.tensor([0, 3, 500, 999])
    theirs, ours = (diffusion.p_losses(x0, t, noise=eps) for diffusion in (stock, fast))
    assert_same_training(stock, fast, theirs, ours)
    theirs, ours = (diffusion.q_sample(x0, t, eps) for diffusion in (stock, fast))
    assert (theirs - ours).abs().max() <= 2 * FLOAT32 * eps.abs().max()


def test_given_noise_takes_the_offset():
    stock, fast = both(package)
    x0, t = images() * 2 - 1, torch.tensor([0, 3, 500, 999])
    theirs, ours = (torch.zeros_like(x0) for _ in range(2))
    for diffusion, eps in ((stock, theirs), (fast, ours)):
        seeded(lambda d=diffusion, e=eps: d.p_losses(x0, t, e, offset_noise_strength=0.5))
    assert torch.equal(theirs, ours)
    assert ours.abs().max() > 0


@pytest.mark.parametrize("immiscible", [False, True])
def test_q_sample(immiscible):
    stock, fast = both(package, immiscible=immiscible)
    x0, t = images() * 2 - 1, torch.tensor([0, 3, 500, 999])
    theirs, _ = seeded(lambda: stock.q_sample(x0, t))
    ours, _ = seeded(lambda: fast.q_sample(x0, t))
    assert (theirs - ours).abs().max() <= 8 * FLOAT32
    one, ones = torch.tensor([7]), torch.full((4,), 7)  # which broadcasts in the stock code
    for diffusion in (stock, fast):
        broadcast, full = (
            seeded(lambda d=diffusion, t=t: d.q_sample(x0, t))[0] for t in (one, ones)
        )
        assert (broadcast - full).abs().max() <= 8 * FLOAT32


@pytest.mark.parametrize("immiscible", [False, True])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_float64(objective, noise, immiscible):
    stock, fast = both(
        package, objective=objective, offset_noise_strength=0.1, immiscible=immiscible
    )
    stock, fast = stock.double(), fast.double()
    if noise == "addressed":
        fast.set_noise(seed=3)
        eps = randn([4, 3, SIZE, SIZE], seed=3, stream=2).double()
        eps += 0.1 * randn([4, 3, 1, 1], seed=3, stream=5)
    x0, t = images().double() * 2 - 1, torch.tensor([0, 3, 500, 999])
    if noise == "torch":
        theirs, _ = seeded(lambda: stock.p_losses(x0, t))
    else:
        theirs = stock.p_losses(x0, t, eps, offset_noise_strength=0.0)
    with pytest.warns(UserWarning, match="float64"):
        ours, _ = seeded(lambda: fast.p_losses(x0, t))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.p_losses(x0, t)
    assert_same_training(stock, fast, theirs, ours, 1e-12)


@pytest.mark.filterwarnings("ignore:.*float64")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_float64_model(objective):
    """Whose output is found to be float64 when x_t is drawn and its noise is not stored."""
    config = {"model": TinyNet().double(), "objective": objective, "offset_noise_strength": 0.1}
    stock, fast = both(package, **config)
    fast.set_noise(seed=3)
    x0, t = images() * 2 - 1, torch.tensor([0, 3, 500, 999])
    eps = randn(x0.shape, seed=3, stream=2) + 0.1 * randn([4, 3, 1, 1], seed=3, stream=5)
    theirs = stock.p_losses(x0, t, eps, offset_noise_strength=0.0)
    assert_same_training(stock, fast, theirs, fast.p_losses(x0, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_low_precision_model(objective, dtype):
    stock, fast = both(package, model=TinyNet().to(dtype), objective=objective)
    theirs, _ = seeded(lambda: stock(images(16)))
    ours, _ = seeded(lambda: fast(images(16)))
    assert ours.dtype == torch.float32
    assert_same_training(stock, fast, theirs.double(), ours.double(), 2 * ulp(dtype))


def test_all_in_bfloat16():
    stock, fast = both(package)
    stock, fast = stock.bfloat16(), fast.bfloat16()
    theirs, _ = seeded(lambda: stock(images(16).bfloat16()))
    ours, _ = seeded(lambda: fast(images(16).bfloat16()))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert abs(theirs - ours) <= 4 * ulp(torch.bfloat16) * theirs


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_autocast(objective):
    stock, fast = both(package, objective=objective)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, _ = seeded(lambda: stock(images(16)))
        ours, _ = seeded(lambda: fast(images(16)))
    assert_same_training(stock, fast, theirs, ours, 2 * ulp(torch.bfloat16))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_scaled_losses(objective):
    """Accumulated and scaled before the backward pass, as a gradient scaler does."""
    stock, fast = both(package, objective=objective)
    theirs, _ = seeded(lambda: stock(images()) / 3 * 1024)
    ours, _ = seeded(lambda: fast(images()) / 3 * 1024)
    assert_same_training(stock, fast, theirs, ours)
    weights = torch.tensor([1.0, 0.0, -2.0, 0.5])
    theirs, _ = seeded(lambda: stock(images(), loss_reduction="none") * weights)
    ours, _ = seeded(lambda: fast(images(), loss_reduction="none") * weights)
    assert_same_training(stock, fast, theirs, ours)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_of_gradients(objective, noise, reduction):
    """A penalty on the gradient by the parameters, as the stock formula has it."""
    stock, fast = both(package, noise=noise, objective=objective)
    if noise == "addressed":
        fast.set_noise(seed=3)
    x0, t = images() * 2 - 1, torch.tensor([0, 3, 500, 999])
    eps = None if noise == "torch" else randn(x0.shape, seed=3, stream=2)

    def penalty(diffusion, eps):
        loss, _ = seeded(lambda: diffusion.p_losses(x0, t, eps, loss_reduction=reduction))
        loss = (loss**2).sum()
        first = torch.autograd.grad(loss, [*diffusion.model.parameters()], create_graph=True)
        return sum((gradient**2).sum() for gradient in first)

    assert_same_training(stock, fast, penalty(stock, eps), penalty(fast, None), 64 * FLOAT32)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_of_the_data(objective):
    """An encoder before the diffusion: x_start requires grad."""
    stock, fast = both(package, objective=objective)
    results = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for diffusion in (stock, fast, fast):
            x = images().requires_grad_()
            loss, _ = seeded(lambda d=diffusion, x=x: d(x))
            results.append((loss, torch.autograd.grad(loss, x, retain_graph=True)[0]))
    assert len(caught) == (objective != "pred_noise")
    (theirs, of_theirs), (ours, of_ours), _ = results
    assert_same_training(stock, fast, theirs, ours)
    assert (of_theirs - of_ours).abs().max() <= 64 * FLOAT32 * of_theirs.abs().max()


def test_gradients_of_the_noise():
    stock, fast = both(package)
    x0, t = images() * 2 - 1, torch.tensor([0, 3, 500, 999])
    found = []
    for diffusion in (stock, fast):
        eps = torch.ones_like(x0).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(torch.autograd.grad(diffusion.p_losses(x0, t, eps), eps)[0])
    assert (found[0] - found[1]).abs().max() <= 64 * FLOAT32 * found[0].abs().max()


def test_timesteps_that_are_not_dense():
    _, fast = both(package)
    expected, _ = seeded(lambda: fast(images(), times=torch.tensor([7, 7, 7, 7])))
    for times in (torch.tensor(7).expand(4), torch.tensor([7, 0] * 4)[::2]):
        found, _ = seeded(lambda times=times: fast(images(), times=times))
        assert torch.equal(found, expected)


def test_torch_func():
    """Transforms of torch.func go through the formula in PyTorch."""
    stock, fast = both(package)
    weights = dict(stock.named_parameters())

    def loss(values, diffusion):
        torch.manual_seed(1)
        return torch.func.functional_call(diffusion, values, (images(),))

    theirs, ours = (torch.func.grad(loss)(weights, d) for d in (stock, fast))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6)


def test_one_timestep_for_all():
    """[1] of it broadcasts in the stock code."""
    stock, fast = both(package)
    one = torch.tensor([7])
    theirs, _ = seeded(lambda: stock(images(), times=one))
    ours, _ = seeded(lambda: fast(images(), times=one))
    assert_same_training(stock, fast, theirs, ours)


def test_without_gradients():
    stock, fast = both(package)
    with torch.no_grad():
        theirs, _ = seeded(lambda: stock(images()))
        ours, _ = seeded(lambda: fast(images()))
    assert not ours.requires_grad
    assert abs(theirs - ours) <= 16 * FLOAT32 * theirs


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_addressed(objective, self_condition, offset):
    """The stock loss of the noise at the address; ids count on from call to call."""
    config = {
        "objective": objective,
        "self_condition": self_condition,
        "offset_noise_strength": offset,
    }
    stock, fast = both(package, **config)
    fast.set_noise(seed=11)
    t = torch.tensor([0, 3, 500, 999])
    for first in (0, 4, 8):
        x0, ids = images(seed=first) * 2 - 1, range(first, first + 4)
        eps = randn(x0.shape, seed=11, sample_ids=ids, stream=2)
        eps += offset * randn([4, 3, 1, 1], seed=11, sample_ids=ids, stream=5)
        theirs, _ = seeded(lambda x=x0, e=eps: stock.p_losses(x, t, e, offset_noise_strength=0.0))
        ours, _ = seeded(lambda x=x0: fast.p_losses(x, t))
        assert_same_training(stock, fast, theirs, ours)


def test_addressed_losses_do_not_depend_on_the_batch():
    fast = accelerate(stock_diffusion(package), seed=5)
    x0, t = images(6) * 2 - 1, torch.tensor([0, 3, 500, 999, 40, 700])
    together = fast.p_losses(x0, t, loss_reduction="none")
    fast.set_noise(seed=5)
    apart = [fast.p_losses(x0[i], t[i], loss_reduction="none") for i in torch.arange(6).split(2)]
    torch.testing.assert_close(torch.cat(apart), together)
    fast.set_noise(seed=5, consumed=4)
    torch.testing.assert_close(fast.p_losses(x0[4:], t[4:], loss_reduction="none"), together[4:])


def test_unseeded_losses_differ_and_follow_torch_s_seed():
    fast = accelerate(stock_diffusion(package))
    times = torch.full((4,), 500)
    first, _ = seeded(lambda: fast(images(), times=times))
    other = fast(images(), times=times)
    again, _ = seeded(lambda: fast(images(), times=times))
    assert first == again != other


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_addressed_noise_is_never_stored(objective, monkeypatch):
    fast = accelerate(stock_diffusion(package, objective=objective))
    training = import_module("ddpm_fast.integrations.lucidrains.training")

    def refuse(*args, **kwargs):
        raise AssertionError("noise of the images' size")

    monkeypatch.setattr(training, "drawn", refuse)
    for name in ("randn", "randn_like"):
        monkeypatch.setattr(torch, name, refuse)
    fast(images()).backward()
    fast.immiscible = True  # which compares it with the images
    with pytest.raises(AssertionError, match="images' size"):
        fast(images())


def test_self_conditioning_is_drawn_from_python_s_random():
    """As often as the stock code looks at the coin."""
    model = TinyNet(self_condition=True)
    fast = accelerate(stock_diffusion(package, model=model, self_condition=True))
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(args[2] is not None))
    random.seed(1)
    coins = [random.random() < 0.5 for _ in range(10)]
    random.seed(1)
    for coin in coins:
        calls.clear()
        fast(images(1))
        assert calls == ([False, True] if coin else [False])


def test_a_model_that_changes_its_input():
    """The loss does not read x_t again."""

    class Rough(nn.Module):
        channels, out_dim, self_condition = 3, 3, False

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x, t, x_self_cond=None):
            result = x * self.scale
            x.zero_()
            return result.clone()

    stock = package.GaussianDiffusion(Rough(), image_size=SIZE)
    fast = accelerate(copy.deepcopy(stock), noise="torch")
    with torch.no_grad():
        theirs, _ = seeded(lambda: stock(images()))
        ours, _ = seeded(lambda: fast(images()))
    assert abs(theirs - ours) <= 16 * FLOAT32 * theirs


def test_errors():
    fast = accelerate(stock_diffusion(package))
    with pytest.raises(ValueError, match="t must lie in 0 … 999"):
        fast.p_losses(images(), torch.tensor([0, 1, 2, 1000]))
    with pytest.raises(ValueError, match="not enough values"):
        fast.p_losses(images()[0], torch.tensor([0]))
    pixels, t = (images() * 255).byte(), torch.tensor([0] * 4)
    with pytest.raises(TypeError, match=r"x_start must be a float tensor; got torch\.uint8"):
        fast.p_losses(pixels, t)
    with pytest.raises(RuntimeError, match="normal_kernel"):  # torch's, as there
        accelerate(fast, noise="torch").p_losses(pixels, t)
