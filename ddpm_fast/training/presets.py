"""Recipes by name, and how a run's config is put together from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import RunConfig
from .fields import ConfigError, merged

# What a preset leaves open, image size, channels or classes, comes from the data; the rest is
# RunConfig's own, the recipe of Ho et al. 2020 for CIFAR-10.
PRESETS: dict[str, dict[str, Any]] = {
    # 8×8 digits with their classes, a minute or two on two processor cores
    "digits": {
        "unet": {
            "channels": [32, 64],
            "num_res_blocks": 1,
            "attention_resolutions": [4],
            "num_heads": 2,
            "dropout": 0.05,
            "norm_groups": 8,
        },
        "schedule": {"name": "cosine"},
        "loss": {"variance": "fixed_small"},
        "optimizer": {"name": "adamw", "learning_rate": 2e-3, "warmup_steps": 150},
        "ema_rates": [0.995, 0.999],
        "steps": 2000,
        "output": {
            "checkpoint_every": 500,
            "log_every": 20,
            "sample_every": 500,
            "num_samples": 50,
        },
    },
    # Ho et al. 2020, appendix B: 35.7 M parameters, unconditional, fixed_large
    "cifar10": {
        "data": {"flip": True},
        "unet": {"image_size": 32, "in_channels": 3, "num_classes": None},
    },
    # Nichol & Dhariwal 2021: L_hybrid, learned_range, cosine, T = 4000, 52.5 M parameters
    "improved-cifar10": {
        "data": {"flip": True},
        "unet": {
            "image_size": 32,
            "in_channels": 3,
            "num_classes": None,
            "num_res_blocks": 3,
            "attention_resolutions": [16, 8],
            "num_heads": 4,
            "dropout": 0.3,
            "scale_shift": True,
            "cosine_first": True,
            "freq_shift": 0,
            "downsample_padding": 1,
            "norm_eps": 1e-5,
        },
        "schedule": {"name": "cosine", "num_steps": 4000},
        "loss": {"variance": "learned_range", "objective": "hybrid"},
        "optimizer": {"name": "adamw", "learning_rate": 1e-4, "warmup_steps": 0, "clip_norm": None},
        "steps": 500_000,
    },
    # Ho et al. 2020, appendix B, for CelebA-HQ and LSUN at 256×256: 114 M parameters
    "image-256": {
        "data": {"flip": True},
        "unet": {
            "image_size": 256,
            "in_channels": 3,
            "num_classes": None,
            "channels": [128, 128, 256, 256, 512, 512],
            "attention_resolutions": [16],
            "dropout": 0.0,
        },
        "optimizer": {"learning_rate": 2e-5},
        "batch_size": 64,
        "steps": 500_000,
        "output": {"num_samples": 16},
    },
}


def preset(name: str) -> dict[str, Any]:
    """A recipe, without what comes from the data.

    Raises:
        ConfigError: none of that name.

    >>> preset("cifar10")["data"]
    {'flip': True}
    """
    if name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return merged({}, PRESETS[name])


def completed(
    values: Mapping[str, Any], image_shape: tuple[int, int, int], num_classes: int | None
) -> RunConfig:
    """A config whose open fields are the data's.

    Args:
        values: of a config, as JSON has them.
        image_shape: (C, H, W) of the data.
        num_classes: of their labels, or None.

    Raises:
        ConfigError: a field; data whose images are not square, of another size or number of
            channels, or that have more classes than the network.

    >>> completed({"data": {"path": "digits"}, **preset("digits")}, (1, 8, 8), 10).unet.num_classes
    10
    """
    channels, height, width = image_shape
    if height != width:
        raise ConfigError(f"unet.image_size is missing, and the images are {height}×{width}")
    found = {"image_size": height, "in_channels": channels, "num_classes": num_classes}
    values = merged({"unet": found}, values)
    unet = values["unet"]
    learned = values.get("loss", {}).get("variance") in ("learned", "learned_range")
    if isinstance(unet, dict) and isinstance(unet.get("in_channels"), int):
        unet.setdefault("out_channels", (1 + learned) * unet["in_channels"])
    config = RunConfig.from_dict(values)
    for name in ("image_size", "in_channels"):
        if getattr(config.unet, name) != found[name]:
            raise ConfigError(
                f"unet.{name} is {getattr(config.unet, name)}, but the data's is {found[name]}"
            )
    wanted = config.unet.num_classes
    if wanted is not None and num_classes is None:
        raise ConfigError(f"unet.num_classes is {wanted}, but the data have no labels")
    if wanted is not None and num_classes is not None and num_classes > wanted:
        raise ConfigError(f"unet.num_classes is {wanted}, but the data have {num_classes} classes")
    return config
