"""A plan computes what its model computes: as close to the float64 forward pass as the model is."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import DTYPES
from hypothesis import given, settings
from plan_errors import Reference, T, sample_of
from test_unet_variants import SMALL as HO
from test_unet_variants import VARIANTS
from test_weights_diffusers import unet2d_options
from unet2d_models import SMALL as THEIRS
from unet2d_models import theirs_of
from unet_weights import gap, randomised

from ddpm_fast import UNet, prepare
from ddpm_fast.engine import REWRITES
from ddpm_fast.nn import torch_plan

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = {
    **VARIANTS,
    "classes": replace(HO, num_classes=3, channels=(8, 16)),
    "rectangles": replace(HO, in_channels=3, out_channels=6, channels=(12, 8)),
}
DIFFUSERS = {
    "theirs": THEIRS,
    "theirs scaled": {
        **THEIRS,
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "num_class_embeds": 3,
        "downsample_padding": 0,
        "attn_norm_num_groups": 2,
    },
}
NATIVE = (
    "native_conv",
    "winograd",
    "native_attention",
    "joined_skips",
)  # that mean something with the first alone


@cache
def model_of(name, seed=0):
    torch.manual_seed(seed)
    if name in DIFFUSERS:
        pytest.importorskip("diffusers")
        return theirs_of(DIFFUSERS[name], seed)
    model = randomised(UNet(OURS[name]), seed)
    if name == "no norm":  # or its attention would pick single pixels, by a rounding here and there
        with torch.no_grad():
            model.mid_attention.qkv.weight.mul_(0.1)
    return model


@cache
def reference_of(name, dtype):
    return Reference(model_of(name), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*OURS, *DIFFUSERS])
def test_is_the_function_of_the_model(name, dtype):
    reference = reference_of(name, dtype)
    plan = prepare(reference.model)
    assert plan.dtype == dtype
    assert reference.error(plan) <= 2 * reference.eager
    assert reference.error_of_steps(plan.trajectory(T)) <= 2 * reference.eager
    bare = prepare(reference.model, rewrites=())
    assert bare.rewrites == ()
    assert reference.error_of_steps(bare.trajectory(T)) <= 2 * reference.eager


@pytest.mark.parametrize(
    ("rewrite", "dtype", "name"),
    [
        *[(r, torch.float32, name) for r in REWRITES for name in ("mixed", "theirs")],
        *[(r, dtype, "mixed") for r in REWRITES if r not in NATIVE for dtype in DTYPES[1:]],
    ],
)
def test_each_rewrite_alone_and_left_out(rewrite, dtype, name):
    reference = reference_of(name, dtype)
    alone = ("native_conv", rewrite) if rewrite in NATIVE else (rewrite,)
    for plan in (
        prepare(reference.model, rewrites=alone),
        prepare(reference.model, without=rewrite),
    ):
        assert reference.error_of_steps(plan.trajectory(T)) <= 2 * reference.eager


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["mixed", "guided"])
def test_as_on_a_gpu(name, dtype, monkeypatch):
    """Where a convolution's bias is left to the norm after it."""
    made = torch_plan.Options
    monkeypatch.setattr(torch_plan, "Options", lambda names, dtype, _: made(names, dtype, True))
    reference = reference_of(name, dtype)
    plan = prepare(reference.model, without="native_conv")
    assert reference.error(plan) <= 2 * reference.eager
    assert reference.error_of_steps(plan.trajectory(T)) <= 2 * reference.eager


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(options=unet2d_options())
def test_any_model_of_diffusers(options):
    reference = Reference(theirs_of(options), torch.float32)
    for without in ((), "native_conv"):
        plan = prepare(reference.model, without=without)
        # Where groups hardly vary the eager pass is lucky at times
        assert reference.error(plan) <= 2 * reference.eager + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_another_dtype(dtype):
    """A float32 model planned in fewer bits: no worse than the model converted."""
    reference = reference_of("guided", dtype)
    plan = prepare(copy.deepcopy(reference.model).float(), dtype=dtype)
    assert plan.dtype == dtype
    assert reference.error(plan) <= 2 * reference.eager
    assert prepare(reference.model, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("name", ["ho", "classes", "guided", "theirs"])
def test_arguments_as_the_model_takes_them(name):
    model = model_of(name)
    plan = prepare(model)
    reference = reference_of(name, torch.float32)
    x, labels = reference.images[0][:4], [label[:4] for label in reference._labels()]
    with torch.no_grad():

        def expected(x, t, *labels):
            return sample_of(model(x, t, *labels))

        t = torch.tensor([3, 3, 500, 999])
        assert gap(plan(x, t, *labels), expected(x, t, *labels)) < 1e-5
        assert gap(plan(x, t * 1.0, *labels), expected(x, t, *labels)) < 1e-5
        assert gap(plan(x, t + 0.25, *labels), expected(x, t + 0.25, *labels)) < 1e-5
        same = expected(x, torch.full((4,), 7), *labels)
        for t in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7]).expand(4)):
            assert gap(plan(x, t, *labels), same) < 1e-5
        one = [label[:1] for label in labels]
        assert gap(plan(x[:1], 7, *one), expected(x[:1], torch.tensor([7]), *one)) < 1e-5
        wide = torch.cat([x, x], 3)
        found = plan(wide.to(memory_format=torch.channels_last), 7, *labels)
        assert gap(found, expected(wide, torch.full((4,), 7), *labels)) < 1e-5
        assert found.is_contiguous()
        assert gap(plan.trajectory([7.0]).step(0, x, *labels), same) < 1e-5
        assert plan(x[:0], t[:0], *[label[:0] for label in labels]).shape == same[:0].shape


def test_the_null_class():
    """None is the null class of all samples, by call and by step."""
    model = model_of("classes")
    x = reference_of("classes", torch.float32).images[0][:4]
    plan, null = prepare(model), torch.full((4,), 3)
    with torch.no_grad():
        expected = model(x, torch.full((4,), 5), null)
    trajectory = plan.trajectory(range(999, -1, -1))  # several parts of the table
    for labels in (None, null, null[:1]):
        assert gap(plan(x, 5, labels), expected) < 1e-5
        assert gap(trajectory.step(994, x, labels), expected) < 1e-5
    for row in (0, 63, 64, 999, 0):
        with torch.no_grad():
            expected = model(x, torch.full((4,), 999 - row))
        assert gap(trajectory.step(row, x), expected) < 1e-5


def test_the_model_stays_as_it_is():
    model = model_of("ho")
    before = {
        name: (t, t.data_ptr(), t._version, t.clone()) for name, t in model.state_dict().items()
    }
    state = torch.random.get_rng_state()
    plan = prepare(model)
    x = torch.randn(2, 1, 8, 8)
    torch.random.set_rng_state(state)
    first = plan(x, 3)
    assert torch.equal(state, torch.random.get_rng_state())
    kept = first.clone()
    plan(-x, 900)
    assert torch.equal(first, kept)  # each output is a tensor of its own
    for name, tensor in model.state_dict().items():
        _, pointer, version, values = before[name]
        assert (tensor.data_ptr(), tensor._version) == (pointer, version)
        assert torch.equal(tensor, values)


def test_weights_of_diffusers_are_shared():
    pytest.importorskip("diffusers")
    from ddpm_fast.nn.prepared import _shared

    theirs = model_of("theirs")
    pointers = {p.data_ptr() for p in theirs.parameters()}
    for name, parameter in _shared(theirs).named_parameters():
        assert (parameter.data_ptr() in pointers) == ("qkv" not in name), name


def test_from_several_threads():
    plan = prepare(model_of("ho"))
    images = [torch.randn(2, 1, 8, 8) for _ in range(4)]
    expected = [plan(x, 5) for x in images]
    wrong = []

    def work(x, y):
        for _ in range(20):
            if not torch.equal(plan(x, 5), y):
                wrong.append(x)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(images, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inside_inference_mode_and_autocast():
    model = model_of("guided")
    x, labels = reference_of("guided", torch.float32).images[0][:4], torch.arange(4) % 3
    expected = prepare(model)(x, 5, labels)
    with torch.inference_mode():
        plan = prepare(model)
        assert torch.equal(plan(x, 5, labels), expected)
    assert not plan(x, 5, labels).is_inference()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plan(x, 5, labels), expected)


def test_default_devices_and_dtypes_mean_nothing():
    model, x = model_of("classes"), torch.zeros(1, 1, 8, 8)
    expected = prepare(model).trajectory([5]).step(0, x)
    with torch.device("meta"):
        assert torch.equal(prepare(model).trajectory([5]).step(0, x), expected)
        assert torch.equal(prepare(model)(x, 5), prepare(model)(x, 5))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(prepare(model).trajectory([5.0]).step(0, x), expected)
        assert torch.equal(prepare(model, dtype=torch.bfloat16)(x, 5).isnan(), x.isnan())
    finally:
        torch.set_default_dtype(torch.float32)


def test_names_in_effect():
    plan = prepare(model_of("guided"), without=["native_conv", "fused_qkv"])
    assert plan.rewrites == ("time_table", "group_norm_silu", "phase_upsample")
    assert plan.device == torch.device("cpu")
    half = prepare(model_of("guided"), dtype=torch.bfloat16)
    assert "channels_last" in half.rewrites
    assert not set(NATIVE) & set(half.rewrites)
    assert prepare(model_of("guided"), rewrites="time_table").rewrites == ("time_table",)
