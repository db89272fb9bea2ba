"""Dataclasses from JSON's objects, with errors that name the field."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

_T = TypeVar("_T")


class ConfigError(ValueError):
    """A config that cannot be used, and which field of it."""


class NewerFormatError(ConfigError):
    """A config that a later version wrote."""


def read(cls: type[_T], values: Any, where: str = "") -> _T:
    """A dataclass of ``values``, nested ones included; ``where`` is its place, "unet." say.

    Raises:
        ConfigError: a field that is unknown, missing, of another type or out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where.rstrip('.')} must be an object {{…}}; got {_shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(cast(Any, cls))}
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, 1)
            hint = f"; did you mean {where}{close[0]}?" if close else f"; there are {list(fields)}"
            raise ConfigError(f"{where}{name} is unknown{hint}")
    hints = get_type_hints(cls)
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _read_value(hints[name], values[name], where + name)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{name} is missing")
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}{error}") from error


def _read_value(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return read(cast(type, kind), value, name + ".")
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in arguments:
            accepted = ", ".join(map(repr, arguments))
            raise ConfigError(f"{name} must be one of {accepted}; got {value!r}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _read_value(inner, value, name)
    if origin is tuple:
        inner, more = arguments[0], arguments[1:]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name} must be a list; got {_shown(value)}")
        if more != (Ellipsis,) and len(value) != len(arguments):
            raise ConfigError(f"{name} must have {len(arguments)} elements; got {list(value)}")
        return tuple(_read_value(inner, item, f"{name}[{i}]") for i, item in enumerate(value))
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(f"{name} must be finite; got an integer beyond all floats") from None
    if type(value) is not kind:
        raise ConfigError(f"{name} must be {_KINDS[kind]}; got {_shown(value)}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{name} must be finite; got {value}")
    return value


_KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def _shown(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over``, object by object.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
    {'a': {'b': 1, 'c': 3}}
    """
    result = dict(base)
    for name, value in over.items():
        old = result.get(name)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[name] = merged(cast(Any, old), value) if both else value
    return result


def differences(
    a: Mapping[str, Any], b: Mapping[str, Any], where: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Each field that differs, by its dotted name."""
    for name in [*a, *(name for name in b if name not in a)]:
        x, y = a.get(name), b.get(name)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            yield from differences(x, y, f"{where}{name}.")
        elif x != y:
            yield where + name, x, y
