"""The configs of diffusers' UNet2DModel and of a UNet, each from the other (versions 0.40 to 0.42,
and the files of older ones)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import UNetConfig

CLASS = "UNet2DModel"

# Of UNet2DModel's signature; a config that an older version wrote lacks the newer ones.
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 3),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# What a UNet can be; the rest of the options are free.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False, None),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D", None),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}
# Block type: (attention, resampling), None where downsample_type or upsample_type says it
_DOWN = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
_UP = {
    "UpBlock2D": (False, "conv"),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, "resnet"),
}


def config_of(
    options: Mapping[str, Any], *, image_size: int | None = None, null_class: bool = False
) -> UNetConfig:
    """The UNetConfig of a UNet2DModel's config.

    Raises:
        ValueError: an option that a UNet has no equivalent of, by name.

    >>> config_of({"sample_size": 32, "block_out_channels": (32, 64, 64, 64)}).head_channels
    8
    """
    unknown = {
        name: value
        for name, value in options.items()
        if name not in _DEFAULTS and not name.startswith("_") and value not in (None, False)
    }
    if unknown:
        name, value = next(iter(unknown.items()))
        raise ValueError(f"{CLASS}'s option {name}={value!r} is unknown")
    o = {**_DEFAULTS, **{name: value for name, value in options.items() if name in _DEFAULTS}}
    for name, accepted in _ACCEPTED.items():
        if o[name] not in accepted:
            raise _refused(name, o[name], "; there is " + ", ".join(map(repr, accepted)))
    for name in ("layers_per_block", "norm_num_groups"):
        if type(o[name]) is not int:
            raise _refused(name, o[name], "; one integer is")
    channels = tuple(o["block_out_channels"])
    for name in ("down_block_types", "up_block_types"):
        if len(o[name]) != len(channels):
            raise _refused(name, list(o[name]), f" for {len(channels)} block_out_channels")
    down = _levels("down_block_types", o["down_block_types"], _DOWN, o["downsample_type"])
    up = _levels("up_block_types", o["up_block_types"], _UP, o["upsample_type"])[::-1]
    side = _side(o["sample_size"], image_size, len(channels))
    attended = tuple(side >> i for i, (attends, _) in enumerate(down) if attends)
    attended_up = tuple(side >> i for i, (attends, _) in enumerate(up) if attends)
    middle = "none" if o["mid_block_type"] is None else "residual"
    if middle == "residual" and o["add_attention"]:
        middle = "attention"
    head = o["attention_head_dim"]
    widths = {channels[i] for way in (down, up) for i, (attends, _) in enumerate(way) if attends}
    for width in sorted(widths | ({channels[-1]} if middle == "attention" else set())):
        if head is not None and (type(head) is not int or head < 1 or width % head):
            raise _refused("attention_head_dim", head, f" for attention of {width} channels")
    classes = o["num_class_embeds"]
    if classes is not None and null_class:
        classes -= 1
    scale_shift = o["resnet_time_scale_shift"] == "scale_shift"
    groups = o["attn_norm_num_groups"]
    if groups is None and scale_shift:
        groups = 0  # their middle attention has no norm then
    if groups == o["norm_num_groups"] or middle != "attention":
        groups = None
    return UNetConfig(
        image_size=side,
        in_channels=o["in_channels"],
        out_channels=o["out_channels"],
        channels=channels,
        num_res_blocks=o["layers_per_block"],
        attention_resolutions=attended,
        attention_up_resolutions=None if attended == attended_up else attended_up,
        head_channels=head,
        dropout=o["dropout"],
        num_classes=classes,
        null_class=null_class or classes is None,
        norm_groups=o["norm_num_groups"],
        norm_eps=o["norm_eps"],
        embedding_channels=o["time_embedding_dim"] or None,
        cosine_first=bool(o["flip_sin_to_cos"]),
        freq_shift=o["freq_shift"],
        scale_shift=scale_shift,
        downsample_padding=o["downsample_padding"],
        downsample=_kinds([kind for _, kind in down[:-1]]),
        upsample=_kinds([kind for _, kind in up[1:]]),
        middle=middle,  # type: ignore[arg-type]
        middle_norm_groups=groups,
    )


def options_of(config: UNetConfig) -> dict[str, Any]:
    """The UNet2DModel's config of a UNetConfig.

    Raises:
        ValueError: what a UNet2DModel cannot be.

    >>> options_of(UNetConfig())["down_block_types"]
    ('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D')
    """
    depths = range(len(config.channels))
    if config.time_width != config.channels[0]:
        raise _no_equivalent(f"time_channels={config.time_channels}")
    down_kinds: list[str] = [config.downsample_at(i) for i in depths[:-1]]
    up_kinds: list[str] = [config.upsample_at(i) for i in depths[:-1]]
    down, downsample_type = _types("downsample", config, down_kinds, up=False)
    up, upsample_type = _types("upsample", config, up_kinds, up=True)
    groups = config.middle_norm_groups
    if groups == 0 and not config.scale_shift and config.middle == "attention":
        raise _no_equivalent("middle_norm_groups=0 without scale_shift")
    if groups is None:
        groups = config.norm_groups if config.scale_shift else None
    return {
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels or config.in_channels,
        "time_embedding_dim": config.embedding_channels,
        "freq_shift": config.freq_shift,
        "flip_sin_to_cos": config.cosine_first,
        "down_block_types": down,
        "mid_block_type": None if config.middle == "none" else "UNetMidBlock2D",
        "up_block_types": up[::-1],
        "block_out_channels": config.channels,
        "layers_per_block": config.num_res_blocks,
        "downsample_padding": config.downsample_padding,
        "downsample_type": downsample_type,
        "upsample_type": upsample_type,
        "dropout": config.dropout,
        "attention_head_dim": _head_channels(config),
        "norm_num_groups": config.norm_groups,
        "attn_norm_num_groups": groups or None,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "add_attention": config.middle == "attention",
        "num_class_embeds": config.embedded_classes,
    }


def _levels(
    name: str, types: Any, known: Mapping[str, tuple[bool, str | None]], attended: str
) -> list[tuple[bool, str]]:
    """(attention, resampling) of each block type; that of those with attention is ``attended``."""
    levels = []
    for given in types:
        kind = str(given).removeprefix("UNetRes")  # of their first versions
        if kind not in known:
            raise _refused(name, given, f"; there is {', '.join(known)}")
        attends, resampling = known[kind]
        levels.append((attends, resampling or attended))
    return levels


def _types(
    name: str, config: UNetConfig, kinds: list[str], up: bool
) -> tuple[tuple[str, ...], str]:
    """The block types, highest resolution first, and downsample_type or upsample_type."""
    attends = [config.attends(depth, up) for depth in range(len(config.channels))]
    if unknown := set(kinds) - {"conv", "resblock"}:
        raise _no_equivalent(f"{name}={unknown.pop()!r}")
    # The last level of a way has no resampling.
    kinds = ["", *kinds] if up else [*kinds, ""]
    attended = {kind for kind, here in zip(kinds, attends, strict=True) if here and kind}
    if len(attended) > 1:
        raise _no_equivalent(f"{name}={list(getattr(config, name))} where there is attention")
    plain, attn, resnet = _UP if up else _DOWN
    types = tuple(
        attn if here else resnet if kind == "resblock" else plain
        for kind, here in zip(kinds, attends, strict=True)
    )
    return types, "resnet" if attended == {"resblock"} else "conv"


def _head_channels(config: UNetConfig) -> int | None:
    if config.head_channels is not None:
        return config.head_channels
    places = config.attention_widths()
    if all(config.heads(width, up) == 1 for width, up in places):
        return None
    found = {width // config.heads(width, up) for width, up in places}
    if len(found) > 1:
        raise _no_equivalent(
            f"num_heads={config.num_heads} for attention of different widths or numbers of heads "
            f"(head_channels would be {sorted(found)})"
        )
    return found.pop()


def _kinds(kinds: list[str]) -> tuple[Any, ...]:
    ours = ["resblock" if kind == "resnet" else "conv" for kind in kinds]
    return tuple(ours) if len(set(ours)) > 1 else tuple(ours[:1] or ["conv"])


def _side(sample_size: Any, image_size: int | None, levels: int) -> int:
    if image_size is not None:
        return image_size
    if isinstance(sample_size, (list, tuple)) and len(set(sample_size)) == 1:
        sample_size = sample_size[0]
    if type(sample_size) is not int or sample_size % 2 ** (levels - 1):
        raise ValueError(
            f"{CLASS}'s option sample_size={sample_size!r} is not the side of square images that "
            f"can be halved {levels - 1} times: say it by image_size"
        )
    return sample_size


def _refused(name: str, value: Any, more: str) -> ValueError:
    return ValueError(f"{CLASS}'s option {name}={value!r} has no equivalent in a UNet{more}")


def _no_equivalent(option: str) -> ValueError:
    return ValueError(f"the UNet's {option} has no equivalent in a {CLASS}")
