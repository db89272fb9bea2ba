"""The CPU's executor of a UNet's plan: the UNet's function, whatever its parts and its sides."""

from __future__ import annotations

import pytest
import torch
from conftest import with_isa
from helpers import ISAS
from plan_errors import Reference, relative
from unet_weights import randomised

from ddpm_fast import UNet, UNetConfig
from ddpm_fast.backends import native
from ddpm_fast.nn import native_plan
from ddpm_fast.nn.native_plan import NativePlan
from ddpm_fast.nn.time_table import TimeRows

pytestmark = [
    pytest.mark.skipif(native is None, reason="installed without compiled kernels"),
    pytest.mark.usefixtures("one_thread"),
]
ALL = frozenset(NativePlan.REWRITES)
CONFIG = {"image_size": 8, "channels": (16, 32), "norm_groups": 8, "attention_resolutions": (4,)}
VARIANTS = {
    "plain": {},
    "scaled, by blocks": {
        "scale_shift": True,
        "downsample": ("resblock",),
        "upsample": ("resblock",),
    },
    "pooled, repeated": {"downsample": ("pool",), "upsample": ("nearest",), "num_heads": 4},
    "nothing in the middle": {"middle": "none", "downsample_padding": 1},
    "classes": {"num_classes": 3, "out_channels": 6},
}
OFF = [(), *((name,) for name in sorted(ALL - {"native_conv"})), ("winograd", "phase_upsample")]


def unet(name: str, **options) -> UNet:
    torch.manual_seed(0)  # of the biases, to which noise is added
    return randomised(UNet(UNetConfig(**CONFIG, **VARIANTS[name], **options)))


def executed(model: UNet, plan: NativePlan):
    rows = TimeRows(model, torch.float32, joined=True)
    return lambda x, t, labels=None: plan(x, rows(t, labels))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_each_rewrite_and_all_together(name):
    reference = Reference(unet(name), torch.float32, count=3)
    for off in OFF:
        plan = NativePlan(reference.model, ALL - set(off), torch.float32)
        function = executed(reference.model, plan)
        assert reference.error(function) <= 2 * reference.eager, off
        assert reference.error(function) <= 2 * reference.eager, (off, "memory used again")


@torch.no_grad()
def test_attention_without_a_norm():
    model = unet("plain", middle_norm_groups=0)
    model.mid_attention.qkv.weight.mul_(0.1)  # scores of random weights amplify every rounding
    reference = Reference(model, torch.float32, count=3)
    plan = NativePlan(reference.model, ALL, torch.float32)
    assert reference.error(executed(reference.model, plan)) <= 2 * reference.eager


@pytest.mark.parametrize("name", ISAS)
@torch.no_grad()
def test_on_each_instruction_set(name):
    with_isa(name)
    before = native.isa()
    native.set_isa(name)
    try:
        reference = Reference(unet("plain"), torch.float32, count=1)
        plan = NativePlan(reference.model, ALL, torch.float32)
        assert reference.error(executed(reference.model, plan)) <= 2 * reference.eager
    finally:
        native.set_isa(before)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_bits_depend_on_neither_batch_nor_threads(name, monkeypatch):
    """Through batches that are taken in parts, and layers whose threads share samples."""
    model = unet(name)
    x = torch.randn(7, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    t = torch.full((7,), 5)
    labels = torch.arange(7) % 4 if "num_classes" in VARIANTS[name] else None
    monkeypatch.setattr(native_plan, "_IMAGES", 3)
    plan, rows = (
        NativePlan(model, ALL, torch.float32),
        TimeRows(model, torch.float32, True)(t, labels),
    )
    together = plan(x, rows)
    assert together.is_contiguous()
    for i in range(7):
        one = slice(i, i + 1)
        alone = plan(x[one], [row[one] if len(row) > 1 else row for row in rows])
        assert torch.equal(alone, together[one])
    torch.set_num_threads(3)
    try:
        assert torch.equal(plan(x, rows), together)
    finally:
        torch.set_num_threads(1)


@torch.no_grad()
def test_a_timestep_for_each_sample():
    model = unet("plain")
    function = executed(model, NativePlan(model, ALL, torch.float32))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 999, 3, 500])
    exact = model.double()(x.double(), t)
    model.float()
    assert relative(function(x, t), exact) <= 2 * relative(model(x, t), exact)


@torch.no_grad()
def test_any_sides_that_can_be_halved_and_any_layout():
    model = unet("plain")
    plan = NativePlan(model, ALL, torch.float32)
    function = executed(model, plan)
    t = torch.tensor([7])
    for height, width in ((2, 2), (4, 14), (10, 6), (8, 8), (6, 6), (2, 2)):  # more than are kept
        x = torch.randn(1, height, width, 3).permute(0, 3, 1, 2)
        assert not x.is_contiguous()
        torch.testing.assert_close(function(x, t), model(x, t), rtol=0, atol=2e-5)
    assert len(plan._programs) == native_plan._PROGRAMS


@torch.no_grad()
def test_outputs_are_the_callers_own():
    model = unet("plain")
    function = executed(model, NativePlan(model, ALL, torch.float32))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1])
    first = function(x, t)
    kept = first.clone()
    function(-x, t)
    assert torch.equal(first, kept)


@torch.no_grad()
def test_nan_comes_through():
    model = unet("plain")
    function = executed(model, NativePlan(model, ALL, torch.float32))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1])
    clean = function(x, t)
    bad = x.clone()
    bad[1, 0, 3, 3] = torch.nan
    found = function(bad, t)
    assert found[1].isnan().all()
    assert torch.equal(found[0], clean[0])
    assert torch.equal(function(x, t), clean)  # nothing of it is left in the memory used again
