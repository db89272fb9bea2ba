"""DenoisingLoss: choices, arguments, models and states that are refused."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import IDS, SCHEDULE, T, images, zero

from ddpm_fast import DenoisingLoss, NoiseSchedule


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"prediction": "noise"}, "prediction must be one of 'epsilon', 'sample', 'v_prediction'"),
        ({"variance": "none"}, "variance must be one of"),
        ({"objective": "l2"}, "objective must be one of 'simple', 'vlb', 'hybrid'; got 'l2'"),
        ({"weighting": "snr"}, "weighting must be one of 'min_snr', 'p2'; got 'snr'"),
        ({"timestep_sampling": "even"}, "timestep_sampling must be one of 'uniform', 'antithetic'"),
        ({"weighting": "min_snr", "min_snr_gamma": 0}, "min_snr_gamma must be finite and above 0"),
        ({"weighting": "p2", "p2_gamma": -1.0}, "p2_gamma must be finite and above 0; got -1"),
        ({"weighting": "p2", "p2_k": -1.0}, "p2_k must be finite and at least 0; got -1"),
        ({"weighting": "p2", "objective": "vlb"}, "the bound's own weights; got weighting='p2'"),
        ({"objective": "hybrid"}, "trains a variance 'learned' or 'learned_range'; got variance="),
        ({"vlb_weight": math.nan}, "vlb_weight must be finite"),
        ({"offset_noise": -0.1}, "offset_noise must be finite and at least 0; got -0.1"),
        ({"offset_noise": 0.1, "objective": "vlb"}, "offset_noise belongs to objective='simple'"),
        (
            {"offset_noise": 0.1, "objective": "hybrid", "variance": "learned"},
            "offset_noise belongs to objective='simple'",
        ),
        ({"label_dropout": 0.1}, "label_dropout needs null_label"),
        ({"label_dropout": 1.1, "null_label": 0}, "label_dropout must be .* at most 1; got 1.1"),
        ({"group_size": 0}, "group_size must lie in 1 … 2"),
    ],
)
def test_choices_that_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        DenoisingLoss(SCHEDULE, **choices)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"schedule": [0.1]}, "schedule must be a NoiseSchedule; got list"),
        ({"min_snr_gamma": "5", "weighting": "min_snr"}, "min_snr_gamma must be a number; got '5'"),
        ({"group_size": 2.5}, "group_size must be an integer; got 2.5"),
        ({"label_dropout": 0.1, "null_label": 1.5}, "null_label must be an integer; got 1.5"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16, float16 or None"),
    ],
)
def test_choices_of_another_type_are_refused(choices, message):
    with pytest.raises(TypeError, match=message):
        DenoisingLoss(**{"schedule": SCHEDULE, **choices})


def test_a_schedule_without_a_bound_is_refused_for_the_bound():
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    with pytest.raises(ValueError, match="alphas_cumprod is 0 there"):
        DenoisingLoss(schedule, objective="vlb")
    DenoisingLoss(schedule, objective="vlb", prediction="v_prediction")
    DenoisingLoss(schedule)


def fails(error, message, model=zero, x0=None, choices=None, **arguments):
    loss = DenoisingLoss(SCHEDULE, **(choices or {}))
    with pytest.raises(error, match=message):
        loss(model, images() if x0 is None else x0, **{"seed": 0, **arguments})
    assert loss.samples_seen == 0  # a batch that failed is not consumed


def test_bad_arguments():
    fails(TypeError, "model must be callable; got int", model=3)
    fails(TypeError, "x0 must be a tensor; got list", x0=[0.0])
    fails(TypeError, "x0 must be float32, bfloat16, float16, uint8; got torch.int64", x0=T[:, None])
    fails(TypeError, "got torch.float64", x0=images().double())
    fails(ValueError, r"x0 must be \[N, C, …\] with N at least 1; got \[6\]", x0=torch.zeros(6))
    fails(ValueError, r"N at least 1; got \[0, 3\]", x0=torch.zeros(0, 3))
    fails(ValueError, "x0 requires grad", x0=images().requires_grad_())
    fails(ValueError, "seed must lie in", seed=-1)
    fails(TypeError, "seed must be an integer", seed=1.5)
    fails(ValueError, r"sample_ids must have shape \[6\]; got \[5\]", sample_ids=range(5))
    fails(ValueError, "sample_ids must lie in", sample_ids=range(-1, 5))
    fails(ValueError, "sample_ids must not be negative; got -1", sample_ids=IDS - 1)
    fails(ValueError, r"t must have shape \[6\]; got \[1\]", t=torch.zeros(1, dtype=torch.int64))
    fails(ValueError, "t must lie in 0 … 999; got 0 … 1000", t=T + torch.tensor([0, 0, 0, 0, 2, 0]))
    fails(ValueError, "t must lie in 0 … 999; got -1", t=-1)
    fails(TypeError, "t must be int64; got torch.float32", t=T.float())


def test_bad_models():
    fails(TypeError, "object whose .sample is one, or a tuple that begins with one; got NoneType",
          model=lambda x, t: None)  # fmt: skip
    fails(ValueError, r"model must return a float tensor of shape \[6, 3, 5, 4\]; got",
          model=lambda x, t: x[:, :2])  # fmt: skip
    fails(ValueError, r"shape \[6, 6, 5, 4\], twice x's channels for a learned variance; got",
          model=zero, choices={"variance": "learned"})  # fmt: skip
    fails(ValueError, "float tensor .* torch.int64", model=lambda x, t: x.long())
    fails(ValueError, "float tensor .* torch.float64", model=lambda x, t: x.double())

    def broken(x, t):
        raise RuntimeError("out of memory, say")

    fails(RuntimeError, "out of memory, say", model=broken)


def test_bad_labels():
    choices = {"label_dropout": 0.1, "null_label": 10}
    named = r"model_kwargs\['class_labels'\]"
    fails(TypeError, f"label_dropout needs {named}, integers .*; got NoneType", choices=choices)
    fails(TypeError, "got torch.float32", choices=choices, model_kwargs={"class_labels": T.float()})
    fails(ValueError, f"{named} must have shape .6., on cpu; got .5.", choices=choices,
          model_kwargs={"class_labels": T[:5]})  # fmt: skip


def test_bad_state():
    loss = DenoisingLoss(NoiseSchedule.linear(5), timestep_sampling="loss_second_moment")
    state = loss.state_dict()

    def fails(message, new):
        with pytest.raises(ValueError, match=message):
            loss.load_state_dict(new)

    without = {k: v for k, v in state.items() if k != "loss_counts"}
    fails("must have samples_seen, loss_history, loss_counts, .* got samples_seen, loss", without)
    fails("got nothing", {})
    other = DenoisingLoss(NoiseSchedule.linear(6), timestep_sampling="loss_second_moment")
    fails(r"loss_history must have shape \[5, 10\], for a schedule of 5 steps; got \[6, 10\]",
          other.state_dict())  # fmt: skip
    fails("samples_seen must not be negative; got -1", {**state, "samples_seen": torch.tensor(-1)})
    fails(r"samples_seen must have shape \[\].*; got int", {**state, "samples_seen": 3})
    with pytest.raises(ValueError, match="must have samples_seen, as timestep_sampling='uniform'"):
        DenoisingLoss(NoiseSchedule.linear(5)).load_state_dict(state)
