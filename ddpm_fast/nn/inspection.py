"""Whether a UNet is what its config says and nothing besides, so that a plan computes all of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..ops.checks import FLOAT_DTYPES
from .diffusers_config import CLASS
from .unet import UNet

HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
# Of training, or that change nothing else than memory
_MEANINGLESS = {"training", "gradient_checkpointing", "sample_size"}
FREE_U = ("s1", "s2", "b1", "b2")  # diffusers sets them on the blocks of the way up


def is_ours(model: object) -> bool:
    """A UNet, not of a subclass, whose forward pass could be another."""
    return type(model) is UNet


def is_diffusers(model: object) -> bool:
    """diffusers' UNet2DModel, not a subclass."""
    cls = type(model)
    return cls.__name__ == CLASS and cls.__module__.startswith("diffusers.models.")


def is_known(model: object) -> bool:
    """Of a class that there are plans of."""
    return is_ours(model) or is_diffusers(model)


def check_class(model: object) -> None:
    """Raises TypeError for other classes."""
    if not is_known(model):
        raise TypeError(
            f"a plan is of a UNet or of diffusers' {CLASS}, not of a subclass; got "
            f"{type(model).__module__}.{type(model).__qualname__}"
        )


def inspect(model: nn.Module) -> None:
    """Looks for whatever a plan would leave out.

    Raises:
        TypeError: another class.
        ValueError: it is in training mode; hooks, parametrisations, a forward of an instance,
            modules, options or parameters that are not those of its config, named; weights that
            are elsewhere, quantised, or of several dtypes or devices.
    """
    check_class(model)
    for names in HOOKS:
        hooks = getattr(torch_module, f"_global{names}", {})
        for hook in hooks.values():
            raise ValueError(f"a plan would leave out the global {HOOKS[names]} {_name(hook)}")
    for name, module in model.named_modules():
        _check_extras(name or "the model", module)
    _check_structure(model)
    for name, module in model.named_modules():
        if module.training:
            name = name or "the model"
            raise ValueError(
                f"a plan is for eval mode, and {name} is in training mode: call .eval()"
            )
    _check_tensors(model)


def _check_extras(name: str, module: nn.Module) -> None:
    state = module.__dict__
    if any(key in state for key in ("_hf_hook", "_diffusers_hook")):
        raise ValueError(
            f"a plan would leave out the hook on {name} by which accelerate or diffusers moves "
            "weights: load the model without offloading, or remove the hooks"
        )
    for names, kind in HOOKS.items():
        for hook in state[names].values():
            raise ValueError(f"a plan would leave out the {kind} {_name(hook)} on {name}")
    if "parametrizations" in state["_modules"]:
        which = ", ".join(dict(module.parametrizations.items()))  # type: ignore[operator,union-attr]
        raise ValueError(f"a plan would leave out the parametrization of {which} on {name}")
    if "forward" in state:
        raise ValueError(f"a plan would leave out the forward that {name} itself was given")
    if any(state.get(key) is not None for key in FREE_U):
        raise ValueError(f"a plan would leave out FreeU on {name}: call .disable_freeu()")


def _check_structure(model: nn.Module) -> None:
    """Against a model made from the same config."""
    expected = dict(_skeleton(model).named_modules(remove_duplicate=False))
    found = dict(model.named_modules(remove_duplicate=False))
    for name, module in found.items():
        there = expected.get(name)
        kind = f"a {type(module).__module__}.{type(module).__qualname__}"
        if there is None:
            raise ValueError(
                f"a plan would leave out {name}, {kind}, of which the config is silent"
            )
        if type(module) is not type(there):
            raise ValueError(f"{name} is {kind}; a plan knows a {type(there).__qualname__} there")
        for key, value in _attributes(there):
            given = module.__dict__.get(key)
            if type(given) is not type(value) or (_is_plain(value) and given != value):
                said = repr(value) if _is_plain(value) else f"a {type(value).__qualname__}"
                given = given if _is_plain(given) else type(given).__qualname__
                raise ValueError(
                    f"{key} of {name or 'the model'} is {given!r}; by its config it is {said}"
                )
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{missing[0]} is missing: a plan is of the whole UNet of the config")
    for name, there in expected.items():
        for kind in ("_parameters", "_buffers"):
            shapes = _shapes(there.__dict__[kind])
            given_shapes = _shapes(found[name].__dict__[kind])
            if given_shapes != shapes:
                raise ValueError(
                    f"{name or 'the model'} has {kind[1:]} of shapes {given_shapes}; by its config "
                    f"they are {shapes}"
                )


def _skeleton(model: Any) -> nn.Module:
    if is_ours(model):
        return _made(UNet, model.config)
    cls: Any = type(model)
    return _made(cls, tuple((name, _hashable(value)) for name, value in _options(model)))


@functools.lru_cache(maxsize=8)
def _made(cls: Any, config: Any) -> nn.Module:
    """A model without memory for its weights."""
    with torch.device("meta"):
        made: nn.Module = cls(config) if cls is UNet else cls(**dict(config))
    return made


def _options(model: Any) -> list[tuple[str, Any]]:
    """Of a UNet2DModel's config, those that its class takes."""
    return [(name, value) for name, value in model.config.items() if not name.startswith("_")]


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in module.__dict__.items():
        private = key.startswith("_") or key in _MEANINGLESS
        if not private and not (key == "p" and isinstance(module, nn.Dropout)):
            yield key, value


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, tuple))


def _shapes(tensors: dict[str, Tensor | None]) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in tensors.items() if t is not None}


def _check_tensors(model: nn.Module) -> None:
    first: Tensor | None = None
    for name, tensor in model.named_parameters():
        kind = type(tensor)
        if kind not in (nn.Parameter, Tensor) or tensor.is_quantized or tensor.is_sparse:
            raise ValueError(f"{name} is a {kind.__qualname__}: a plan takes ordinary tensors")
        if tensor.is_meta:
            raise ValueError(f"{name} is offloaded, or has no values: it is on the meta device")
        if tensor.dtype not in FLOAT_DTYPES:
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
            raise ValueError(f"{name} is {tensor.dtype}: a plan takes {dtypes}")
        first = tensor if first is None else first
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, and others are {first.dtype} on "
                f"{first.device}: a plan takes one dtype and one device"
            )


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__qualname__)
