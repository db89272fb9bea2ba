"""What a callable holds: the objects that its closure, its defaults, its attributes, … lead to."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor

_LEVELS = 4  # a partial's method's object's pipeline's module
_LONGEST = 1000  # of a list that is looked through: not of a data set

_T = TypeVar("_T")


def held(holder: Any, wanted: Callable[[Any], _T | None]) -> dict[str, _T]:
    """What is wanted among the things that a holder leads to in four levels, by its path.

    In the same order in every process. One that is found is not looked through; nor is it told
    again where a longer way leads to it, which may be a cache's that is not there in each process.

    Args:
        wanted: what it takes a thing for, None where it is not wanted.
    """
    found: dict[str, _T] = {}
    seen = {id(holder): holder}  # things stay alive as long as their ids count
    told: set[int] = set()
    level = [("", holder)]
    for _ in range(_LEVELS):
        below, here = [], {}
        for path, thing in level:
            for name, part in sorted(parts(thing), key=lambda part: part[0]):
                where = f"{path}{name}"
                what = wanted(part)
                if what is not None:
                    here[where.removeprefix(".")] = what
                elif id(part) not in seen:
                    seen[id(part)] = part
                    below.append((where, part))
        found |= {path: what for path, what in here.items() if id(what) not in told}
        told |= {id(what) for what in here.values()}
        level = below
    return found


def parts(holder: Any) -> Iterator[tuple[str, Any]]:
    """What it leads to at once, by names as they would be written behind its own; in no order."""
    if isinstance(holder, types.MethodType):
        yield ".self", holder.__self__
        yield ".func", holder.__func__
    elif isinstance(holder, functools.partial):
        yield ".func", holder.func
        yield from ((f".args[{i}]", part) for i, part in enumerate(holder.args))
        yield from ((f".{name}", part) for name, part in list(holder.keywords.items()))
    elif isinstance(holder, types.FunctionType):
        yield from _parts_of_function(holder)
    elif isinstance(holder, (list, tuple)):
        if len(holder) <= _LONGEST:
            yield from ((f"[{i}]", part) for i, part in enumerate(holder))
    elif isinstance(holder, dict):
        if len(holder) <= _LONGEST:
            for name, part in list(holder.items()):  # at once: other threads may change it
                if type(name) in (str, int):
                    yield f"[{name!r}]", part
    elif not isinstance(holder, (type, types.ModuleType, Tensor)):
        attributes = list(getattr(holder, "__dict__", {}).items())
        yield from ((f".{name}", part) for name, part in attributes)
        for name in _slots(type(holder)):
            if hasattr(holder, name):
                yield f".{name}", getattr(holder, name)
        call = getattr(type(holder), "__call__", None)  # noqa: B004
        if isinstance(call, types.FunctionType):
            yield ".__call__", call


def _parts_of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f".{name}", cell.cell_contents
        except ValueError:  # nothing was put into it yet
            continue
    defaults = function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount]
    yield from ((f".{n}", part) for n, part in zip(names[::-1], defaults[::-1], strict=False))
    yield from ((f".{name}", part) for name, part in (function.__kwdefaults__ or {}).items())
    for name in _globals_of(code):
        if name in function.__globals__:
            yield f".{name}", function.__globals__[name]
    yield from ((f".{name}", part) for name, part in list(vars(function).items()))


def _globals_of(code: types.CodeType) -> set[str]:
    """Names of the globals that it, or a function in it, reads."""
    read = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inside = (_globals_of(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return read.union(*inside)


def _slots(of: type) -> set[str]:
    """Names that its objects keep outside a dictionary."""
    names: set[str] = set()
    for each in of.__mro__:
        slots = each.__dict__.get("__slots__", ())
        names.update((slots,) if isinstance(slots, str) else slots)
    return names - {"__dict__", "__weakref__"}
