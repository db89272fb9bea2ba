"""What tells arguments and models apart in another process: by value, tensors by their SHA-256."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .engine import Plan
from .holding import held, parts

_LONGEST = 200  # characters of a value that are kept as they are
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device)


def value_text(value: Any, where: str) -> str:
    """Equal for equal values, in whichever process.

    Args:
        value: None, numbers, strings, bytes, tensors, arrays, dtypes, devices, members of an Enum,
            and lists, tuples, sets and dictionaries of them.
        where: its name in an error.

    Raises:
        TypeError: it, or something in it, is nothing that can be compared by value.
    """
    text = _text(value, where)
    if len(text) > _LONGEST:
        return f"{text[: _LONGEST // 4]}…, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"
    return text


def tensor_text(tensor: Tensor, where: str) -> str:
    """Its dtype, shape and the SHA-256 of its elements in row-major order."""
    return f"{_kind(tensor)}, SHA-256 {_digest([('', tensor)], where)}"


def model_texts(model: Any) -> dict[str, str]:
    """What a model is, by name: its class, and of a module all parameters and buffers, and its
    config where it has one. Of other callables their name, the modules that they hold, and what a
    functools.partial binds.

    Raises:
        TypeError: weights that are not there (offloaded, sparse), by name.
        ReferenceError: a plan whose model is gone.
    """
    if isinstance(model, Plan):
        model = _planned(model)
    method = ""
    if isinstance(model, types.MethodType) and isinstance(model.__self__, nn.Module):
        method, model = f".{model.__name__}", model.__self__
    if isinstance(model, nn.Module):
        return _module_texts(model, "model", "the model's", method)
    name = getattr(model, "__qualname__", type(model).__qualname__)
    texts = {"model": name}
    if isinstance(model, functools.partial):
        of = getattr(model.func, "__qualname__", type(model.func).__qualname__)
        texts["model"] = f"partial of {of}"
        for path, value in parts(model):
            if value is None or isinstance(value, (Tensor, *_PLAIN)):
                texts[f"the model's {path[1:]}"] = value_text(value, f"the model's {path[1:]}")
    return {**texts, **modules_texts(model, "the model")}


def modules_texts(function: Any, name: str) -> dict[str, str]:
    """What the modules are that a callable holds, by where it holds them: in closures, defaults,
    globals that it names, what a partial binds, attributes, lists, tuples and dictionaries.

    Raises:
        TypeError, ReferenceError: as :func:`model_texts`.
    """
    texts: dict[str, str] = {}
    for path, module in held(function, _module_of).items():
        texts |= _module_texts(module, f"{name}'s {path}", f"{name}'s {path}'s")
    return texts


def _module_of(value: Any) -> nn.Module | None:
    if isinstance(value, Plan):
        return _planned(value)
    if not isinstance(value, nn.Module):
        return None
    # Without tensors it is code, an activation say, that may be made at a first call
    has_tensors = any(True for _ in (*value.parameters(), *value.buffers()))
    return value if has_tensors else None


def _planned(plan: Plan) -> nn.Module:
    model: nn.Module | None = plan._model()
    if model is None:
        raise ReferenceError(
            "the model that the plan was prepared from is gone, by whose weights a saved state "
            f"is known again: keep it as long as the {type(plan).__name__}"
        )
    return model


def _module_texts(model: nn.Module, name: str, whose: str, method: str = "") -> dict[str, str]:
    training = ", in training mode" if model.training else ""
    texts = {name: f"{type(model).__qualname__}{method}{training}"}
    config = _config(model)
    if config is not None:
        texts[f"{whose} config"] = config
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    digest = _digest(sorted(tensors.items()), whose)
    texts[f"{whose} weights"] = f"{len(tensors)} tensors, SHA-256 {digest}"
    return texts


def _config(model: nn.Module) -> str | None:
    """Of this package's models and diffusers', what weights alone do not tell: heads, say."""
    config = getattr(model, "config", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    if not isinstance(config, Mapping):
        return None
    # diffusers keeps there where a model came from
    kept = {name: value for name, value in config.items() if not str(name).startswith("_")}
    try:
        return value_text(kept, "config")
    except TypeError:
        return None


def _text(value: Any, where: str) -> str:
    if isinstance(value, Tensor):
        return tensor_text(value, where)
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if value is None or type(value) in (bool, int, float, complex, str, range):
        return repr(value)
    if type(value) in (torch.dtype, torch.device):
        return str(value)
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value)} bytes, SHA-256 {hashlib.sha256(value).hexdigest()}"
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        data = np.ascontiguousarray(value)
        digest = hashlib.sha256(data.tobytes()).hexdigest()
        return f"numpy {value.dtype.str} {list(value.shape)}, SHA-256 {digest}"
    if isinstance(value, (list, tuple)):
        inside = ", ".join(_text(part, f"{where}[{i}]") for i, part in enumerate(value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, (set, frozenset)):
        return f"set({', '.join(sorted(_text(part, where) for part in value))})"
    if isinstance(value, Mapping):
        pairs = [
            f"{_text(name, where)}: {_text(part, f'{where}[{name!r}]')}"
            for name, part in value.items()
        ]
        return f"{{{', '.join(sorted(pairs))}}}"
    raise TypeError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which another process "
        "could not tell from a different one; with a checkpoint the model's arguments are tensors, "
        "arrays, numbers, strings, None, and lists, tuples and dictionaries of them"
    )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


@torch.no_grad()
def _digest(tensors: Iterable[tuple[str, Tensor]], where: str) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            what = "on the meta device" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
            raise TypeError(
                f"{where}{name and ' '}{name} is {what}: a checkpoint needs its values, dense"
            )
        digest.update(f"{name} {_kind(tensor)} ".encode())
        there = tensor.detach().cpu().resolve_conj().resolve_neg()
        digest.update(there.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
