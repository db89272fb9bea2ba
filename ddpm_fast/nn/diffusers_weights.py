"""UNets from and to diffusers' UNet2DModel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import diffusers_files
from .diffusers_config import CLASS, config_of, options_of
from .weights import Place, build

if TYPE_CHECKING:
    from .unet import UNet


def load(
    cls: type[UNet],
    source: Any,
    image_size: int | None,
    null_class: bool,
    variant: str | None,
    share: bool = False,
) -> UNet:
    """:meth:`UNet.from_diffusers`. With ``share`` its weights are the source's own where they can
    be."""
    what: object = f"the {CLASS}"
    if isinstance(source, str) or hasattr(source, "__fspath__"):
        options, tensors, what = diffusers_files.read(Path(source), variant)
    else:
        model = _model_of(source)
        if variant is not None:
            raise ValueError(
                f"{variant=} is of a directory's files; got {type(source).__qualname__}"
            )
        options, tensors = dict(model.config), _tensors(model)
    try:
        config = config_of(options, image_size=image_size, null_class=null_class)
    except (IndexError, TypeError) as error:
        raise ValueError(f"{what}'s config cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    tensors = {_RENAMED.sub(_renamed, name): tensor for name, tensor in tensors.items()}
    return build(cls, config, _place, tensors, what, share)


def _model_of(source: Any) -> Any:
    """The UNet2DModel itself, of a pipeline or of torch.compile's module."""
    found = source if isinstance(source, torch.nn.Module) else getattr(source, "unet", source)
    while isinstance(found, torch.nn.Module) and hasattr(found, "_orig_mod"):
        found = found._orig_mod
    if not any(base.__name__ == CLASS for base in type(found).__mro__):
        inside = "" if found is source else f" in {type(source).__qualname__}"
        raise TypeError(
            f"from_diffusers takes a {CLASS}, a pipeline that has one, or a directory; got "
            f"{type(found).__qualname__}{inside}"
        )
    return found


def _tensors(model: Any) -> dict[str, Tensor]:
    """The weights of a module, which it has to hold itself.

    Raises:
        ValueError: they are elsewhere, by accelerate's or diffusers' offloading.
    """
    tensors: dict[str, Tensor] = model.state_dict()
    modules = list(model.modules())
    if any(tensor.is_meta for tensor in tensors.values()):
        if any(hasattr(module, "_hf_hook") for module in modules):
            raise ValueError(
                f"the {CLASS}'s weights are offloaded (they are on the meta device): remove the "
                "hooks first, by pipeline.remove_all_hooks() or by "
                "accelerate.hooks.remove_hook_from_module(unet, recurse=True)"
            )
        raise ValueError(f"the {CLASS}'s weights have no values, on the meta device")
    for module in modules:
        # Their parameters keep device and shape, and hold whatever was in memory.
        hooks = getattr(module, "_diffusers_hook", None)
        hook = hooks and hooks.get_hook("group_offloading")
        folder = getattr(getattr(hook, "config", None), "offload_to_disk_path", None)
        if folder is not None:
            raise ValueError(
                f"the {CLASS}'s weights are in files of {folder}: load the model again, without "
                "group offloading to a disk"
            )
    return tensors


def export(model: UNet) -> Any:
    """:meth:`UNet.to_diffusers`."""
    options = options_of(model.config)
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError("to_diffusers needs diffusers: pip install 'ddpm_fast[diffusers]'") from (
            error
        )
    tensors = {}
    for name, tensor in model.state_dict().items():
        names = _place(name).names
        for theirs, part in zip(names, tensor.chunk(len(names)), strict=True):
            tensors[theirs] = part.clone()
    with torch.device("meta"):
        exported: Any = UNet2DModel(**options)
    exported.load_state_dict(tensors, assign=True)
    return exported.train(model.training)


_ATTENTION = {"norm": "group_norm", "out": "to_out.0"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_RENAMED = re.compile(r"(?<=\.attentions\.)(\d+)\.(query|key|value|proj_attn)(?=\.)")


def _renamed(found: re.Match[str]) -> str:
    """A name of diffusers before 0.14."""
    return f"{found[1]}.{_OLD_ATTENTION[found[2]]}"


def _place(name: str) -> Place:
    """Where a tensor of ours stands there."""
    for pattern, theirs in _MODULES:
        name = re.sub(pattern, theirs, name)
    module, _, kind = name.rpartition(".")
    block, _, part = module.rpartition(".")
    if re.search(r"\.attentions\.\d+$", block):
        if part == "qkv":
            return Place(tuple(f"{block}.to_{p}.{kind}" for p in "qkv"))
        return Place((f"{block}.{_ATTENTION[part]}.{kind}",))
    return Place((name,))


_MODULES = (
    (r"^time_mlp\.0", "time_embedding.linear_1"),
    (r"^time_mlp\.2", "time_embedding.linear_2"),
    (r"^(down|up)\.(\d+)\.res\.", r"\1_blocks.\2.resnets."),
    (r"^(down|up)\.(\d+)\.attention\.", r"\1_blocks.\2.attentions."),
    (r"^(down|up)\.(\d+)\.resample\.", r"\1_blocks.\2.\1samplers.0."),
    (r"^mid_res1\.", "mid_block.resnets.0."),
    (r"^mid_res2\.", "mid_block.resnets.1."),
    (r"^mid_attention\.", "mid_block.attentions.0."),
    (r"\.emb_proj\.", ".time_emb_proj."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"^norm_out\.", "conv_norm_out."),
)
