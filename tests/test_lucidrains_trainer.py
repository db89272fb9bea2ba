"""The package's own Trainer on an accelerated GaussianDiffusion, beside one on the stock object."""

from __future__ import annotations

import copy
import random
import warnings
from importlib import import_module

import numpy as np
import pytest
import torch
from lucidrains_models import SIZE, stock_diffusion
from lucidrains_package import package_or_skip
from PIL import Image

from ddpm_fast import accelerate

package = package_or_skip()
AcceleratorState = import_module("accelerate.state").AcceleratorState
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:'pin_memory'"),  # which the Trainer always asks for
]

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hundred pictures, the fewest that Trainer takes, larger than the images of the model."""
    where = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (100, 10, 12, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(where / f"{i}.png")
    return where


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """The Trainer starts one loader a processor, and its library keeps the first precision."""
    monkeypatch.setattr(package, "cpu_count", lambda: 0)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer_of(diffusion, folder, results, **settings):
    return package.Trainer(
        diffusion,
        folder,
        train_batch_size=16,
        train_num_steps=STEPS,
        save_and_sample_every=2,
        num_samples=4,
        ema_update_every=1,
        results_folder=results,
        calculate_fid=False,
        **settings,
    )


def trained(diffusion, folder, results, **settings):
    torch.manual_seed(1)
    random.seed(1)
    trainer = trainer_of(diffusion, folder, results, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("settings", [{}, {"amp": True, "mixed_precision_type": "bf16"}])
def test_the_same_training(folder, tmp_path, settings):
    """Weights after some steps, their average, and the pictures of both, drawn from one seed."""
    stock = stock_diffusion(package, sampling_timesteps=3, self_condition=True)
    fast = accelerate(copy.deepcopy(stock), noise="torch")
    theirs = trained(stock, folder, tmp_path / "stock", **settings)
    AcceleratorState._reset_state(reset_partial_state=True)
    ours = trained(fast, folder, tmp_path / "fast", **settings)
    assert type(ours.ema.ema_model) is type(fast)
    expected, found = (
        torch.load(tmp_path / name / f"model-{STEPS // 2}.pt") for name in ("stock", "fast")
    )
    for part in ("model", "ema"):
        assert list(expected[part]) == list(found[part])
        for name, tensor in expected[part].items():
            torch.testing.assert_close(found[part][name], tensor, rtol=1e-4, atol=1e-5)
    start = stock_diffusion(package, self_condition=True).model.conv.weight
    assert (found["model"]["model.conv.weight"] - start).abs().max() > 1e-4
    for milestone in (1, 2):
        pictures = [
            np.array(Image.open(tmp_path / name / f"sample-{milestone}.png")).astype(int)
            for name in ("stock", "fast")
        ]
        assert pictures[0].shape == (2 * SIZE, 2 * SIZE, 3)
        assert abs(pictures[0] - pictures[1]).max() <= 1
    assert theirs.step == ours.step == STEPS


def test_a_seeded_training_goes_on(folder, tmp_path):
    """As docs/pipelines/lucidrains.md says: from a milestone, with the noise that comes next."""
    accumulation = 2
    settings = {"gradient_accumulate_every": accumulation}
    fast = accelerate(stock_diffusion(package, sampling_timesteps=3), seed=7)
    trained(fast, folder, tmp_path, **settings)
    resumed = accelerate(stock_diffusion(package, sampling_timesteps=3), seed=7)
    trainer = trainer_of(resumed, folder, tmp_path, **settings)
    with pytest.warns(UserWarning, match=r"no count.*consumed=step \* batch \* accumulation"):
        trainer.load(STEPS // 2)
    processes = trainer.accelerator.num_processes
    consumed = trainer.step * trainer.batch_size * trainer.gradient_accumulate_every * processes
    assert consumed == STEPS * 16 * accumulation
    # An epoch of 100 pictures ends with a batch of 4.
    assert consumed - fast.noise_source.consumed == 12
    resumed.set_noise(seed=7, consumed=consumed)
    trainer.train_num_steps = STEPS + 1
    trainer.train()
    assert resumed.noise_source.consumed == consumed + 16 * accumulation


def test_loading_warns_where_noise_would_come_again():
    states = stock_diffusion(package).state_dict()
    fast = accelerate(stock_diffusion(package), seed=7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert fast.load_state_dict(states).missing_keys == []
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings in ({}, {"source": "torch"}, {"seed": 7, "consumed": 32}):
            other = accelerate(stock_diffusion(package))
            other.set_noise(**settings)
            other.load_state_dict(states, strict=False, assign=False)


def test_addressed_noise_and_a_milestone(folder, tmp_path):
    """Trained with the kernels' noise, loaded by a stock object and by an accelerated one."""
    fast = accelerate(stock_diffusion(package, sampling_timesteps=3))
    ours = trained(fast, folder, tmp_path)
    for other in (stock_diffusion(package), accelerate(stock_diffusion(package))):
        loaded = trainer_of(other, folder, tmp_path)
        loaded.load(STEPS // 2)
        assert loaded.step == STEPS
        for name, tensor in ours.ema.state_dict().items():
            assert torch.equal(loaded.ema.state_dict()[name], tensor)
        assert torch.equal(other.model.conv.weight, fast.model.conv.weight)
