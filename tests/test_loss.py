"""DenoisingLoss: its values and gradients against the reference, weights and offset noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from loss_cases import IDS, PREDICTIONS, SCHEDULE, SHAPE, Model, T, images, noise, zero

from ddpm_fast import DenoisingLoss, NoiseSchedule, add_noise, randn, reference

# Values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_simple_is_the_mean_square_against_the_noise_of_the_address(prediction, dtype):
    x0, model = images(dtype=dtype), Model()
    output = DenoisingLoss(SCHEDULE, prediction=prediction)(model, x0, seed=7, sample_ids=IDS, t=T)
    eps = noise()
    x_t = add_noise(x0, T, SCHEDULE, seed=7, sample_ids=IDS)
    target = reference.denoising_target(images(), eps, T, SCHEDULE, prediction)
    expected = ((target - model(x_t, T)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(output.per_sample, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.loss, expected.mean(), rtol=1e-5, atol=1e-6)
    assert torch.equal(output.t, T)


def objective(model, x0, t, eps, dtype, choices):
    """The mean over the batch by the reference's formulas and torch's autograd, in ``dtype``."""
    x0, eps = x0.to(dtype), eps.to(dtype)
    prediction = choices.get("prediction", "epsilon")
    variance = choices.get("variance", "fixed_small")
    kind = choices.get("objective", "simple")
    x_t = reference.q_sample(x0, t, SCHEDULE, eps)
    output = model.to(dtype)(x_t, t)
    m = output[:, : x0.shape[1]]
    target = reference.denoising_target(x0, eps, t, SCHEDULE, prediction)
    simple = reference.regression(target, m)
    if kind == "simple":
        return simple.mean()
    if kind == "hybrid":
        output = torch.cat([m.detach(), output[:, x0.shape[1] :]], 1)
    bound = len(SCHEDULE) * reference.vlb_terms(
        x0, x_t, output, t, SCHEDULE, prediction=prediction, variance=variance
    )
    return bound.mean() if kind == "vlb" else (simple + choices["vlb_weight"] * bound).mean()


CHOICES = [
    *({"prediction": p, "variance": v} for p in PREDICTIONS for v in ("fixed_small", "learned")),
    *({"objective": "vlb", "prediction": p, "variance": "fixed_large"} for p in PREDICTIONS),
    {"objective": "vlb", "variance": "learned_range"},
    {"objective": "vlb", "variance": "learned", "prediction": "sample"},
    *(
        {"objective": "hybrid", "variance": v, "prediction": p, "vlb_weight": 0.01}
        for v in ("learned", "learned_range")
        for p in PREDICTIONS
    ),
]


@pytest.mark.parametrize("samples", [4, 6])  # a power of two, and none
@pytest.mark.parametrize("choices", CHOICES, ids=lambda c: "-".join(map(str, c.values())))
def test_gradients_in_the_models_parameters(choices, samples):
    x0, t, ids = images()[:samples], T[:samples], IDS[:samples]
    learned = choices.get("variance", "").startswith("learned")
    model = Model(out_channels=6 if learned else 3)
    if choices.get("variance") == "learned":  # log σ² that a model may have come to
        model.out.bias.data[3:] = -6.0
    result = DenoisingLoss(SCHEDULE, **choices)(model, x0, seed=7, sample_ids=ids, t=t)
    found = torch.autograd.grad(result.loss, list(model.parameters()))
    eps = noise(ids, shape=x0.shape)
    values, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        loss = objective(model, x0, t, eps, dtype, choices)
        values.append(loss)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    model.float()
    assert result.loss.item() == pytest.approx(values[1].item(), rel=1e-6)
    for ours, eager, exact in zip(found, *gradients, strict=True):
        # The last layers add up few numbers: eager's error may be next to nothing there.
        allowed = 2 * (eager - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed


def test_the_mean_over_samples_is_what_is_differentiated():
    """per_sample can be reduced by hand, too."""
    model, x0 = Model(), images()
    loss = DenoisingLoss(SCHEDULE)
    result = loss(model, x0, seed=7, sample_ids=IDS, t=T)
    (by_loss,) = torch.autograd.grad(result.loss, model.conv.weight, retain_graph=True)
    result = loss(model, x0, seed=7, sample_ids=IDS, t=T)
    (by_hand,) = torch.autograd.grad(result.per_sample.mean(), model.conv.weight)
    torch.testing.assert_close(by_loss, by_hand)


def test_hybrid_keeps_the_mean_out_of_the_bound():
    kept = {}

    def model(x, t):
        m, v = (torch.full_like(x, value).requires_grad_() for value in (0.3, -0.5))
        kept["m"], kept["v"] = m, v
        return torch.cat([m, v], 1)

    def gradients(**choices):
        loss = DenoisingLoss(SCHEDULE, variance="learned_range", **choices)
        loss(model, images(), seed=7, sample_ids=IDS, t=T).loss.backward()
        return kept["m"].grad, kept["v"].grad

    simple, nothing = gradients()
    of_mean, of_bound = gradients(objective="vlb")
    m, v = gradients(objective="hybrid", vlb_weight=0.25)
    assert nothing.abs().max() == 0
    assert of_mean.abs().max() > 0
    torch.testing.assert_close(m, simple)
    torch.testing.assert_close(v, 0.25 * of_bound)


def test_vlb_estimates_the_sum_of_the_terms():
    """The mean over all timesteps of T · L_t."""
    schedule = NoiseSchedule.linear(12)
    x0 = images()[:1].expand(12, -1, -1, -1).contiguous()
    t, ids = torch.arange(12), torch.arange(12)
    result = DenoisingLoss(schedule, objective="vlb")(zero, x0, seed=1, sample_ids=ids, t=t)
    eps = noise(ids, seed=1, shape=x0.shape).double()
    x_t = reference.q_sample(x0.double(), t, schedule, eps)
    terms = reference.vlb_terms(x0.double(), x_t, 0 * x_t, t, schedule)
    assert result.loss.item() == pytest.approx(terms.sum().item(), rel=1e-5)


# Weights -------------------------------------------------------------------------------------


WEIGHTINGS = [
    ({"weighting": "min_snr"}, lambda snr: min(snr, 5.0) / snr),
    ({"weighting": "min_snr", "min_snr_gamma": 1.5}, lambda snr: min(snr, 1.5) / snr),
    ({"weighting": "p2"}, lambda snr: 1 / (1 + snr)),
    ({"weighting": "p2", "p2_gamma": 0.5, "p2_k": 2.0}, lambda snr: (2 + snr) ** -0.5),
]


@pytest.mark.parametrize(("choices", "of_eps"), WEIGHTINGS)
def test_weights_whatever_the_model_predicts(choices, of_eps):
    """A regression on ε with the paper's weight; the same model that predicts x_0 or v weighs the
    same, since its error is 1/√snr, or √((snr+1)/snr), of ε's."""
    alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    schedule = NoiseSchedule.linear(1000)
    x0, eps = images(), noise()
    x_t = reference.q_sample(x0.double(), T, schedule, eps.double())
    wrong = eps.double() + 0.1 * randn(SHAPE, seed=3).double()
    wrong_x0 = reference.x0_from_eps(x_t, wrong, T, schedule)
    plain = reference.regression(eps.double(), wrong)
    snr = (alphas_cumprod / (1 - alphas_cumprod))[T]
    expected = plain * torch.tensor([of_eps(s) for s in snr])
    for prediction in PREDICTIONS:
        output = reference.denoising_target(wrong_x0, wrong, T, schedule, prediction).float()
        loss = DenoisingLoss(schedule, prediction=prediction, **choices)
        result = loss(lambda x, t, m=output: m, x0, seed=7, sample_ids=IDS, t=T)
        # The error of x̂₀ is a small difference where the noise is small.
        torch.testing.assert_close(result.per_sample.double(), expected, rtol=3e-4, atol=0)
        torch.testing.assert_close(result.loss.double(), expected.mean(), rtol=3e-4, atol=0)


def test_weights_at_a_terminal_snr_of_0():
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    assert reference.min_snr_weights(schedule, "epsilon", 5.0)[-1] == 1
    assert reference.min_snr_weights(schedule, "v_prediction", 5.0)[-1] == 0
    assert reference.p2_weights(schedule, "epsilon", 2.0, 1.0)[-1] == 1
    with pytest.raises(ValueError, match="weight of timestep 999 is not finite: take p2_k above 0"):
        DenoisingLoss(schedule, weighting="p2", p2_k=0.0)


def test_hybrid_weighs_the_simple_part_alone():
    choices = {"objective": "hybrid", "variance": "learned_range"}
    plain, weighted = (
        DenoisingLoss(SCHEDULE, **choices, weighting=w)(
            lambda x, t: torch.zeros(6, 6, 5, 4), images(), seed=7, sample_ids=IDS, t=T
        ).per_sample
        for w in (None, "p2")
    )
    bound, simple = (
        DenoisingLoss(SCHEDULE, objective=o, variance="learned_range")(
            lambda x, t: torch.zeros(6, 6, 5, 4), images(), seed=7, sample_ids=IDS, t=T
        ).per_sample
        for o in ("vlb", "simple")
    )
    weights = reference.p2_weights(SCHEDULE, "epsilon", 1.0, 1.0)[T].float()
    torch.testing.assert_close(plain, simple + 0.001 * bound)
    torch.testing.assert_close(weighted, weights * simple + 0.001 * bound)


# Offset noise ------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["fixed_small", "learned"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_offset_noise(prediction, variance):
    """ε' = ε + s o: x_t has it, and the target too."""
    s, seen = 0.3, []
    o = randn((6, 3), seed=7, sample_ids=IDS, stream=5)[:, :, None, None].double()
    eps = noise().double() + s * o
    x0 = images().double()
    target = reference.denoising_target(x0, eps, T, SCHEDULE, prediction).float()
    half = torch.zeros(SHAPE if variance == "learned" else (6, 0, 5, 4))

    def model(x, t, error):
        seen.append(x)
        return torch.cat([target + error, half], 1)

    loss = DenoisingLoss(SCHEDULE, prediction=prediction, offset_noise=s, variance=variance)
    for error in (0.0, 0.5):
        result = loss(model, images(), seed=7, sample_ids=IDS, t=T, model_kwargs={"error": error})
        torch.testing.assert_close(
            result.per_sample, torch.full((6,), error**2), rtol=1e-5, atol=1e-10
        )
    x_t = reference.q_sample(x0, T, SCHEDULE, eps).float()
    torch.testing.assert_close(seen[0], x_t, rtol=1e-5, atol=1e-6)


def test_offset_noise_keeps_the_dtype_and_the_layout():
    seen = []

    def model(x, t):
        seen.append(x)
        return x

    loss = DenoisingLoss(SCHEDULE, offset_noise=0.1, dtype=torch.bfloat16)
    loss(model, images().to(memory_format=torch.channels_last), seed=1)
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    DenoisingLoss(SCHEDULE, offset_noise=0.1)(model, images(dtype=torch.uint8), seed=1)
    assert seen[1].dtype == torch.float32
