"""Configs of runs: JSON there and back, errors that name the field, presets."""

from __future__ import annotations

import json

import pytest

from ddpm_fast import UNet
from ddpm_fast.training.config import DataConfig, RunConfig, ScheduleConfig
from ddpm_fast.training.fields import ConfigError, merged
from ddpm_fast.training.presets import PRESETS, completed, preset

DATA = {"data": {"path": "images"}}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_there_and_back(name):
    shape = {"digits": (1, 8, 8), "image-256": (3, 256, 256)}.get(name, (3, 32, 32))
    config = completed(merged(DATA, preset(name)), shape, 10)
    assert RunConfig.from_json(config.to_json()) == config
    assert config.changes(config) == []
    assert config.unet.num_classes == (10 if name == "digits" else None)
    assert json.loads(config.to_json())["unet"]["image_size"] == shape[1]


def test_the_papers_recipes():
    """Ho et al. 2020, appendix B; Nichol & Dhariwal 2021, appendix A."""
    ho = completed(merged(DATA, preset("cifar10")), (3, 32, 32), None)
    assert (ho.optimizer.name, ho.optimizer.learning_rate) == ("adam", 2e-4)
    assert (ho.optimizer.warmup_steps, ho.optimizer.clip_norm) == (5000, 1.0)
    assert (ho.unet.dropout, ho.ema_rates, ho.batch_size) == (0.1, (0.9999,), 128)
    assert (ho.steps, ho.data.flip, ho.loss.variance) == (800_000, True, "fixed_large")
    assert (ho.schedule.name, ho.schedule.num_steps) == ("linear", 1000)
    assert sum(p.numel() for p in UNet(ho.unet).parameters()) == 35_746_307
    improved = completed(merged(DATA, preset("improved-cifar10")), (3, 32, 32), None)
    assert (improved.loss.variance, improved.loss.objective) == ("learned_range", "hybrid")
    assert (improved.schedule.name, improved.schedule.num_steps) == ("cosine", 4000)
    assert (improved.unet.num_res_blocks, improved.unet.out_channels) == (3, 6)
    assert improved.optimizer.learning_rate == 1e-4
    assert sum(p.numel() for p in UNet(improved.unet).parameters()) == 52_546_438
    large = completed(merged(DATA, preset("image-256")), (3, 256, 256), None)
    assert large.unet.channels == (128, 128, 256, 256, 512, 512)
    assert large.unet.attention_resolutions == (16,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "a config is an object"),
        ({}, "data is missing"),
        ({"data": {}}, "data.path is missing"),
        ({"data": 3}, r"data must be an object \{…\}; got 3"),
        ({"data": {"path": 3}}, r"data.path must be a string; got 3 \(int\)"),
        ({"unet": {"chanels": [8]}}, "unet.chanels is unknown; did you mean unet.channels"),
        ({"stpes": 3}, "stpes is unknown; did you mean steps"),
        ({"xyzzy": 3}, "xyzzy is unknown; there are"),
        ({"unet": {"channels": [1.5]}}, r"unet.channels\[0\] must be an integer; got 1.5"),
        ({"unet": {"channels": 8}}, "unet.channels must be a list; got 8"),
        ({"unet": {"channels": [33]}}, "unet.channels must be multiples of norm_groups"),
        ({"unet": {"dropout": 1}}, r"unet.dropout must lie in \[0, 1\); got 1.0"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas must have 2 elements"),
        ({"optimizer": {"betas": [0.9, 1]}}, "optimizer.betas must lie in"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate must be above 0; got 0"),
        ({"optimizer": {"clip_norm": -1}}, "optimizer.clip_norm must be above 0, or null"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name must be one of 'adam', 'adamw'"),
        ({"schedule": {"name": "cosine", "beta_end": 0.1}}, "schedule.beta_end is not of the cos"),
        ({"schedule": {"num_steps": 0}}, "schedule.num_steps must be an integer of at least 1"),
        ({"schedule": {"beta_end": 2}}, "schedule.betas"),
        ({"loss": {"objective": "hybrid"}}, "loss.objective 'hybrid' needs variance"),
        ({"loss": {"variance": "learned"}}, "unet.out_channels must be 6 for loss.variance"),
        ({"loss": {"label_dropout": 1.0}}, "loss.label_dropout must lie in"),
        (
            {"unet": {"num_classes": 3, "null_class": False}},
            "loss.label_dropout must be 0 for a unet without a null class; got 0.1",
        ),
        ({"steps": True}, r"steps must be an integer; got True \(bool\)"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"batch_size": 10, "grad_accum": 3}, r"batch_size must be a multiple of grad_accum \(3\)"),
        ({"ema_rates": [0.9, 0.9]}, "ema_rates must differ"),
        ({"ema_rates": [1]}, r"ema_rates must differ and lie in \[0, 1\); got \[1.0\]"),
        ({"seed": -1}, r"seed must lie in \[0, 2\^64\); got -1"),
        ({"precision": "fp8"}, "precision must be one of 'fp32', 'bf16', 'fp16'; got 'fp8'"),
        ({"output": {"keep": -1}}, "output.keep must be at least 0; got -1"),
        ({"output": {"log_every": 0}}, "output.log_every must be at least 1; got 0"),
        (
            {"format": "ddpm_fast run", "format_version": 2},
            "format_version is 2; this ddpm_fast reads version 1",
        ),
    ],
)
def test_errors_name_the_field(values, message):
    whole = values
    if isinstance(values, dict) and values and "data" not in values:
        whole = {**DATA, **values}
    with pytest.raises(ConfigError, match=f"^{message}"):
        RunConfig.from_dict(whole)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("", "not JSON"), ('{"steps": NaN}', "not a finite")]
)
def test_what_is_no_json(text, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        RunConfig.from_json(text)


def test_what_the_data_say():
    config = completed(DATA, (3, 32, 32), 7)
    assert (config.unet.image_size, config.unet.in_channels, config.unet.num_classes) == (32, 3, 7)
    assert (
        completed(merged(DATA, {"unet": {"num_classes": 9}}), (3, 32, 32), 7).unet.num_classes == 9
    )
    for over, shape, classes, message in (
        ({}, (3, 20, 30), None, "unet.image_size is missing, and the images are 20×30"),
        ({"in_channels": 1}, (3, 32, 32), None, "unet.in_channels is 1, but the data's is 3"),
        (
            {"num_classes": 3},
            (3, 32, 32),
            None,
            "unet.num_classes is 3, but the data have no labels",
        ),
        ({"num_classes": 3}, (3, 32, 32), 4, "unet.num_classes is 3, but the data have 4 classes"),
    ):
        with pytest.raises(ConfigError, match=message):
            completed(merged(DATA, {"unet": over}), shape, classes)


def test_what_may_change_on_the_way():
    config = RunConfig(DataConfig("digits"), steps=10)

    def changed(values):
        return config.changes(RunConfig.from_dict(merged(config.to_dict(), values)))

    assert changed({"steps": 20, "output": {"keep": 0}, "data": {"workers": 2}}) == []
    assert changed({"steps": 9}) == ["steps: 10 → 9 (they may only grow)"]
    assert changed({"seed": 1, "optimizer": {"betas": [0.9, 0.99]}}) == [
        "optimizer.betas: [0.9, 0.999] → [0.9, 0.99]",
        "seed: 0 → 1",
    ]


def test_schedules():
    assert len(ScheduleConfig("cosine", 50).build()) == 50
    assert ScheduleConfig("linear", beta_end=0.05).build().betas[-1] == 0.05
    assert ScheduleConfig("linear", zero_terminal_snr=True).build().alphas_cumprod[-1] == 0
