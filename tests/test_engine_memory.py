"""Where memory does not suffice for images of a shape; and a dtype that cannot be had."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_unet_variants import SMALL
from unet_weights import gap, randomised

from ddpm_fast import NoiseSchedule, Sampler, UNet, prepare
from ddpm_fast.backends import native
from ddpm_fast.nn import native_plan
from ddpm_fast.nn.native_plan import NativePlan
from ddpm_fast.nn.torch_plan import TorchPlan

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEDULE = NoiseSchedule.linear()
CPU = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't get 9 bytes"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomised(UNet(SMALL))


@pytest.fixture
def calls(model, monkeypatch):
    """How often a UNet itself is called."""
    seen, forward = [], UNet.forward

    def counted(self, *arguments, **kwargs):
        seen.append(arguments)
        return forward(self, *arguments, **kwargs)

    monkeypatch.setattr(UNet, "forward", counted)
    return seen


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(CPU),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    ],
)
def test_errors_of_memory_are_one(model, monkeypatch, error):
    plan, x = prepare(model), torch.zeros(2, 1, 8, 8)
    expected, trajectory = plan(x, 5), plan.trajectory([5])

    class Full:
        def __call__(self, *_):
            raise error

        reserve = __call__

    monkeypatch.setattr(plan._prepared, "executor", Full())
    said = str(error).split("\n")[0] or "MemoryError"
    for call in (
        lambda: plan(x, 5),
        lambda: trajectory.step(0, x),
        lambda: trajectory.reserve(x.shape),
    ):
        with pytest.raises(MemoryError) as told:
            call()
        assert str(told.value) == (
            f"not enough memory for images of [2, 1, 8, 8] in a plan: {said}"
        )
        # Whoever waits for PyTorch's own still gets it
        assert isinstance(told.value, type(error)) or type(error) is RuntimeError
        assert told.value.__context__ is None  # nothing keeps the frames of what was half made
    monkeypatch.undo()
    assert torch.equal(plan(x, 5), expected)


def test_other_errors_stay_what_they_are(model, monkeypatch):
    plan = prepare(model)

    def broken(*_):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(plan._prepared, "executor", broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        plan(torch.zeros(1, 1, 8, 8), 5)


@pytest.mark.skipif(native is None, reason="installed without compiled kernels")
def test_what_was_reserved_is_used(model, monkeypatch):
    """Also what was reserved inside of inference mode, by calls outside."""
    plan, x = prepare(model), torch.randn(11, 1, 8, 8)
    expected = prepare(model)(x, 5)
    trajectory = plan.trajectory([5])
    with torch.inference_mode():
        trajectory.reserve([11, 1, 8, 8])
    trajectory.reserve([0, 1, 8, 8])
    monkeypatch.setattr(native_plan, "_Program", None)
    assert torch.equal(trajectory.step(0, x), expected)
    assert torch.equal(trajectory.step(0, x[:8]), expected[:8])


def test_shapes_are_checked(model):
    reserve = prepare(model).trajectory([5]).reserve
    for shape, message in (([1, 1, 8, 6], "multiples of 4"), ([1, 8, 8], r"\[N, 1, H, W\]")):
        with pytest.raises(ValueError, match=message):
            reserve(shape)


def test_a_sampler_without_memory_for_a_shape(model, monkeypatch, calls):
    def reserve(self, shape):
        if shape[0] > 2:
            raise RuntimeError(CPU)

    for executor in (NativePlan, TorchPlan):
        monkeypatch.setattr(executor, "reserve", reserve)
    shape = (3, 1, 8, 8)
    expected = Sampler(model, SCHEDULE, num_steps=2, plan="off").sample(shape)
    calls.clear()
    sampler = Sampler(model, SCHEDULE, num_steps=2)
    words = r"without a plan: not enough memory for images of \[3, 1, 8, 8\] .*: \[enforce fail"
    with pytest.warns(UserWarning, match=words) as seen:
        assert torch.equal(sampler.sample(shape), expected)
    assert [each.filename for each in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sampler.sample(shape), expected)
        assert len(calls) == 4
        assert gap(sampler.sample((2, 1, 8, 8)), expected[:2]) < 1e-3
    assert len(calls) == 4  # the smaller shape was planned
    for plan in ("all", prepare(model)):
        sampler = Sampler(model, SCHEDULE, num_steps=2, plan=plan)
        with pytest.raises(MemoryError, match="not enough memory for images of"):
            sampler.sample(shape)
    assert len(calls) == 4


def test_a_dtype_that_is_not_obeyed_is_told(model, monkeypatch, calls):
    dtype, shape = torch.bfloat16, (1, 1, 8, 8)
    sampler = Sampler(model, SCHEDULE, num_steps=2, plan_dtype=dtype)
    words = r"plan_dtype=torch\.bfloat16 is not obeyed"
    with torch.autocast("cpu", dtype):
        with pytest.warns(UserWarning, match=f"{words}: .* as autocast is on") as seen:
            sampler.sample(shape)
        assert [each.filename for each in seen] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampler.sample(shape)
    assert len(calls) == 4
    sampler.sample(shape)
    assert len(calls) == 4
    model.conv_in.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=rf"without a plan \({words}\): .* forward hook"):
        sampler.sample(shape)
