"""UNets from the UNetModel of OpenAI's improved-diffusion and guided-diffusion."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .checkpoint import read_safetensors
from .config import UNetConfig
from .weights import Place, build, read_pickle, tensors_of

if TYPE_CHECKING:
    from .unet import UNet

# Of the scripts, which both repositories have in common where both have the option; the last three
# are the model's own.
_DEFAULTS: dict[str, Any] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "learn_sigma": False,
    "class_cond": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "in_channels": 3,
    "num_classes": 1000,
    "conv_resample": True,
}
# Of the diffusion process, or of how it is computed
_PASSED_OVER = (
    "use_checkpoint",
    "use_fp16",
    "diffusion_steps",
    "noise_schedule",
    "timestep_respacing",
    "use_kl",
    "predict_xstart",
    "rescale_timesteps",
    "rescale_learned_sigmas",
    "sigma_small",
)
_KINDS = {bool: "true or false", int: "an integer", float: "a number"}
_MULTIPLES: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


def load(
    cls: type[UNet],
    source: Mapping[str, Tensor] | str | os.PathLike[str],
    options: Mapping[str, Any],
) -> UNet:
    """:meth:`UNet.from_openai`."""
    config = config_of(options)
    if isinstance(source, Mapping):
        tensors, what = tensors_of("source", source), "the state dict"
    else:
        path = Path(source)
        safe = path.suffix == ".safetensors" and path.is_file()
        tensors, what = read_safetensors(path) if safe else read_pickle(path), os.fspath(source)
    legacy = not options.get("use_new_attention_order", False)
    return build(cls, config, _places(config, legacy), tensors, what)


def config_of(options: Mapping[str, Any]) -> UNetConfig:
    """The UNetConfig of the scripts' options.

    Raises:
        ValueError: an option that is unknown, or whose value cannot be used, by name.

    >>> config_of({"image_size": 32, "num_channels": 64}).channels
    (64, 128, 128, 128)
    """
    for name, value in options.items():
        if name not in _DEFAULTS and name not in _PASSED_OVER:
            raise ValueError(
                f"OpenAI's option {name}={value!r} is unknown or has no equivalent; there is "
                f"{', '.join(_DEFAULTS)}"
            )
        kind = type(_DEFAULTS.get(name))
        if kind in _KINDS and type(value) is not kind and (kind, type(value)) != (float, int):
            raise _bad(name, value, f"it must be {_KINDS[kind]}")
    o = {**_DEFAULTS, **options}
    size, base = o["image_size"], o["num_channels"]
    multiples = _numbers("channel_mult", o["channel_mult"], float) or _MULTIPLES.get(size)
    if multiples is None:
        raise _bad("channel_mult", o["channel_mult"], f"image_size {size} has no default of it")
    try:
        channels = tuple(int(multiple * base) for multiple in multiples)
    except (OverflowError, ValueError):  # infinity, NaN
        raise _bad("channel_mult", o["channel_mult"], "it must be finite numbers") from None
    sides = _numbers("attention_resolutions", o["attention_resolutions"], int)
    if sides and min(sides) < 1:
        raise _bad("attention_resolutions", o["attention_resolutions"], "they are sides in pixels")
    # As there: a side that is none of the network's has no attention, and says nothing.
    rates = {size // side for side in sides}
    per_head, heads_up = o["num_head_channels"], o["num_heads_upsample"]
    try:
        return UNetConfig(
            image_size=size,
            in_channels=o["in_channels"],
            out_channels=o["in_channels"] * (1 + o["learn_sigma"]),
            channels=channels,
            num_res_blocks=o["num_res_blocks"],
            attention_resolutions=tuple(
                size >> depth for depth in range(len(channels)) if 1 << depth in rates
            ),
            num_heads=1 if per_head != -1 else o["num_heads"],
            num_heads_up=None if per_head != -1 or heads_up in (-1, o["num_heads"]) else heads_up,
            head_channels=None if per_head == -1 else per_head,
            dropout=o["dropout"],
            num_classes=o["num_classes"] if o["class_cond"] else None,
            null_class=not o["class_cond"],
            norm_groups=32,
            norm_eps=1e-5,
            time_channels=None if base == channels[0] else base,
            cosine_first=True,
            freq_shift=0,
            scale_shift=o["use_scale_shift_norm"],
            downsample_padding=1,
            downsample=_kind("pool", o),
            upsample=_kind("nearest", o),
        )
    except ValueError as error:
        raise ValueError(f"OpenAI's options have no equivalent in a UNet: {error}") from error


def _kind(without: str, options: Mapping[str, Any]) -> tuple[Any]:
    if options["resblock_updown"]:
        return ("resblock",)
    return ("conv",) if options["conv_resample"] else (without,)


def _numbers(name: str, value: Any, kind: type[int] | type[float]) -> tuple[Any, ...]:
    """Of "16,8", or of a list of numbers."""
    parts = value.split(",") if isinstance(value, str) and value else value or ()
    try:
        return tuple(kind(part) for part in parts)
    except (OverflowError, TypeError, ValueError):
        raise _bad(name, value, "it must be numbers with commas between, or a list") from None


def _bad(name: str, value: Any, why: str) -> ValueError:
    return ValueError(f"OpenAI's option {name}={value!r} cannot be used: {why}")


_OUTSIDE = {
    "time_mlp.0": "time_embed.0",
    "time_mlp.2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "norm_out": "out.0",
    "conv_out": "out.2",
}
_INSIDE = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
    "norm": "norm",
    "qkv": "qkv",
    "out": "proj_out",
}


def _places(config: UNetConfig, legacy: bool) -> Callable[[str], Place]:
    blocks = _blocks(config)

    def place(name: str) -> Place:
        module, _, kind = name.rpartition(".")
        if module in _OUTSIDE:
            return Place((f"{_OUTSIDE[module]}.{kind}",))
        block, _, part = module.rpartition(".")
        theirs, heads = blocks[block]
        inside = _INSIDE.get(part) or ("op" if block.startswith("down") else "conv")
        conv1d = part in ("qkv", "out") and kind == "weight"
        by_head = heads if legacy and part == "qkv" else 0
        return Place((f"{theirs}.{inside}.{kind}",), int(conv1d), by_head)

    return place


def _blocks(config: UNetConfig) -> dict[str, tuple[str, int]]:
    """Of each of our blocks: theirs, which are numbered in the order they are run in, and the heads
    of an attention there."""
    last, blocks = len(config.channels) - 1, {}
    number = 1
    for depth, width in enumerate(config.channels):
        heads = config.heads(width, False)
        for i in range(config.num_res_blocks):
            blocks[f"down.{depth}.res.{i}"] = f"input_blocks.{number}.0", 0
            blocks[f"down.{depth}.attention.{i}"] = f"input_blocks.{number}.1", heads
            number += 1
        if depth < last:
            blocks[f"down.{depth}.resample"] = f"input_blocks.{number}.0", 0
            number += 1
    blocks["mid_res1"] = "middle_block.0", 0
    blocks["mid_attention"] = "middle_block.1", config.heads(config.channels[-1], False)
    blocks["mid_res2"] = "middle_block.2", 0
    number = 0
    for level in range(last + 1):
        depth = last - level
        heads, attends = config.heads(config.channels[depth], True), config.attends(depth, True)
        for i in range(config.num_res_blocks + 1):
            blocks[f"up.{level}.res.{i}"] = f"output_blocks.{number}.0", 0
            blocks[f"up.{level}.attention.{i}"] = f"output_blocks.{number}.1", heads
            number += 1
        blocks[f"up.{level}.resample"] = f"output_blocks.{number - 1}.{1 + attends}", 0
    return blocks
