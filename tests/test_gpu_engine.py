"""The plan of a UNet on a GPU: the model's function in each dtype, and nothing waits."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_backends import backend_in_use  # noqa: F401
from helpers import DTYPES
from plan_errors import Reference, relative
from unet_weights import randomised

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, prepare

pytestmark = pytest.mark.gpu

SHAPE = (4, 3, 16, 16)
CONFIG = {"image_size": 16, "channels": (64, 128), "attention_resolutions": (8,)}
VARIANTS = {
    "plain": {},
    "scaled, by blocks": {
        "scale_shift": True,
        "downsample": ("resblock",),
        "upsample": ("resblock",),
        "head_channels": 32,
    },
    "classes": {"num_classes": 10, "out_channels": 6},
}


@pytest.fixture
def full_float32():
    """PyTorch's convolutions round to tf32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def unet(name: str) -> UNet:
    torch.manual_seed(0)  # of the biases, to which noise is added
    return randomised(UNet(UNetConfig(**CONFIG, **VARIANTS[name])))


class OnGPU(Reference):
    """Float64 on the GPU, too."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__(unet(name), dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_plan_is_the_function_of_the_model(name, dtype, full_float32):
    reference = OnGPU(name, dtype)
    plan = prepare(reference.model)
    assert "group_norm_silu" in plan.rewrites
    assert reference.error(plan) <= 2 * reference.eager
    for rewrite in plan.rewrites:
        without = prepare(reference.model, without=[rewrite])
        assert reference.error(without) <= 2 * reference.eager, rewrite


def test_plan_rounds_to_tf32_as_torch_is_told():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        reference = OnGPU("plain", torch.float32)
        assert reference.error(prepare(reference.model)) <= 2 * reference.eager
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", ["plain", "scaled, by blocks"])
def test_plan_samples_what_the_cpu_does(name, full_float32):
    model, schedule = unet(name), NoiseSchedule.linear()
    expected = Sampler(model, schedule, num_steps=3).sample(SHAPE, seed=7)
    found = Sampler(copy.deepcopy(model).cuda(), schedule, num_steps=3).sample(SHAPE, seed=7)
    assert found.is_cuda
    assert relative(found.cpu(), expected.double()) < 1e-4


def test_plan_waits_for_nothing():
    model = unet("plain").cuda().bfloat16()
    sampler = Sampler(model, NoiseSchedule.linear(), num_steps=3)
    sampler.sample(SHAPE, seed=7)  # makes the plan
    steps = sampler.stream(SHAPE, seed=8)
    next(steps)  # and this the table
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = next(steps).x
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


def test_plan_notices_weights_that_were_changed():
    model = unet("plain").cuda()
    plan, x, t = prepare(model), torch.randn(SHAPE, device="cuda"), torch.full((4,), 9).cuda()
    before = plan(x, t)
    with torch.no_grad():
        model.conv_out.weight.mul_(2)
        model.conv_out.bias.mul_(2)
    torch.testing.assert_close(plan(x, t), 2 * before, rtol=1e-3, atol=1e-3)
