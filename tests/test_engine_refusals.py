"""What there is no plan of, by name; and what a plan does not take."""

from __future__ import annotations

import re

import pytest
import torch
from test_unet_variants import SMALL, VARIANTS
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from unet_weights import randomised

from ddpm_fast import UNet, prepare
from ddpm_fast.engine import REWRITES

pytestmark = pytest.mark.usefixtures("one_thread")


class LoRAConv(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv, self.extra = conv, nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.conv(x) + self.extra(x)


def hook(*_):
    return None


def replace_conv(model):
    model.mid_res1.conv1 = LoRAConv(model.mid_res1.conv1)


def forward_of_instance(model):
    model.mid_attention.forward = lambda x: x


def weight_as_attribute(model):
    weight = model.conv_in.weight.detach()
    del model.conv_in.weight
    model.conv_in.weight = weight


class Subclassed(nn.Parameter):
    pass


CHANGES = {
    "training": (lambda m: m.train(), "the model is in training mode: call .eval()"),
    "training inside": (lambda m: m.mid_res2.dropout.train(), "mid_res2.dropout is in training"),
    "hook": (
        lambda m: m.mid_attention.register_forward_hook(hook),
        "the forward hook hook on mid_attention",
    ),
    "pre-hook": (
        lambda m: m.conv_in.register_forward_pre_hook(hook),
        "the forward pre-hook hook on conv_in",
    ),
    "backward hook": (
        lambda m: m.register_full_backward_hook(hook),
        "the backward hook hook on the model",
    ),
    "backward pre-hook": (
        lambda m: m.up[0].register_full_backward_pre_hook(hook),
        r"the backward pre-hook hook on up\.0",
    ),
    "spectral norm of old": (
        lambda m: spectral_norm(m.conv_in),
        "the forward pre-hook SpectralNorm on conv_in",
    ),
    "parametrization": (
        lambda m: parametrizations.weight_norm(m.conv_out),
        "the parametrization of weight on conv_out",
    ),
    "another class": (
        replace_conv,
        r"mid_res1\.conv1 is a .*test_engine_refusals\.LoRAConv; a plan knows a Conv2d there",
    ),
    "one module more": (
        lambda m: m.mid_res1.add_module("adapter", nn.Identity()),
        r"leave out mid_res1\.adapter, a torch\.nn\.modules\.linear\.Identity",
    ),
    "one block less": (lambda m: m.up.__delitem__(2), r"up\.2 is missing"),
    "forward": (forward_of_instance, "the forward that mid_attention itself was given"),
    "offloaded": (lambda m: m.mid_res1.to("meta"), r"mid_res1\.norm1\.weight is offloaded"),
    "float64": (lambda m: m.double(), "is torch.float64: a plan takes float32, bfloat16, float16"),
    "dtypes": (
        lambda m: m.conv_out.half(),
        r"conv_out\.weight is torch\.float16 on cpu, and others",
    ),
    "option": (
        lambda m: setattr(m.conv_in, "padding_mode", "circular"),
        "padding_mode of conv_in is 'circular'; by its config it is 'zeros'",
    ),
    "eps": (lambda m: setattr(m.norm_out, "eps", 0.1), "eps of norm_out is 0.1"),
    "heads": (
        lambda m: setattr(m.mid_attention, "num_heads", 1),
        "num_heads of mid_attention is 1",
    ),
    "no bias": (lambda m: setattr(m.conv_in, "bias", None), "conv_in has parameters of shapes"),
    "no parameter": (weight_as_attribute, "conv_in has parameters of shapes"),
    "shape": (
        lambda m: setattr(m.conv_in, "weight", nn.Parameter(torch.zeros(8, 1, 5, 5))),
        "conv_in has parameters of shapes",
    ),
    "tensor subclass": (
        lambda m: setattr(m.conv_in, "weight", Subclassed(m.conv_in.weight.detach())),
        r"conv_in\.weight is a Subclassed: a plan takes ordinary tensors",
    ),
}


@pytest.fixture
def model():
    return randomised(UNet(SMALL))


@pytest.mark.parametrize("change", CHANGES)
def test_refused_by_name(model, change):
    """Before there is a plan, and when a plan finds it later."""
    apply, message = CHANGES[change]
    plan = prepare(model)
    x = torch.zeros(2, 1, 8, 8)
    apply(model)
    with pytest.raises(ValueError, match=message):
        prepare(model)
    if change not in ("option", "eps", "heads"):  # attributes are looked at once
        assert plan.stale
        with pytest.raises(ValueError, match=message):
            plan(x, 5)
        with pytest.raises(ValueError, match=message):
            plan.trajectory([5])
    with pytest.raises(ValueError, match=message):
        plan.refresh()


def test_global_hooks(model):
    plan = prepare(model)
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        with pytest.raises(ValueError, match="the global forward hook hook"):
            prepare(model)
        with pytest.raises(ValueError, match="the global forward hook hook"):
            plan(torch.zeros(2, 1, 8, 8), 5)
    finally:
        handle.remove()
    assert not plan.stale


def test_what_was_refused_is_taken_again(model):
    x = torch.randn(2, 1, 8, 8)
    plan = prepare(model)
    expected = plan(x, 5)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        plan(x, 5)
    model.eval()
    assert torch.equal(plan(x, 5), expected)


def test_other_classes(model):
    class Another(UNet):
        pass

    for other in (Another(SMALL).eval(), nn.Conv2d(1, 1, 1), torch.compile(model), lambda x, t: x):
        with pytest.raises(TypeError, match="a plan is of a UNet or of diffusers' UNet2DModel"):
            prepare(other)


@pytest.mark.parametrize("rewrites", ["fast", ["time_table", "fast"], [3]])
def test_unknown_names(model, rewrites):
    with pytest.raises(ValueError, match="rewrites must be among time_table, "):
        prepare(model, rewrites=rewrites)
    with pytest.raises(ValueError, match="rewrites must be among time_table, "):
        prepare(model, without=rewrites)
    with pytest.raises(TypeError, match="rewrites must be names; got int"):
        prepare(model, rewrites=3)
    for dtype in (torch.float64, torch.int8):
        with pytest.raises(ValueError, match="a plan's dtype must be float32, bfloat16 or float16"):
            prepare(model, dtype=dtype)
    assert len(set(REWRITES)) == len(REWRITES)


BAD_INPUTS = {
    "sides": (lambda x: (x[..., :6], 5), "sides must be multiples of 4; got [2, 1, 8, 6]"),
    "channels": (lambda x: (x.repeat(1, 2, 1, 1), 5), "must have shape [N, 1, H, W]; got [2, 2"),
    "dimensions": (lambda x: (x[0], 5), "must have shape [N, 1, H, W]; got [1, 8, 8]"),
    "labels": (lambda x: (x, 5, torch.zeros(2).long()), "class_labels given to a UNet without"),
    "t's length": (lambda x: (x, torch.zeros(3)), "t must have shape [2]; got [3]"),
    "t's dimensions": (lambda x: (x, torch.zeros(2, 1)), "t must have shape [2]; got [2, 1]"),
    "device": (lambda x: (x.to("meta"), 5), "x is on meta, and the plan on cpu"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs(model, case):
    make, message = BAD_INPUTS[case]
    x, t, *labels = make(torch.zeros(2, 1, 8, 8))
    plan = prepare(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(x, t, *labels)
    if not case.startswith("t's"):
        with pytest.raises(ValueError, match=re.escape(message)):
            plan.trajectory([5]).step(0, x, *labels)
    if case in ("sides", "channels", "dimensions", "labels"):  # as the model itself
        with pytest.raises(ValueError, match=re.escape(message)):
            model(x, torch.zeros(2), *labels)


def test_inputs_of_another_type(model):
    x, plan = torch.zeros(2, 1, 8, 8), prepare(model)
    with pytest.raises(TypeError, match=r"x must be floating point; got torch\.int64"):
        plan(x.long(), 5)
    with pytest.raises(TypeError, match="x must be a tensor; got list"):
        plan([1.0], 5)
    for t in (torch.zeros(2).bool(), 1j):
        with pytest.raises(TypeError, match="t must be integers or floats"):
            plan(x, t)
    for keyword in ("return_dict", "encoder_hidden_states"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            plan(x, 5, **{keyword: False})
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            plan.trajectory([5]).step(0, x, **{keyword: False})
    for row in (-1, 1):
        with pytest.raises(IndexError, match="row must lie in 0 … 0"):
            plan.trajectory([5]).step(row, x)
    with pytest.raises(ValueError, match=r"timesteps must have shape \[S\]"):
        plan.trajectory(5)


def test_bad_labels():
    model = randomised(UNet(VARIANTS["guided"]))
    plan, x = prepare(model), torch.zeros(2, 1, 8, 8)
    step = plan.trajectory([5]).step
    for call in (lambda labels: plan(x, 5, labels), lambda labels: step(0, x, labels)):
        with pytest.raises(ValueError, match="must be given to a UNet that has no null class"):
            call(None)
        with pytest.raises(ValueError, match="class_labels must lie in 0 … 2; got 0 … 3"):
            call(torch.tensor([0, 3]))
        with pytest.raises(ValueError, match=r"class_labels must have shape \[2\]; got \[3\]"):
            call(torch.zeros(3).long())
        with pytest.raises(TypeError, match=r"class_labels must be int64; got torch\.float32"):
            call(torch.zeros(2))
        with pytest.raises(TypeError, match="class_labels must be a tensor; got list"):
            call([0, 1])
