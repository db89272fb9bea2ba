"""The trainer: a function of the samples consumed, whatever parts they come in."""

from __future__ import annotations

import math

import pytest
import torch
from training_runs import (
    assert_same_weights,
    go_on,
    losses,
    new_trainer,
    tiny_config,
    tiny_images,
    trained,
    weights,
)

from ddpm_fast import UNet, randn
from ddpm_fast.training import checkpoints
from ddpm_fast.training.checkpoints import read_checkpoint
from ddpm_fast.training.dropout import AddressedDropout, SampleAddress, address_dropout
from ddpm_fast.training.ema import Averages
from ddpm_fast.training.errors import RunError

pytestmark = pytest.mark.usefixtures("one_thread")


# The samples decide ------------------------------------------------------------------------


def test_a_run_is_a_function_of_its_seed():
    config = tiny_config()
    first, second = trained(config, 3), trained(config, 3)
    assert losses(first) == losses(second)
    assert_same_weights(first, second)
    other = trained(tiny_config(seed=1), 3)
    assert not torch.equal(weights(first)["conv_in.weight"], weights(other)["conv_in.weight"])


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"optimizer": {"name": "adam", "clip_norm": None}, "grad_accum": 2},
        {"loss": {"timestep_sampling": "loss_second_moment"}, "schedule": {"num_steps": 4}},
        {"loss": {"timestep_sampling": "antithetic", "weighting": "min_snr"}, "precision": "bf16"},
        {"loss": {"variance": "learned_range", "objective": "hybrid"}, "ema_rates": []},
    ],
    ids=["adamw", "accumulated", "second moment", "bf16", "hybrid"],
)
def test_resumed_to_the_bit(tmp_path, over):
    """Through the files: weights, averages, the optimiser, the loss's history."""
    config = tiny_config(**over)
    straight = trained(config, 6)
    begun = trained(config, 3)
    path = checkpoints.write_checkpoint(tmp_path, begun.snapshot())
    resumed = new_trainer(config)
    resumed.restore(read_checkpoint(path))
    go_on(resumed, 3)
    assert_same_weights(straight, resumed)
    a, b = straight.snapshot(), resumed.snapshot()
    assert (a.step, a.samples, a.state) == (b.step, b.samples, b.state) == (6, 48, a.state)
    assert a.optimizer.keys() == b.optimizer.keys()
    assert all(torch.equal(a.optimizer[name], b.optimizer[name]) for name in a.optimizer)
    for rate in config.ema_rates:
        assert all(torch.equal(a.averages[rate][n], b.averages[rate][n]) for n in a.averages[rate])
    assert losses(straight)[3:] == losses(resumed)


def test_parts_make_the_batch():
    """Dropout, dropped labels and timesteps included: 1e-6 is float32's rounding."""
    whole, parts = trained(tiny_config(), 3), trained(tiny_config(grad_accum=4), 3)
    torch.testing.assert_close(
        torch.tensor(losses(whole)), torch.tensor(losses(parts)), rtol=2e-6, atol=0
    )
    assert_same_weights(whole, parts, 1e-5)


def test_activation_checkpointing_changes_no_bit():
    plain, again = trained(tiny_config(), 3), trained(tiny_config(activation_checkpointing=True), 3)
    assert losses(plain) == losses(again)
    assert_same_weights(plain, again)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    again.model.mid_res1.conv1.register_forward_hook(count)
    go_on(again, 1)
    assert calls == 2  # the second in the backward pass


def test_what_is_trained_on():
    """The loss of the first step, by hand: the order, noise and timesteps of ids 0 … 7."""
    config = tiny_config(loss={"label_dropout": 0.0}, unet={"dropout": 0.0})
    trainer = new_trainer(config)
    from ddpm_fast import add_noise, reference
    from ddpm_fast.training.data import data_order

    data, ids = tiny_images(), torch.arange(8)
    images, labels = data.batch(data_order(len(data), 0, 8, seed=0).tolist())
    schedule = config.build_schedule()
    t = reference.random_timesteps(1000, torch.zeros(8, dtype=torch.int64), ids)
    x_t = add_noise(images, t, schedule, seed=0, sample_ids=ids)
    eps = randn(x_t.shape, seed=0, sample_ids=ids, stream=2)
    torch.manual_seed(0)
    model = UNet(config.unet)
    expected = torch.nn.functional.mse_loss(model(x_t, t, labels), eps)
    go_on(trainer, 1)
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-6)


def test_a_shorter_warm_up_moves_more():
    config = tiny_config()
    assert [config.optimizer.learning_rate_at(s) for s in (1, 5, 10, 11)] == [
        1e-4,
        5e-4,
        1e-3,
        1e-3,
    ]
    trainer = trained(config, 2)
    assert trainer.learning_rate == 2e-4


@pytest.mark.parametrize("limit", [0.1, 1e6, None])
def test_clipping_is_torchs(limit):
    trainer = new_trainer(tiny_config())
    ours, theirs = (list(trainer.model.parameters()) for _ in range(2))
    gradients = [torch.randn_like(p) for p in ours]
    for parameter, gradient in zip(ours, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = trainer._clip(limit)
    clipped = [p.grad for p in ours]
    for parameter, gradient in zip(theirs, gradients, strict=True):
        parameter.grad = gradient
    expected = torch.nn.utils.clip_grad_norm_(theirs, limit or math.inf, foreach=True)
    assert torch.equal(norm, expected)
    assert all(torch.equal(a, p.grad) for a, p in zip(clipped, theirs, strict=True))


def test_fp16_passes_over_a_step_that_overflows(tmp_path):
    """The loss scale is halved, kept in checkpoints, and the run goes on."""
    config = tiny_config(precision="fp16", steps=4)
    trainer = new_trainer(config)

    def overflow(grad):
        return grad * math.inf if trainer.step_count == 2 else grad  # in the third step

    trainer.model.conv_out.weight.register_hook(overflow)
    go_on(trainer, 2)
    before = weights(trainer)
    go_on(trainer, 1)
    assert not math.isfinite(trainer.read()[-1][2])
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    kept = read_checkpoint(checkpoints.write_checkpoint(tmp_path, trainer.snapshot()))
    assert kept.state["scaler"]["scale"] == 2.0**15
    resumed = new_trainer(config)
    resumed.restore(kept)
    assert_same_weights(go_on(trainer, 1), go_on(resumed, 1))
    assert not torch.equal(before["conv_in.weight"], weights(trainer)["conv_in.weight"])


def test_sharding_takes_several_processes():
    with pytest.raises(RunError, match="fsdp takes several processes"):
        new_trainer(tiny_config(), "fsdp")


# Dropout -----------------------------------------------------------------------------------


def test_dropout_of_a_sample_is_its_own():
    address = SampleAddress(seed=3)
    drop = AddressedDropout(0.3, address, 5)
    x = torch.ones(64, 4, 16, 16)
    address.sample_ids = torch.arange(100, 164)
    mask = drop(x)
    assert torch.equal(
        mask, torch.where(randn_of(address, x.shape, 5) < -0.524400512708041, 0, x / 0.7)
    )
    share = (mask == 0).double().mean()
    assert abs(share - 0.3) < 5 * math.sqrt(0.21 / x.numel())  # five sigma
    address.sample_ids = torch.tensor([130, 101])
    assert torch.equal(drop(x[:2]), mask[[30, 1]])
    assert torch.equal(drop(x[:2].contiguous(memory_format=torch.channels_last)), mask[[30, 1]])
    assert not torch.equal(AddressedDropout(0.3, address, 6)(x[:2]), mask[[30, 1]])
    assert drop.eval()(x) is x


def randn_of(address, shape, index):
    return randn(shape, seed=address.seed, sample_ids=address.sample_ids, stream=9, index=index)


def test_every_dropout_is_replaced():
    model = UNet(tiny_config().unet)
    found = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    address_dropout(model, SampleAddress(0))
    replaced = [m for m in model.modules() if isinstance(m, AddressedDropout)]
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(found) == len(replaced) == 8
    assert sorted(m.index for m in replaced) == list(range(8))
    assert {m.p for m in replaced} == {0.1}


# Averages ----------------------------------------------------------------------------------


def test_averages():
    """a ← d a + (1 − d) θ, d = min(rate, (1 + t)/(10 + t)), in float64."""
    weights = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    averages = Averages(weights, [0.5, 0.99])
    expected = {rate: [w.clone() for w in weights] for rate in (0.5, 0.99)}
    for t in range(30):
        for w in weights:
            w += torch.randn_like(w)
        averages.update(weights, t)
        for rate, ours in expected.items():
            d = min(rate, (1 + t) / (10 + t))
            ours[:] = [d * a + (1 - d) * w for a, w in zip(ours, weights, strict=True)]
    for rate, ours in expected.items():
        for a, b in zip(averages.shadows[rate], ours, strict=True):
            torch.testing.assert_close(a, b)
    kept = [w.clone() for w in weights]
    with averages.swapped_in(weights, 0.99):
        assert torch.equal(weights[0], averages.shadows[0.99][0])
    assert all(torch.equal(w, k) for w, k in zip(weights, kept, strict=True))


def test_samples_are_the_averages_and_change_nothing():
    trainer = trained(tiny_config(output={"num_samples": 4, "sampling_steps": 3}), 3)
    before = weights(trainer)
    images = trainer.sample()
    assert (images.dtype, images.shape) == (torch.uint8, (4, 1, 8, 8))
    assert torch.equal(images, trainer.sample())
    assert trainer.model.training
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    one_by_one = trained(tiny_config(output={"num_samples": 1, "sampling_steps": 3}), 3).sample()
    assert (one_by_one[0].int() - images[0].int()).abs().max() <= 1


@pytest.mark.parametrize(
    "over",
    [
        {"loss": {"prediction": "v_prediction"}, "schedule": {"zero_terminal_snr": True}},
        {"loss": {"variance": "learned"}, "unet": {"num_classes": None}, "precision": "bf16"},
        {"schedule": {"name": "jsd", "num_steps": 2}, "loss": {"prediction": "sample"}},
    ],
    ids=["zero snr", "learned, unconditional", "two steps"],
)
def test_samples_of_every_kind(over):
    trainer = trained(tiny_config(output={"num_samples": 2, "sampling_steps": 3}, **over), 2)
    assert trainer.sample().shape == (2, 1, 8, 8)
    assert all(math.isfinite(loss) for loss in losses(trainer))
