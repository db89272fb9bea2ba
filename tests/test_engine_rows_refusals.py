"""Rows that there are not, and samples that cannot share a call."""

from __future__ import annotations

import pytest
import torch
from test_engine import model_of
from test_engine_rows import images, on_device  # noqa: F401

from ddpm_fast import prepare
from ddpm_fast.engine import mixed_step

pytestmark = pytest.mark.usefixtures("one_thread")


def test_wrong_rows():
    model = model_of("ho")
    x = images(model, 2)
    step = prepare(model).trajectory([5, 3]).step
    for row in (2, -1, torch.tensor(2), torch.tensor([-1]), torch.tensor([0, 2])):
        with pytest.raises(IndexError, match="row must lie in 0 … 1; got"):
            step(row, x)
    for row in (0.5, "0", None, [0, 1]):
        with pytest.raises(TypeError, match="row must be an integer, the timestep's place in"):
            step(row, x)
    for row in (torch.tensor(0.0), torch.tensor([0, 1], dtype=torch.int32), torch.tensor(True)):
        with pytest.raises(TypeError, match="row must be int64 where it is a tensor; got torch"):
            step(row, x)
    for shape in ((3,), (2, 1), (1, 1), (0,)):
        with pytest.raises(ValueError, match=r"row must be 0-d or have shape \[2\]; got \["):
            step(torch.zeros(shape, dtype=torch.int64), x)
    with pytest.raises(ValueError, match="row is on meta, and the plan on cpu"):
        step(torch.zeros(2, dtype=torch.int64, device="meta"), x)
    for keyword in ("return_dict", "labels"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            step(torch.tensor(0), x, **{keyword: None})


def test_wrong_rows_on_a_device(on_device):  # noqa: F811
    none = prepare(model_of("ho")).trajectory([])
    with pytest.raises(IndexError, match="this one has no timesteps"):
        none.step(torch.tensor(0), torch.zeros(1, 1, 8, 8))


def test_wrong_places():
    model = model_of("ho")
    plan, x = prepare(model), images(model, 2)
    one = plan.trajectory([5, 3])
    for places in ([], ()):
        with pytest.raises(ValueError, match="places must have one pair a sample; got none"):
            mixed_step(places, x[:0])
    with pytest.raises(ValueError, match="places must be 2, one a sample; got 1"):
        mixed_step([(one, 0)], x)
    for place in (one, 0, (one,), (0, one), (plan, 0), "ab"):
        with pytest.raises(TypeError, match=r"be pairs of a Trajectory and a row; got .* at 1"):
            mixed_step([(one, 0), place], x)
    for row in (0.5, None):
        with pytest.raises(TypeError, match="row must be an integer"):
            mixed_step([(one, 0), (one, row)], x)
    for row in (-1, 2):
        with pytest.raises(IndexError, match=f"row must lie in 0 … 1; got {row}"):
            mixed_step([(one, 0), (one, row)], x)
    for keyword in ("return_dict", "labels"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            mixed_step([(one, 0), (one, 1)], x, **{keyword: None})
    with pytest.raises(ValueError, match="sides must be multiples of 4"):
        mixed_step([(one, 0), (one, 1)], x[..., :6])
    with pytest.raises(ValueError, match="class_labels given to a UNet without"):
        mixed_step([(one, 0), (one, 1)], x, torch.tensor([0, 1]))


def test_trajectories_of_several_plans():
    model = model_of("ho", seed=1)
    plan, x = prepare(model), images(model, 2)
    one = plan.trajectory([5, 3])
    again = plan.trajectory([7])
    assert one.family == again.family
    other = prepare(model).trajectory([5])
    model.conv_out.bias.data.add_(0)  # nothing has changed
    assert plan.trajectory([7]).family == one.family
    with torch.no_grad():
        model.conv_out.bias.add_(1)
    changed = plan.trajectory([5])
    for second in (other, changed):
        assert second.family != one.family
        with pytest.raises(ValueError, match="of one plan, of the same weights; sample 1's is of"):
            mixed_step([(one, 0), (second, 0)], x)
    assert mixed_step([(one, 0), (again, 0)], x).shape == x.shape
