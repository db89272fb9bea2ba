"""The UNets of other implementations: what each option changes, training, saving, and configs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest
import torch
from tiny_run import write_run
from unet_weights import assert_same_weights, gap, randomised

from ddpm_fast import UNet, UNetConfig
from ddpm_fast.nn import checkpoint
from ddpm_fast.nn.blocks import timestep_embedding
from ddpm_fast.training.checkpoints import STATE, load_model
from ddpm_fast.training.parallel import checkpoint_activations

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = UNetConfig(
    image_size=8,
    in_channels=1,
    channels=(8, 16, 16),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_heads=2,
    norm_groups=4,
    dropout=0.0,
)
GUIDED = replace(
    SMALL,
    scale_shift=True,
    cosine_first=True,
    freq_shift=0,
    downsample=("resblock",),
    upsample=("resblock",),
    head_channels=4,
    num_classes=3,
    null_class=False,
)
VARIANTS = {
    "ho": SMALL,
    "guided": GUIDED,
    "pooled": replace(SMALL, downsample=("pool",), upsample=("nearest",), middle="residual"),
    "mixed": replace(SMALL, downsample=("conv", "resblock"), upsample=("nearest", "resblock")),
    "symmetric": replace(SMALL, downsample_padding=1, middle="none", attention_up_resolutions=(8,)),
    "wide embedding": replace(SMALL, time_channels=12, embedding_channels=20, num_heads_up=4),
    "no norm": replace(SMALL, middle_norm_groups=0, norm_eps=1e-3),
}
# The fields of a config.json before the other implementations' options
FIRST_FIELDS = [field.name for field in dataclasses.fields(UNetConfig)][:12]


@pytest.fixture(params=VARIANTS)
def model(request):
    return randomised(UNet(VARIANTS[request.param]))


def inputs(model, count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    side, classes = model.config.image_size, model.config.embedded_classes
    x = torch.randn(count, model.config.in_channels, side, side, generator=generator)
    t = torch.tensor([0, 500, 999])[:count]
    return x.to(dtype), t, *([] if classes is None else [torch.arange(count) % classes])


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = UNet.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs(model)), model(*inputs(model)))


def test_memory_formats_and_precisions(model):
    x, *rest = inputs(model)
    with torch.no_grad():
        expected = model(x, *rest)
        last = model.to(memory_format=torch.channels_last)
        found = last(x.contiguous(memory_format=torch.channels_last), *rest)
        assert gap(found, expected) < 1e-5
        double = model.double()(x.double(), *rest)
        assert gap(expected.double(), double) < 1e-5
        assert gap(model.bfloat16()(x.bfloat16(), *rest).double(), double) < 0.1


@pytest.mark.parametrize("model", ["guided", "pooled"], indirect=True)
def test_traced_without_a_break(model):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert gap(compiled(*inputs(model)), model(*inputs(model))) < 1e-6


def gradients(model, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    model.train()(*inputs(model)).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_every_parameter_learns(model):
    for name, gradient in gradients(model).items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name


def test_activation_checkpointing_changes_no_gradient(model):
    expected = gradients(model)
    checkpoint_activations(model)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


def test_gradients_are_those_of_diffusers():
    pytest.importorskip("diffusers")
    ours = randomised(UNet(replace(GUIDED, norm_eps=1e-5))).double()
    theirs = ours.to_diffusers()
    x, t, labels = inputs(ours, dtype=torch.float64)
    x.requires_grad_()
    found = torch.autograd.grad(ours(x, t, labels).square().sum(), [x, *ours.parameters()])
    loss = theirs(x, t, labels).sample.square().sum()
    expected = torch.autograd.grad(loss, [x, *theirs.parameters()])
    assert gap(found[0], expected[0]) < 1e-12
    norms = [sum(g.square().sum() for g in part[1:]).sqrt() for part in (found, expected)]
    assert abs(norms[0] / norms[1] - 1) < 1e-12


def test_dropout_is_of_training():
    model = randomised(UNet(replace(GUIDED, dropout=0.5)))
    batch = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(*batch), model(*batch))
        model.train()
        assert not torch.equal(model(*batch), model(*batch))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_the_null_class(dtype):
    model = randomised(UNet(replace(SMALL, num_classes=3)))
    x, t, _ = inputs(model)
    t = t.to(dtype)
    with torch.no_grad():
        assert torch.equal(model(x, t), model(x, t, torch.full((3,), 3)))


def test_without_a_null_class():
    model = randomised(UNet(replace(SMALL, num_classes=3, null_class=False, label_dropout=0.9)))
    assert model.class_embedding.num_embeddings == 3
    x, t, labels = inputs(model)
    with torch.no_grad():
        assert torch.equal(model.train()(x, t, labels), model.eval()(x, t, labels))
    with pytest.raises(ValueError, match="class_labels must be given to a UNet that has no null"):
        model(x, t)
    with pytest.raises(ValueError, match="class_labels must lie in 0 … 2; got 0 … 3"):
        model(x, t, torch.tensor([0, 1, 3]))


@pytest.mark.parametrize("cosine_first", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_embeddings_have_the_bits_of_diffusers(cosine_first, shift):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.cat([torch.arange(1000.0), torch.rand(1000) * 1000])
    for width in (6, 64, 128, 192):
        found = timestep_embedding(t, width, cosine_first=cosine_first, freq_shift=shift)
        expected = embeddings.get_timestep_embedding(t, width, cosine_first, shift)
        assert torch.equal(found, expected)


def first_config(config):
    """As a version before the other implementations' options had it."""
    old = dataclasses.make_dataclass("UNetConfig", FIRST_FIELDS)
    return old(**{name: getattr(config, name) for name in FIRST_FIELDS})


def test_checkpoints_of_earlier_versions(tmp_path):
    model = randomised(UNet(SMALL))
    checkpoint.write(tmp_path, model.state_dict(), "UNet", first_config(SMALL))
    text = (tmp_path / "config.json").read_text()
    assert list(json.loads(text)["config"]) == FIRST_FIELDS
    loaded = UNet.from_pretrained(tmp_path)
    assert loaded.config == SMALL
    assert_same_weights(loaded, model)
    (tmp_path / "config.json").write_text(text.replace('"num_heads": 2', '"num_heads": 4'))
    with pytest.raises(ValueError, match="were not saved together"):
        UNet.from_pretrained(tmp_path)


def test_runs_of_earlier_versions(tmp_path):
    folder = write_run(tmp_path) / "checkpoints" / "step-00000200"
    expected = load_model(tmp_path)
    state = json.loads((folder / STATE).read_text())
    unet = state["config"]["unet"]
    state["config"]["unet"] = {name: unet[name] for name in FIRST_FIELDS}
    assert unet != state["config"]["unet"]
    (folder / STATE).write_text(json.dumps(state))
    assert load_model(tmp_path).config == expected.config
    assert_same_weights(load_model(tmp_path).model, expected.model)


def test_config_from_json_lists():
    values = json.loads(json.dumps(dataclasses.asdict(VARIANTS["mixed"])))
    assert isinstance(values["downsample"], list)
    assert UNetConfig(**values) == VARIANTS["mixed"]
    hash(UNetConfig(**values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsample": ("conv",) * 3}, r"downsample must name one kind, or one a halving \(2\)"),
        ({"upsample": ()}, "upsample must name one kind"),
        ({"upsample": ("pool",)}, r"upsample must be of conv, resblock, nearest; got \['pool'\]"),
        ({"downsample": "conv"}, "downsample must be of conv, resblock, pool"),
        ({"downsample_padding": 2}, "downsample_padding must be 0 or 1; got 2"),
        ({"middle": "cross"}, "middle must be one of attention, residual, none; got 'cross'"),
        ({"middle_norm_groups": 3}, "middle_norm_groups must divide 16, or be 0 or None; got 3"),
        ({"middle_norm_groups": -1}, "middle_norm_groups must divide 16"),
        ({"attention_up_resolutions": (5,)}, r"attention_up_resolutions must be among \[8, 4, 2\]"),
        ({"head_channels": 3}, "head_channels must divide .*; got 3 for 16"),
        ({"head_channels": 32}, "head_channels must divide .*; got 32 for 16"),
        ({"num_heads_up": 3}, "num_heads_up must divide the channels; got 3 for 16"),
        ({"head_channels": 0}, "head_channels must be at least 1, or None; got 0"),
        ({"time_channels": 5}, "time_channels must be an even number; got 5"),
        ({"channels": (4,), "norm_groups": 1, "freq_shift": 2}, r"freq_shift must lie in 0 … 1 fo"),
        ({"freq_shift": -1}, "freq_shift must lie in 0 … 3 for 8 channels; got -1"),
        ({"embedding_channels": 0}, "embedding_channels must be at least 1, or None"),
    ],
)
def test_bad_configs(change, message):
    change = {"attention_resolutions": (), **change} if "channels" in change else change
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_heads_by_their_channels():
    """Widths that num_heads does not divide are no matter then."""
    config = replace(SMALL, channels=(12, 24, 24), num_heads=5, head_channels=8, norm_groups=4)
    assert [config.heads(width, up) for width, up in config.attention_widths()] == [3, 3, 3]
    randomised(UNet(config))(*inputs(UNet(config)))
