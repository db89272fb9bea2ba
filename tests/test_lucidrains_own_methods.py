"""Methods that users put on an object after it is accelerated."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import ulp
from lucidrains_models import SIZE, both, images, seeded
from lucidrains_package import package_or_skip

from ddpm_fast import randn

package = package_or_skip()
pytestmark = pytest.mark.usefixtures("one_thread")


def enlarged(diffusion, method):
    """Puts on it a method that returns 1.1 times what its own does first."""
    original = getattr(diffusion, method)

    def own(*args, **kwargs):
        result = original(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            return 1.1 * result
        first = 1.1 * result[0]
        return (
            type(result)(first, *result[1:]) if hasattr(result, "_fields") else (first, *result[1:])
        )

    setattr(diffusion, method, own)


@pytest.mark.parametrize("noise", ["torch", "addressed"])
@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("model_predictions", "ddim_sample"),
        ("predict_start_from_v", "ddim_sample"),
        ("predict_start_from_v", "p_sample_loop"),
        ("p_mean_variance", "p_sample_loop"),
        ("q_posterior", "p_sample_loop"),
        ("p_sample", "p_sample_loop"),
        ("p_sample", "interpolate"),
        ("q_sample", "interpolate"),
        ("q_posterior", "p_sample"),
    ],
)
def test_sampling_calls_them(method, call, noise):
    """As stock does, on torch's noise; one warning says so, whatever is called how often."""
    stock, fast = both(package, timesteps=20, sampling_timesteps=5, ddim_sampling_eta=0.5)
    x = images(2) * 2 - 1
    arguments = {"interpolate": (x, x.flip(0)), "p_sample": (x, 7)}.get(call, ((2, 3, SIZE, SIZE),))
    before, _ = seeded(lambda: getattr(stock, call)(*arguments))
    for diffusion in (stock, fast):
        enlarged(diffusion, method)
    fast.set_noise(noise)
    theirs, _ = seeded(lambda: getattr(stock, call)(*arguments))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            ours, _ = seeded(lambda: getattr(fast, call)(*arguments))
    # What they wrap is the accelerated object's, with its noise.
    if noise == "torch" or method not in ("p_sample", "q_sample"):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    if call != "p_sample":
        assert (before - theirs).abs().max() > 0.01
    messages = {str(w.message) for w in caught if "ddpm_fast" in str(w.message)}
    if call == "interpolate" and noise == "torch":
        assert not messages  # with which it is the stock one in any case
    else:
        (message,) = messages
        assert f"its own {method}" in message
        assert sum("ddpm_fast" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("addressed", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("method", ["q_sample", "predict_v"])
def test_losses_call_them(method, offset, addressed):
    """And keep the noise that they have."""
    stock, fast = both(package, offset_noise_strength=offset)
    x0, t = images() * 2 - 1, torch.tensor([0, 3, 500, 999])
    unlike = fast.p_losses(x0, t).item()
    for diffusion in (stock, fast):
        enlarged(diffusion, method)
    if addressed:
        fast.set_noise(seed=11)
        eps = randn(x0.shape, seed=11, stream=2) + offset * randn([4, 3, 1, 1], seed=11, stream=5)
        theirs = stock.p_losses(x0, t, eps, offset_noise_strength=0.0)
    else:
        theirs, _ = seeded(lambda: stock.p_losses(x0, t))
    with pytest.warns(UserWarning, match=f"this object has got its own {method}") as caught:
        ours, _ = seeded(lambda: fast.p_losses(x0, t))
    assert len(caught) == 1
    assert abs(theirs - ours) <= 16 * ulp(torch.float32) * theirs
    assert abs(theirs - unlike) > 0.01 * theirs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.p_losses(x0, t)
    delattr(fast, method)
    fast.set_noise("torch")
    again, _ = seeded(lambda: fast.p_losses(x0, t))
    assert abs(again - theirs) > 0.01 * theirs  # the kernels' again


def test_loops_that_are_replaced_are_the_users_own():
    _, fast = both(package, timesteps=20)
    enlarged(fast, "p_sample_loop")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.sample(1)
        fast(images())
