"""randn and add_noise at any shape, strides, dtype and address: the reference's bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_cases import (
    FLOATS,
    address_of_part,
    addresses,
    cut,
    examples,
    integers_of,
    part_of,
    plain,
    shapes,
    tensors,
)

from ddpm_fast import NoiseSchedule, add_noise, randn, use_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
SCHEDULES = [NoiseSchedule.linear(1000), NoiseSchedule.cosine(50), NoiseSchedule([0.5, 1.0])]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@examples(60)
@given(st.data())
def test_randn(data):
    shape = data.draw(shapes())
    address = data.draw(addresses(shape[0]))
    dtype = data.draw(st.sampled_from(FLOATS))
    order = data.draw(st.sampled_from([torch.contiguous_format, FORMATS.get(len(shape))]))
    order = order or torch.contiguous_format
    found = randn(shape, dtype=dtype, memory_format=order, **address)
    assert found.is_contiguous(memory_format=order)
    with use_backend("reference"):
        expected = randn(shape, **{name: plain(value) for name, value in address.items()})
    assert torch.equal(found, expected.to(dtype))


@examples(40)
@given(st.data())
def test_a_batch_is_its_parts(data):
    shape = data.draw(shapes())
    address = data.draw(addresses(shape[0]))
    whole = randn(shape, **address)
    parts = [
        randn((part.stop - part.start, *shape[1:]), **address_of_part(address, part, shape[0]))
        for part in data.draw(cut(shape[0]))
    ]
    assert torch.equal(torch.cat([whole[:0], *parts]), whole)


@examples(90)
@given(st.data())
def test_add_noise(data):
    shape = data.draw(shapes())
    schedule = data.draw(st.sampled_from(SCHEDULES))
    x0 = data.draw(tensors(shape, data.draw(st.sampled_from([*FLOATS, torch.uint8]))))
    steps = st.integers(0, len(schedule) - 1)
    t = data.draw(steps | integers_of(shape[0], steps))
    options = data.draw(addresses(shape[0]))
    options["dtype"] = data.draw(st.none() | st.sampled_from(FLOATS))
    if data.draw(st.integers(0, 3)) == 0:
        options["noise"] = data.draw(tensors(shape, data.draw(st.sampled_from(FLOATS))))
    found = add_noise(x0, t, schedule, **options)
    with use_backend("reference"):
        expected = add_noise(
            plain(x0), plain(t), schedule, **{name: plain(value) for name, value in options.items()}
        )
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    if shape[0]:  # and of a part of the batch
        one = slice(*sorted(data.draw(st.tuples(*[st.integers(0, shape[0])] * 2))))
        dtype, noise = options.pop("dtype"), options.pop("noise", None)
        again = add_noise(
            x0[one], part_of(t, one, shape[0]), schedule, dtype=dtype,
            noise=None if noise is None else noise[one],
            **address_of_part(options, one, shape[0]),
        )  # fmt: skip
        assert torch.equal(again, found[one])
