"""A model's keyword arguments of samples that share a batch.

A sample's own are as ``sample([1, …])`` takes them: a tensor whose first dimension is 1 is the
sample's, and is joined with the others'. Whatever else is in dictionaries, lists and tuples is
given to the model as it is, so that samples share a batch only where theirs is the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def signature(tree: Any) -> Hashable:
    """Equal for the arguments of samples that may share a batch."""
    if is_own(tree):
        return "own", tuple(tree.shape[1:]), tree.dtype, tree.device
    if type(tree) is dict:
        return "dict", tuple((name, signature(value)) for name, value in tree.items())
    if type(tree) in (list, tuple):
        return type(tree), tuple(map(signature, tree))
    if type(tree) is float:
        return float, tree.hex()  # 0.0 == -0.0
    if isinstance(tree, Tensor) or not _comparable(tree):
        return "is", id(tree)
    return type(tree), tree


def joined(trees: Sequence[Any]) -> Any:
    """The arguments of a batch, of samples of one signature."""
    first = trees[0]
    if is_own(first):
        return torch.cat(list(trees))
    if type(first) is dict:
        return {name: joined([tree[name] for tree in trees]) for name in first}
    if type(first) in (list, tuple):
        return type(first)(joined(parts) for parts in zip(*trees, strict=True))
    return first


def copied(tree: Any) -> Any:
    """Containers of its own, of the same values."""
    if type(tree) is dict:
        return {name: copied(value) for name, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(copied, tree))
    return tree


def tensors(tree: Any) -> Iterator[Tensor]:
    """All that it holds."""
    if isinstance(tree, Tensor):
        yield tree
    elif type(tree) is dict:
        for value in tree.values():
            yield from tensors(value)
    elif type(tree) in (list, tuple):
        for value in tree:
            yield from tensors(value)


def is_own(value: Any) -> bool:
    """Whether it is a sample's own, not shared by a batch."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 1


def _comparable(value: Any) -> bool:
    """Numbers, strings, None, functions: what compares by value or is what it is."""
    try:
        hash(value)
    except TypeError:
        return False
    return True
