"""What the property tests draw: shapes, tensors of any strides, noise's addresses.

They take the same examples at every run. HYPOTHESIS_PROFILE=long searches elsewhere each time, and
for long.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def examples(count: int) -> settings:
    """So many of them, or fifty times as many."""
    return settings(
        max_examples=50 * count if LONG else count,
        derandomize=not LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def shapes(draw: st.DrawFn, least_ndim: int = 1, even_channels: bool = False) -> tuple[int, ...]:
    """[N, …], N and sides 0 too; some that fill vectors, granules and tiles, and some more."""
    ndim = draw(st.integers(least_ndim, 5))
    sizes = [draw(st.integers(0, 4))]
    for _ in range(ndim - 1):
        sizes.append(draw(st.integers(0, 9) | st.sampled_from([1, 2, 3, 16, 17])))
    if ndim > 1 and draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(1, ndim - 1))
        sizes[place] = draw(st.sampled_from([64, 255, 257, 1023, 1365, 4097]))
        for other in range(1, ndim):
            if other != place:
                sizes[other] = min(sizes[other], 3)
    if even_channels and ndim > 1:
        sizes[1] *= 2
    return tuple(sizes)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normals, or all of a pixel's levels."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


@st.composite
def tensors(
    draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, bounded: bool = False
) -> Tensor:
    """Of any strides: in any order of dimensions, with gaps between elements (NaN, or 255), begun
    anywhere in its memory, one element for a whole dimension. bounded: in [-1, 1]."""
    tensor = values(shape, dtype, draw(st.integers(0, 99)))
    if bounded:
        tensor = tensor.clamp(-1, 1)
    dimensions = st.integers(0, len(shape) - 1)
    way = draw(st.sampled_from(["contiguous", "order", "channels_last", "gaps", "expanded", "all"]))
    if way in ("expanded", "all"):
        wide = draw(dimensions)
        if shape[wide] > 0:
            tensor = tensor.narrow(wide, 0, 1)
    if way in ("order", "all"):
        tensor = _in_order(tensor, draw(st.permutations(range(len(shape)))))
    if way == "channels_last" and len(shape) > 2:
        tensor = _in_order(tensor, [0, *range(2, len(shape)), 1])
    if way in ("gaps", "all"):
        step, offset = draw(st.integers(1, 3)), draw(st.integers(0, 2))
        tensor = _with_gaps(tensor, draw(dimensions), step, offset)
    return tensor.expand(shape)


def _in_order(tensor: Tensor, order: list[int]) -> Tensor:
    """The same tensor, its dimensions in memory in this order."""
    back = [order.index(d) for d in range(tensor.ndim)]
    return tensor.permute(order).contiguous().permute(back)


def _with_gaps(tensor: Tensor, dimension: int, step: int, offset: int) -> Tensor:
    """Every so many elements of a larger tensor along a dimension, from one of them on."""
    sizes = list(tensor.shape)
    sizes[dimension] = offset + step * max(sizes[dimension], 1)
    memory = torch.full(sizes, 255 if tensor.dtype == torch.uint8 else torch.nan).to(tensor.dtype)
    view = memory.narrow(dimension, offset, sizes[dimension] - offset)
    view = view[(slice(None),) * dimension + (slice(None, None, step),)]
    view = view.narrow(dimension, 0, tensor.shape[dimension])
    view.copy_(tensor)
    return view


INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def integers_of(samples: int, each: st.SearchStrategy[int]) -> st.SearchStrategy[Tensor]:
    """int64 [N], now and then with gaps."""
    lists = st.lists(each, min_size=samples, max_size=samples)
    made = lists.map(lambda found: torch.tensor(found, dtype=torch.int64))
    return made | made.map(lambda t: torch.stack([t, t.flip(0)], 1)[:, 0])


@st.composite
def seeds_and_ids(draw: st.DrawFn, samples: int) -> dict[str, Any]:
    """seed and sample_ids over their whole ranges, in every form that they may have."""
    ids = st.integers(0, (1 << 63) - 1)
    seed = st.integers(0, (1 << 64) - 1) | integers_of(samples, INT64)
    lists = st.lists(ids, min_size=samples, max_size=samples)
    return {
        "seed": draw(seed),
        "sample_ids": draw(st.none() | lists | integers_of(samples, ids)),
    }


@st.composite
def addresses(draw: st.DrawFn, samples: int) -> dict[str, Any]:
    """The same, and a stream and an index."""
    indices = st.integers(0, (1 << 24) - 1)
    return {
        **draw(seeds_and_ids(samples)),
        "stream": draw(st.integers(0, 255)),
        "index": draw(indices | integers_of(samples, indices)),
    }


def part_of(value: Any, part: slice, samples: int) -> Any:
    """Of what is one a sample, those of a part of the batch."""
    if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim):
        return value[part]
    return value


def address_of_part(address: dict[str, Any], part: slice, samples: int) -> dict[str, Any]:
    """An address of some samples of a batch, which counts them from 0 where it has no ids."""
    if address["sample_ids"] is None:
        address = {**address, "sample_ids": list(range(samples))}
    return {name: part_of(value, part, samples) for name, value in address.items()}


def plain(value: Any) -> Any:
    """The same value without strides: what the reference is given."""
    return (
        value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
    )


def cut(samples: int) -> st.SearchStrategy[list[slice]]:
    """A batch in parts."""
    points = st.sets(st.integers(0, samples)).map(lambda found: sorted({0, samples, *found}))
    return points.map(lambda bounds: [slice(a, b) for a, b in itertools.pairwise(bounds)])
