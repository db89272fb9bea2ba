"""The noise contract: known answers, frozen bits, independence of all but the address."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import FROZEN_HASH, frozen_block, sha256
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast import randn, reference, use_backend


def test_frozen_bits(isa):
    assert sha256(frozen_block()) == FROZEN_HASH


def test_frozen_bits_of_the_reference():
    """Its fma is emulated exactly, so it meets the kernels to the last bit."""
    with use_backend("reference"):
        assert sha256(frozen_block()) == FROZEN_HASH


def test_philox_known_answers(golden):
    for known in golden["philox_known_answers"]:
        counter = [torch.tensor(int(word, 16)) for word in known["counter"]]
        key = [torch.tensor(int(word, 16)) for word in known["key"]]
        words = reference.philox4x32_10(counter, key)
        assert [f"{int(word):08x}" for word in words] == known["out"]


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def test_golden_words_and_normals(golden, isa):
    for known in golden["noise"]:
        seed, sample, draw, block = (int(known[k]) for k in ("seed", "sample", "draw", "block"))
        words = reference.noise_words(
            torch.tensor(block),
            torch.tensor(draw),
            torch.tensor(signed(seed)),
            torch.tensor(sample),
        )
        assert [f"{int(word):08x}" for word in words] == known["bits"]
        z = randn(
            [1, 4 * block + 4],
            seed=seed,
            sample_ids=[sample],
            stream=draw >> 24,
            index=draw & 0xFFFFFF,
        )
        exact = torch.tensor([float(value) for value in known["normals"]], dtype=torch.float64)
        assert (z[0, -4:].double() - exact).abs().max() < 1e-6


def exact_normals(w_even: np.ndarray, w_odd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The contract's formula in float64, from the words."""
    half = 0.5
    small = w_even < 2**31
    log_u = np.where(
        small,
        np.log((w_even + half) * 2.0**-32),
        np.log1p(-((0xFFFFFFFF - w_even) + half) * 2.0**-32),
    )
    r, theta = np.sqrt(-2 * log_u), 2 * np.pi * (w_odd * 2.0**-32)
    return r * np.cos(theta), r * np.sin(theta)


def test_accuracy_everywhere():
    """1e-6 absolute, at random words and where rounding is worst: both ends of U, all quadrants."""
    rng = np.random.default_rng(0)
    edges = np.concatenate(
        [np.arange(512), 2**31 - 256 + np.arange(512), 2**32 - 512 + np.arange(512)]
    )
    turns = (np.arange(8) * 2**29)[:, None] + np.arange(-64, 64)
    even = np.concatenate([rng.integers(0, 2**32, 500_000), np.repeat(edges, turns.size)])
    odd = np.concatenate(
        [rng.integers(0, 2**32, 500_000), np.tile(turns.ravel() % 2**32, edges.size)]
    )
    found = reference.box_muller(torch.from_numpy(even), torch.from_numpy(odd))
    for z, exact in zip(found, exact_normals(even, odd), strict=True):
        assert np.abs(z.double().numpy() - exact).max() < 1e-6
        assert np.abs(z.numpy()).max() < 6.765


def test_element_index_is_row_major_in_every_layout(isa):
    for shape in ([2, 3, 5, 7], [1, 4, 8, 8], [3, 1, 6, 6], [2, 70, 9, 11], [2, 3, 1, 1]):
        z = randn(shape, seed=3)
        last = randn(shape, seed=3, memory_format=torch.channels_last)
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(z, last)
        assert torch.equal(z.flatten(1), randn([shape[0], math.prod(shape[1:])], seed=3))
    volume = [2, 3, 4, 5, 6]
    assert torch.equal(
        randn(volume, seed=3), randn(volume, seed=3, memory_format=torch.channels_last_3d)
    )


def test_large_channels_last(isa):
    """Several tiles a sample, with pixel counts that are no multiple of 4."""
    shape = [1, 3, 67, 101]
    assert torch.equal(
        randn(shape, seed=9), randn(shape, seed=9, memory_format=torch.channels_last)
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_value_depends_on_its_address_alone(data):
    seed = data.draw(st.integers(0, 2**64 - 1))
    ids = data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6))
    stream, index = data.draw(st.integers(0, 255)), data.draw(st.integers(0, 2**24 - 1))
    elements = data.draw(st.integers(1, 700))
    address = {"seed": seed, "stream": stream, "index": index}
    batch = randn([len(ids), elements], sample_ids=ids, **address)
    for row, i in enumerate(ids):  # one by one
        assert torch.equal(batch[row : row + 1], randn([1, elements], sample_ids=[i], **address))
    order = data.draw(st.permutations(range(len(ids))))
    shuffled = randn([len(ids), elements], sample_ids=[ids[i] for i in order], **address)
    assert torch.equal(shuffled, batch[list(order)])
    longer = randn([len(ids), elements + 5], sample_ids=ids, **address)
    assert torch.equal(longer[:, :elements], batch)
    per_sample = randn(
        [len(ids), elements],
        sample_ids=torch.tensor(ids),
        seed=torch.full((len(ids),), signed(seed)),
        stream=stream,
        index=torch.full((len(ids),), index),
    )
    assert torch.equal(per_sample, batch)


def test_neighbouring_addresses_differ():
    base = randn([1, 64], seed=5, sample_ids=[7], stream=2, index=9)
    for change in (
        {"seed": 6},
        {"seed": 5 + 2**32},
        {"sample_ids": [8]},
        {"stream": 3},
        {"sample_ids": [7 + 2**32]},
        {"index": 10},
    ):
        other = randn([1, 64], **{"seed": 5, "sample_ids": [7], "stream": 2, "index": 9, **change})
        assert (other != base).sum() > 60


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_bits(threads):
    before = torch.get_num_threads()
    expected = randn([5, 3, 64, 64], seed=1)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(randn([5, 3, 64, 64], seed=1), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype, isa):
    shape = [3, 3, 17, 19]
    for layout in (torch.contiguous_format, torch.channels_last):
        low = randn(shape, seed=2, dtype=dtype, memory_format=layout)
        assert torch.equal(low, randn(shape, seed=2).to(dtype))


def test_training_timesteps_are_uniform():
    ids = torch.arange(200_000)
    t = reference.random_timesteps(10, torch.zeros_like(ids), ids)
    counts = torch.bincount(t, minlength=10).double()
    assert t.min() == 0
    assert t.max() == 9
    # χ² with 9 degrees of freedom: 33.7 has probability 1e-4.
    assert ((counts - 20_000) ** 2 / 20_000).sum() < 33.7
