"""What accelerate does to a GaussianDiffusion, which it takes, and its addressed noise."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from types import ModuleType

import pytest
import torch
from lucidrains_models import SIZE, TinyNet, images, seeded, stock_diffusion
from lucidrains_package import package_or_skip
from torch import nn

from ddpm_fast import Sampler, accelerate, add_noise, randn
from ddpm_fast.integrations import lucidrains

package = package_or_skip()
pytestmark = pytest.mark.usefixtures("one_thread")


def accelerated(**config):
    noise = {name: config.pop(name) for name in ("seed", "sample_ids") if name in config}
    return accelerate(stock_diffusion(package, **config), **noise)


def state_of(diffusion):
    """What must not change where acceleration fails."""
    return type(diffusion), {**diffusion.__dict__}


def test_in_place():
    stock = stock_diffusion(package, timesteps=20)
    before = {name: tensor for name, tensor in stock.state_dict().items()}
    fast = accelerate(stock, seed=3)
    assert fast is stock
    assert isinstance(fast, package.GaussianDiffusion)
    assert type(fast).__name__ == "FastGaussianDiffusion"
    after = fast.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert len(dict(fast.named_buffers(recurse=False))) == 13
    again = accelerate(fast, noise="torch")
    assert again is fast
    assert type(again).__mro__.count(type(again)) == 1
    assert fast.noise_source.source == "torch"


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(way):
    fast = accelerated(timesteps=20, seed=3)
    expected = fast.sample(2)
    if way == "deepcopy":
        twin = copy.deepcopy(fast)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(fast))
    else:
        buffer = io.BytesIO()
        torch.save(fast, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin) is type(fast)
    assert torch.equal(twin.sample(2), expected)
    with torch.no_grad():
        twin.model.conv.weight.zero_()
    assert not torch.equal(twin.sample(2), expected)
    assert torch.equal(fast.sample(2), expected)


def test_subclasses_that_leave_the_methods_alone():
    class Own(package.GaussianDiffusion):
        def forward(self, img, *args, **kwargs):
            return 2 * super().forward(img, *args, **kwargs)

    torch.manual_seed(0)
    stock = Own(TinyNet(), image_size=SIZE, timesteps=25)
    fast = accelerate(copy.deepcopy(stock), noise="torch")
    assert isinstance(fast, Own)
    theirs, _ = seeded(lambda: stock(images()))
    ours, _ = seeded(lambda: fast(images()))
    torch.testing.assert_close(ours, theirs)


def test_other_classes():
    root = sys.modules["denoising_diffusion_pytorch"]
    torch.manual_seed(0)
    learned = TinyNet()
    learned.out_dim = 6
    elucidated = TinyNet()
    elucidated.random_or_learned_sinusoidal_cond = True
    unknown = [
        root.LearnedGaussianDiffusion(learned, image_size=SIZE, objective="pred_noise"),
        root.ElucidatedDiffusion(elucidated, image_size=SIZE),
        root.Unet(dim=8, dim_mults=(1,)),
    ]
    for instance in unknown:
        before = state_of(instance)
        with pytest.raises(TypeError, match=r"it knows|ddpm_fast knows") as caught:
            accelerate(instance)
        assert "GaussianDiffusion (2.3)" in str(caught.value)
        assert state_of(instance) == before
    with pytest.raises(TypeError, match="has its own p_losses, p_mean_variance, model_predictions"):
        accelerate(unknown[0])


def test_a_method_of_the_instance():
    stock = stock_diffusion(package)
    stock.p_sample = lambda x, t, x_self_cond=None: (x, x)
    before = state_of(stock)
    with pytest.raises(TypeError, match="has its own p_sample, "):
        accelerate(stock)
    assert state_of(stock) == before


@pytest.mark.parametrize("lack", ["immiscible", "loss_weight", "ddim_sampling_eta"])
def test_another_version_s_attributes(lack):
    stock = stock_diffusion(package)
    delattr(stock, lack)
    before = state_of(stock)
    with pytest.raises(RuntimeError, match=f"this version .* has no {lack}; it knows"):
        accelerate(stock)
    assert state_of(stock) == before


def test_another_version_s_signatures(monkeypatch):
    stock = stock_diffusion(package)
    monkeypatch.setattr(package.GaussianDiffusion, "p_losses", lambda self, x_start, t, mask: None)
    monkeypatch.delattr(package.GaussianDiffusion, "noise_assignment")
    with pytest.raises(
        RuntimeError, match=r"has p_losses\(x_start, t, mask\); noise_assignment\(\)"
    ):
        accelerate(stock)
    assert type(stock) is package.GaussianDiffusion


def test_another_version_s_objective():
    stock = stock_diffusion(package)
    stock.objective = "pred_score"
    with pytest.raises(RuntimeError, match="objective 'pred_score'"):
        accelerate(stock)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"dtype": torch.bfloat16}, TypeError, "unexpected keyword argument 'dtype'"),
        ({"noise": "philox"}, ValueError, "noise must be"),
        ({"seed": -1}, ValueError, "seed must lie in"),
        ({"noise": "torch", "seed": 1}, ValueError, "belong to noise='addressed'"),
    ],
)
def test_options(options, error, match):
    stock = stock_diffusion(package)
    before = state_of(stock)
    with pytest.raises(error, match=match):
        accelerate(stock, **options)
    assert state_of(stock) == before


def test_namesakes_of_other_packages():
    """A GaussianDiffusion of another home is not this one's."""

    class GaussianDiffusion(nn.Module):
        pass

    assert not lucidrains.recognises(GaussianDiffusion())
    assert not lucidrains.recognises(ModuleType("denoising_diffusion_pytorch"))
    GaussianDiffusion.__module__ = "denoising_diffusion_pytorch.repaint"
    with pytest.raises(TypeError, match=r"repaint\.\S*GaussianDiffusion; it knows"):
        accelerate(GaussianDiffusion())


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("sampling_timesteps", [None, 7])
def test_images_do_not_depend_on_the_batch(sampling_timesteps, self_condition):
    fast = accelerated(
        timesteps=25,
        sampling_timesteps=sampling_timesteps,
        ddim_sampling_eta=0.8,
        self_condition=self_condition,
        seed=7,
    )
    together = fast.sample(5)
    fast.set_noise(seed=7, sample_ids=[3, 1])
    torch.testing.assert_close(fast.sample(2), together[[3, 1]], rtol=0, atol=1e-5)
    fast.set_noise(seed=8)
    assert (fast.sample(5) - together).abs().max() > 0.1


def test_unseeded_images_differ_and_follow_torch_s_seed():
    fast = accelerated(timesteps=20)
    first, _ = seeded(lambda: fast.sample(2))
    other = fast.sample(2)
    again, _ = seeded(lambda: fast.sample(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_loop_is_its_steps():
    fast = accelerated(timesteps=20, seed=7)
    x = randn([2, 3, SIZE, SIZE], seed=7)
    for t in reversed(range(20)):
        x, _ = fast.p_sample(x, t)
    assert torch.equal(fast.unnormalize(x), fast.sample(2))


def test_interpolate_with_addressed_noise():
    """Two noised images, mixed, and the steps of the same seed from there."""
    fast = accelerated(timesteps=20, seed=7)
    first, second = images(2) * 2 - 1, images(2, seed=1) * 2 - 1
    schedule = fast._tables.forward(fast._buffers)
    x = 0.75 * add_noise(first, 12, schedule, seed=7, index=1)
    x = x + 0.25 * add_noise(second, 12, schedule, seed=7, index=2)
    for t in reversed(range(12)):
        x, _ = fast.p_sample(x, t)
    found = fast.interpolate(first, second, 12, lam=0.25)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)
    assert fast.noise_source.consumed == 0  # training goes on where it was


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_interpolate_does_not_draw_the_noise_of_training(lam):
    fast = accelerated(timesteps=20, seed=7)
    x = torch.zeros(2, 3, SIZE, SIZE)
    noised = fast.interpolate(x, x, 0, lam)
    trained_on = fast.q_sample(x, torch.tensor([0, 0]))
    assert (noised - trained_on).abs().max() > 0.1 * trained_on.abs().max()


@pytest.mark.parametrize("accelerate_first", [False, True])
@pytest.mark.parametrize("sampling_timesteps", [None, 7])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_sampler(objective, sampling_timesteps, accelerate_first):
    fast = accelerated(
        timesteps=25,
        sampling_timesteps=sampling_timesteps,
        objective=objective,
        beta_schedule="linear",
        ddim_sampling_eta=0.8,
        seed=7,
    )
    source = fast if accelerate_first else stock_diffusion(package, timesteps=25)
    if not accelerate_first:
        source = stock_diffusion(
            package,
            timesteps=25,
            sampling_timesteps=sampling_timesteps,
            objective=objective,
            beta_schedule="linear",
            ddim_sampling_eta=0.8,
        )
    sampler = Sampler.from_pipeline(source.eval())
    assert sampler.table.method == ("ddpm" if sampling_timesteps is None else "ddim")
    assert len(sampler) == (sampling_timesteps or 25)
    samples = sampler.sample([2, 3, SIZE, SIZE], seed=7)
    torch.testing.assert_close(source.unnormalize(samples), fast.sample(2), rtol=0, atol=2e-5)


def test_sampler_of_another_length():
    """Fewer steps are DDIM's, as with sampling_timesteps."""
    stock = stock_diffusion(package, timesteps=25, ddim_sampling_eta=0.5)
    shorter = Sampler.from_pipeline(stock, num_steps=5)
    assert shorter.table.method == "ddim"
    assert shorter.table.timesteps.tolist() == [24, 19, 14, 9, 4]
    stock.sampling_timesteps, stock.is_ddim_sampling = 5, True
    assert torch.equal(shorter.table.rows, Sampler.from_pipeline(stock).table.rows)
    assert Sampler.from_pipeline(stock, num_steps=25).table.method == "ddpm"
    for bad in (0, 26):
        with pytest.raises(ValueError, match=f"num_steps must lie in 1 … 25; got {bad}"):
            Sampler.from_pipeline(stock, num_steps=bad)


def test_sampler_refuses_self_conditioning():
    stock = stock_diffusion(package, self_condition=True)
    with pytest.raises(ValueError, match=r"self_condition=True.*accelerate\(diffusion\)"):
        Sampler.from_pipeline(stock)
