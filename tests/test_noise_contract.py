"""docs/noise.md is enough to reimplement the noise: the implementation on the page gives the bits
of the kernels, its test vectors are right, and its table of streams is the code's."""

from __future__ import annotations

import ast
import hashlib
import math
import re
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FROZEN_HASH, FROZEN_SEED, FROZEN_SHAPE
from hypothesis import given
from hypothesis import strategies as st
from property_cases import examples

from ddpm_fast import DenoisingLoss, bits_per_dim, likelihood, randn, reference
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.training.dropout import AddressedDropout, SampleAddress
from ddpm_fast.training.order import data_order, flips

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "noise.md").read_text()


def part(heading: str) -> str:
    """The page from a heading to the next of its level or above."""
    level = heading.split(" ", 1)[0]
    return re.split(rf"^#{{1,{len(level)}}} ", PAGE.split(f"{heading}\n", 1)[1], flags=re.M)[0]


def rows(text: str, first: str) -> list[list[str]]:
    """The cells below the line of a table that begins with ``first``."""
    body = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in body]


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's block defines."""
    code = re.search(r"```python\n(.*?)```", part("## An implementation"), re.S)
    assert code is not None
    imported = [
        n for n in ast.walk(ast.parse(code[1])) if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    assert [ast.unparse(node) for node in imported] == ["import numpy as np"]
    names: dict[str, Any] = {}
    exec(compile(code[1], "docs/noise.md", "exec"), names)
    return names


def bits(values: np.ndarray | torch.Tensor) -> np.ndarray:
    return np.asarray(values, dtype=np.float32).view(np.uint32)


def signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def test_frozen_hash(page):
    ids = [0, 1, 2**31, 2**32 + 5, 2**40, 2**63 - 1]
    elements = int(np.prod(FROZEN_SHAPE[1:]))
    drawn = [page["normals"](FROZEN_SEED, i, 131, 777, 0, elements) for i in ids]
    assert hashlib.sha256(np.concatenate(drawn).astype("<f4").tobytes()).hexdigest() == FROZEN_HASH
    first = page["normals"](7, 4711, 0, 0, 0, 65536).astype("<f4")
    table = part("## Test vectors")
    assert f"`{hashlib.sha256(first.tobytes()).hexdigest()}`" in table
    assert f"`{FROZEN_HASH}`" in table


@examples(60)
@given(st.data())
def test_the_pages_bits_are_the_kernels(page, data):
    seed, sample = data.draw(st.integers(0, 2**64 - 1)), data.draw(st.integers(0, 2**63 - 1))
    stream, index = data.draw(st.integers(0, 255)), data.draw(st.integers(0, 2**24 - 1))
    first, count = data.draw(st.integers(0, 4000)), data.draw(st.integers(1, 300))
    address = {"seed": seed, "sample_ids": [sample], "stream": stream, "index": index}
    found = randn([1, first + count], **address)[0, first:]
    assert np.array_equal(
        bits(page["normals"](seed, sample, stream, index, first, count)), bits(found)
    )


def test_the_element_is_row_major_whatever_the_layout(page):
    x = randn([1, 3, 5, 7], seed=1, sample_ids=[9], memory_format=torch.channels_last)
    expected = page["normals"](1, 9, 0, 0, 0, 105).reshape(3, 5, 7)
    assert x[0, 2, 4, 1].item() == expected[2, 4, 1]
    assert np.array_equal(bits(x[0]), bits(expected))


def test_other_dtypes_are_rounded_once(page):
    z = page["normals"](3, 5, 128, 0, 0, 50_000)
    half = randn([1, 50_000], seed=3, sample_ids=[5], stream=128, dtype=torch.float16)[0]
    assert np.array_equal(z.astype(np.float16).view(np.uint16), half.numpy().view(np.uint16))
    upper, lower = bits(z) >> 16, bits(z) & 0xFFFF
    upper = upper + ((lower > 0x8000) | ((lower == 0x8000) & (upper % 2 == 1)))
    brain = randn([1, 50_000], seed=3, sample_ids=[5], stream=128, dtype=torch.bfloat16)[0]
    assert np.array_equal(upper, bits(brain.float()) >> 16)


def test_text_and_implementation_have_the_same_constants():
    def constants(text: str) -> set[str]:
        return set(re.findall(r"-?0x1[.0-9a-f]*p[+-]\d+|0x[0-9A-F]{8}", text))

    text = constants(part("## Words")) | constants(part("## Normals"))
    assert len(text) == 25
    assert text | {"0xFFFFFFFF"} == constants(part("## An implementation"))  # 2^32 - 1, a mask


def test_words_everywhere(page):
    """All pairs of words at the edges of what the page distinguishes, and random ones."""
    near = [0, 1, 255, 2**24 + 1, 2**31, 0xB504F280, 0xB504F300, 0xB504F333, 2**32 - 1]
    even = np.unique([(n + d) % 2**32 for n in near for d in range(-40, 41)])
    odd = np.unique([(n * 2**29 + d) % 2**32 for n in range(8) for d in range(-9, 10)])
    rng = np.random.default_rng(0)
    pairs = np.stack([g.ravel() for g in np.meshgrid(even, odd)])
    w = np.concatenate([pairs, rng.integers(0, 2**32, (2, 200_000))], 1).astype(np.uint64)
    found = page["box_muller"](*w)
    expected = reference.box_muller(*(torch.from_numpy(v.astype(np.int64)) for v in w))
    for z, exact in zip(found, expected, strict=True):
        assert np.array_equal(bits(z), bits(exact))


def test_the_pages_fma_rounds_once(page):
    """Sums that lie a hair beside the middle between two float32 numbers, which float64 loses."""
    products = np.array([2.0**-60, -(2.0**-60)], np.float32)
    a = np.float32(1 + 2.0**-12)  # a² = 1 + 2^-11 + 2^-24: the middle, exactly
    found = page["fma"](np.full(2, a), np.full(2, a), products)
    below = np.float32(1 + 2.0**-11)
    assert found.tolist() == [np.nextafter(below, np.float32(2)), below]


@pytest.mark.parametrize("row", rows(part("## Test vectors"), "seed"), ids=lambda row: row[0])
def test_vectors_of_addresses(page, row):
    seed, sample, block = (int(row[i], 16) for i in (0, 1, 4))
    stream, index = int(row[2]), int(row[3])
    words, expected = ([int(cell, 16) for cell in row[i].split()] for i in (5, 6))
    address = (torch.tensor(v) for v in (block, stream << 24 | index, signed(seed), sample))
    assert [int(word) for word in reference.noise_words(*address)] == words
    assert bits(page["normals"](seed, sample, stream, index, 4 * block, 4)).tolist() == expected
    if block < 2**21:
        z = randn([1, 4 * block + 4], seed=seed, sample_ids=[sample], stream=stream, index=index)
        assert bits(z[0, -4:]).tolist() == expected


def test_vectors_of_words(page):
    table = np.array([[int(c, 16) for c in row] for row in rows(part("## Test vectors"), "w_even")])
    assert len(table) == 16
    for z, expected in zip(
        page["box_muller"](*table[:, :2].T.astype(np.uint64)), table[:, 2:].T, strict=True
    ):
        assert np.array_equal(bits(z), expected)
    for z, expected in zip(
        reference.box_muller(*torch.from_numpy(table[:, :2].T)), table[:, 2:].T, strict=True
    ):
        assert np.array_equal(bits(z), expected)


def test_the_vectors_are_the_golden_ones(golden):
    """Those that were computed with 50 digits by other code are among the page's."""
    here = {" ".join(row[5].split()): row[6] for row in rows(part("## Test vectors"), "seed")}
    for known in golden["noise"]:
        found = np.array([int(z, 16) for z in here[" ".join(known["bits"])].split()], np.uint32)
        assert np.abs(found.view(np.float32) - np.array(known["normals"], float)).max() < 9e-7


def test_streams_are_the_codes():
    """Each stream that the package draws from stands in the table, and none has two meanings."""
    held = {}
    for path in sorted((ROOT / "ddpm_fast").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.Assign):
                continue
            names = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            for name, value in zip(names, values, strict=False):
                if isinstance(name, ast.Name) and re.fullmatch(r"(\w+_)?STREAM", name.id):
                    assert isinstance(value, ast.Constant)
                    held[f"{path.stem}.{name.id}"] = value.value
    core = (ROOT / "csrc" / "core" / "noise.h").read_text()
    assert f"kStreamReverseStep = {held['reverse_step_run.STREAM']};" in core
    listed = [row[0] for row in rows(part("### Streams"), "stream")]
    assert listed[-2:] == ["11 … 127", "128 … 255"]
    assert [int(stream) for stream in listed[:-2]] == list(range(11))
    assert sorted(held.values()) == list(range(1, 11)), held  # 0 is randn's default


def words_of(page, seed, sample, stream, index=0, block=0):
    counter = [np.array([c]) for c in (block, stream << 24 | index, sample % 2**32, sample >> 32)]
    return [int(w[0]) for w in page["philox4x32_10"](counter, (seed % 2**32, seed >> 32))]


def test_what_is_made_of_words(page):
    """Timesteps, flips, the order of a data set: in the page's words, in plain integers."""
    seed, count = 2**63 + 11, 40
    seeds, ids = torch.full((count,), signed(seed)), torch.arange(count) + 1000
    first = [words_of(page, seed, int(i), 3)[0] for i in ids]
    assert reference.random_timesteps(250, seeds, ids).tolist() == [w * 250 >> 32 for w in first]
    group = 7
    starts = [words_of(page, seed, int(i) // group * group, 3)[0] for i in ids]
    expected = [
        ((u + int(i) % group * 2**32 // group) % 2**32) * 250 >> 32
        for u, i in zip(starts, ids, strict=True)
    ]
    assert reference.antithetic_timesteps(250, group, seeds, ids).tolist() == expected
    assert flips(seed, ids).tolist() == [words_of(page, seed, int(i), 6)[0] >= 2**31 for i in ids]

    numbers = []
    for i in range(13):
        w = words_of(page, seed, 5, 8, block=i // 2)  # of epoch 5
        numbers.append((w[2 * i % 4] << 32 | w[2 * i % 4 + 1], i))
    epoch = [i for _, i in sorted(numbers)]
    assert data_order(13, 5 * 13 + 2, 11, seed).tolist() == epoch[2:]


def test_dropout_is_of_the_normals(page):
    address = SampleAddress(seed=6)
    address.sample_ids = torch.tensor([40])
    kept = AddressedDropout(0.3, address, 2)(torch.ones(1, 4, 5, 5)) != 0
    threshold = np.float32(NormalDist().inv_cdf(0.3))
    expected = page["normals"](6, 40, 9, 2, 0, 100) >= threshold
    assert kept.flatten().tolist() == expected.tolist()


def test_dropped_labels_are_of_the_word(page):
    loss, told = DenoisingLoss(NoiseSchedule.linear(9), label_dropout=0.3, null_label=7), []

    def model(x, t, class_labels):
        told.extend(class_labels.tolist())
        return x

    loss(
        model,
        torch.zeros(40, 1, 2, 2),
        seed=2,
        model_kwargs={"class_labels": torch.ones(40).long()},
    )
    bound = math.ceil(0.3 * 2**32)
    assert told == [7 if words_of(page, 2, i, 7)[0] < bound else 1 for i in range(40)]


@pytest.mark.parametrize(("num_steps", "evaluated"), [(50, 11), (50, 12), (1000, 3), (9, 8)])
def test_which_timesteps_a_likelihood_evaluates(page, num_steps, evaluated):
    found = bits_per_dim(
        lambda x, t: x,
        torch.zeros(3, 1, 2, 2),
        NoiseSchedule.cosine(num_steps),
        seed=4,
        sample_ids=[0, 8, 2**40],
        num_timesteps=evaluated,
    )
    for row, sample in zip(found.vlb, [0, 8, 2**40], strict=True):
        expected, begin, ranges = [0], 1, (evaluated - 1) // 2
        for k in range(1, ranges + 1):
            left = ranges - k + 1
            size = max(2, int(begin * ((num_steps / begin) ** (1 / left) - 1)))
            drawn = 2
            if left == 1:
                size, drawn = num_steps - begin, 2 if evaluated % 2 else 3
            free = list(range(begin, begin + size))
            words = words_of(page, 4, sample, likelihood.TIMESTEPS_STREAM, block=k)
            for w in words[:drawn]:
                expected.append(free.pop(w * len(free) >> 32))
            begin += size
        assert (~row.isnan()).nonzero()[:, 0].tolist() == sorted(expected)
