"""The Triton kernels in Triton's interpreter. With a GPU's arithmetic lent to it their bits are the
CPU's, over dtypes, layouts, shapes and every variant; by itself it is a few units away."""

from __future__ import annotations

import itertools
from importlib import import_module

import pytest
import torch
from helpers import DTYPES, FROZEN_HASH, SHAPES, frozen_block, laid_out, sha256
from reverse_step_cases import SCHEDULE, SEED, VARIANCES, inputs, table_of
from triton_on_host import lend_arithmetic, needs_interpreter

import ddpm_fast
from ddpm_fast import Sampler, add_noise, randn, reference, reverse_step, use_backend

LAYOUTS = ["contiguous", "channels_last"]  # other strides are copied before any kernel sees them
# Whole tiles and more than one, of each layout; ends within a tile; vectors of 4 and of 8.
SHAPES = [shape for shape in SHAPES if shape not in ((3, 4, 16, 16), (2, 5, 67, 41))]
SHAPES += [
    (2, 5, 27, 21),
    (2, 3, 12, 14),
    (1, 4, 20, 20),
    (2, 2, 10, 10),
    (2, 2052),
    (2, 1, 28, 28),
]


@pytest.fixture(autouse=True)
def poisoned_interpreter(request, monkeypatch, poisoned_memory):
    """torch.empty gives NaN, so that what is not written shows."""
    needs_interpreter()
    if "own_arithmetic" not in request.fixturenames:
        lend_arithmetic(monkeypatch)


@pytest.fixture
def own_arithmetic():
    """The interpreter as it is."""


def interpreted(op, *args, **kwargs):
    with use_backend("triton"):
        return op(*args, **kwargs)


def same(found, expected):
    assert not found.isnan().any()
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


@pytest.mark.slow
def test_frozen_noise():
    with use_backend("triton"):
        block = frozen_block()
    assert sha256(block) == FROZEN_HASH


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_randn(shape):
    ids = torch.arange(shape[0]) * 2**33 + 5
    indices = torch.arange(shape[0]) + 2**24 - 5
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_formats = {torch.contiguous_format, formats.get(len(shape), torch.contiguous_format)}
    for dtype, memory_format in itertools.product(DTYPES, memory_formats):
        for seed, index in [(SEED, 7), (ids - 2**60, indices)][dtype == torch.float16 :]:
            kwargs = {"seed": seed, "sample_ids": ids, "stream": 200, "index": index}
            kwargs |= {"dtype": dtype, "memory_format": memory_format}
            same(interpreted(randn, shape, **kwargs), randn(shape, **kwargs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_noise(shape, layout):
    values, t = randn(shape, seed=1).clamp(-1, 1), torch.tensor([999, 3, 500])[: shape[0]]
    pixels = (127.5 * (values + 1)).byte()
    cases = [(values, torch.float32), (values.bfloat16(), torch.bfloat16), (pixels, torch.float32)]
    cases += [(values.half(), torch.float32), (pixels, torch.bfloat16)]
    for x0, dtype in cases:
        kwargs = {"seed": 5, "index": 3, "dtype": dtype}
        x0 = laid_out(x0, layout)
        same(
            interpreted(add_noise, x0, t, SCHEDULE, **kwargs), add_noise(x0, t, SCHEDULE, **kwargs)
        )
    noise = laid_out(randn(shape, seed=2), layout)
    kwargs = {"seed": 5, "noise": noise}
    same(interpreted(add_noise, x0, 7, SCHEDULE, **kwargs), add_noise(x0, 7, SCHEDULE, **kwargs))


def step_both(x, m, table, step, **kwargs):
    """A step of both backends: every output of it."""
    results = []
    for backend in ("triton", "cpu"):
        low = torch.empty_like(x, dtype=torch.bfloat16)
        word = torch.full((1,), 99, dtype=torch.int32)
        with use_backend(backend):
            out, x0 = reverse_step(
                x, m, table, step, out_lowp=low, nan_step=word, return_x0=True, **kwargs
            )
        results.append((out, x0, low, word))
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reverse_step_shapes(shape, layout):
    for dtype, variance in (
        (torch.float32, "fixed_large"),
        (torch.float32, "learned_range"),
        (torch.bfloat16, "learned"),
    ):
        table = table_of("v_prediction", variance, num_steps=50)
        x, m, _ = (laid_out(tensor, layout) for tensor in inputs(shape, dtype, table))
        steps = torch.tensor([0, 49, 25])[: shape[0]]
        for found, expected in zip(*step_both(x, m, table, steps, seed=SEED), strict=True):
            same(found, expected)


# Every pair of dtypes, and every variance with vectors of 4 and of 8.
CASES = [(*pair, VARIANCES[i % 4]) for i, pair in enumerate(itertools.product(DTYPES, DTYPES))]
CASES += [(torch.float32, torch.float32, "learned"), (torch.bfloat16, torch.bfloat16, "learned")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reverse_step_variants(case, layout):
    """Guidance, x0 and noise that are given, one row for all on the device, no clip."""
    *dtypes, variance = case
    table = table_of("epsilon", variance, num_steps=50)
    for shape in ((3, 3, 4, 8), (2, 4, 3, 3)):
        tensors = inputs(shape, dtypes[0], table, dtypes[1])
        x, m, uncond = (laid_out(tensor, layout) for tensor in tensors)
        scales = torch.tensor([0.0, 1.0, 2.5])[: shape[0]]
        ids = torch.arange(shape[0]) * 2**40
        for step, options in (
            (torch.tensor(7), {"model_output_uncond": uncond, "guidance_scale": scales}),
            (0, {"model_output_uncond": uncond, "guidance_scale": 1.5, "clip": None}),
            (49, {"x0": laid_out(torch.sin(x), layout), "noise": torch.full_like(x, torch.nan)}),
            (3, {"noise": laid_out(randn(shape, seed=8), layout), "clip": (-0.5, 0.25)}),
        ):
            both = step_both(x, m, table, step, seed=ids, sample_ids=ids, **options)
            for found, expected in zip(*both, strict=True):
                same(found, expected)


@pytest.mark.parametrize("shape", [(3, 3, 16, 16), (3, 3, 5, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_is_passed_and_told(shape, layout):
    table = table_of(num_steps=50)
    x, m, _ = (laid_out(tensor, layout) for tensor in inputs(shape, torch.float32, table))
    m[1, 2, 4, 4] = torch.nan
    found, expected = step_both(x, m, table, torch.tensor([9, 7, 3]), seed=1)
    for result, wanted in zip(found, expected, strict=True):
        assert torch.equal(result.nan_to_num(99), wanted.nan_to_num(99))
    assert found[3].item() == 7


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_variance_that_nobody_asks_for_may_be_nan(layout, variance):
    """In the last row, whose sigma is 0, and where the method ignores it."""
    for table in (
        table_of("epsilon", variance, num_steps=50),
        table_of("epsilon", variance, num_steps=50, method="ddim"),
    ):
        x, m, _ = (laid_out(t, layout) for t in inputs((2, 3, 4, 4), torch.float32, table))
        m[:, 3:] = torch.nan
        for found, expected in zip(*step_both(x, m, table, 49, seed=1), strict=True):
            same(found, expected)


def test_rows_and_timesteps_out_of_range(monkeypatch):
    """As on a GPU, where nobody reads them back first: the last of each, and -1 told."""
    checks = import_module("ddpm_fast.ops.checks")
    monkeypatch.setattr(checks, "check_range_on_host", lambda *_: None)
    table = table_of(num_steps=50)
    x, m, _ = inputs((3, 3, 5, 5), torch.float32, table)
    word = torch.full((1,), 99, dtype=torch.int32)
    outside, inside = torch.tensor([7, 50, -(2**40)]), torch.tensor([7, 49, 49])
    found = interpreted(reverse_step, x, m, table, outside, seed=1, nan_step=word)
    same(found, reverse_step(x, m, table, inside, seed=1))
    assert word.item() == -1
    outside, inside = torch.tensor([-1, 1000, 5]), torch.tensor([999, 999, 5])
    found = interpreted(add_noise, x, outside, SCHEDULE, seed=1)
    same(found, add_noise(x, inside, SCHEDULE, seed=1))
    indices = torch.tensor([2**24 + 3, 3, 2**40 + 9])
    found = interpreted(randn, (3, 4), seed=1, index=indices)
    same(found, randn((3, 4), seed=1, index=torch.tensor([3, 3, 9])))


def test_more_samples_than_a_grid_is_wide(monkeypatch):
    """The grid of such a batch; and batches on grids that are 2 samples wide."""
    launch = import_module("ddpm_fast.kernels.launch")
    cut = launch.cut(3, 16, False, 4)
    assert cut.grid(65_535) == (1, 65_535, 1)
    assert cut.grid(65_536) == (1, 65_535, 2)
    assert cut.grid(2**31) == (1, 65_535, 32_769)
    for name in ("launch", "randn", "add_noise", "reverse_step"):
        monkeypatch.setattr(import_module(f"ddpm_fast.kernels.{name}"), "SAMPLES_Y", 2)
    table, steps = table_of(num_steps=50), torch.arange(7)
    x, m, _ = inputs((7, 3, 4, 4), torch.float32, table)
    guarded = torch.full((9, 3, 4, 4), 5.0)  # an eighth sample would be written behind the seventh
    interpreted(reverse_step, x, m, table, steps, seed=steps, out=guarded[:7])
    same(guarded[:7], reverse_step(x, m, table, steps, seed=steps))
    assert (guarded[7:] == 5).all()
    same(interpreted(add_noise, x, steps, SCHEDULE, seed=1), add_noise(x, steps, SCHEDULE, seed=1))
    same(interpreted(randn, x.shape, seed=1), randn(x.shape, seed=1))


@pytest.mark.parametrize("elements", [2**31 + 520, 2**31 + 517])
def test_more_elements_than_32_bits_count(elements, monkeypatch):
    """The last tile of a tensor of 4 GB, which is all of it that anyone touches."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    launch = import_module("ddpm_fast.kernels.launch")
    cut = launch.cut(1, elements, False, 8)
    last = cut.grid(1)[0] - 1
    program_id = InterpreterBuilder.create_get_program_id

    def of_the_last_tile(self, axis):
        found = program_id(self, axis)
        return TensorHandle(found.data + last, found.dtype) if axis == 0 else found

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", of_the_last_tile)
    monkeypatch.setattr(launch.Cut, "grid", lambda self, samples: (1, samples, 1))
    torch.use_deterministic_algorithms(False)  # NaN in all of it would take memory
    first = last * cut.tiling.tile
    blocks = torch.arange(first // 4, (elements + 3) // 4)
    words = reference.noise_words(blocks, torch.tensor(0), torch.tensor(3), torch.tensor(0))
    pairs = [*reference.box_muller(*words[:2]), *reference.box_muller(*words[2:])]
    expected = torch.stack(pairs, 1).flatten()[: elements - first].bfloat16()

    x = interpreted(randn, (1, elements), seed=3, dtype=torch.bfloat16)
    assert torch.equal(x[0, first:], expected)
    table, tail = table_of(num_steps=50), expected[None]
    wanted = reverse_step(tail, tail, table, 49, seed=1)  # the last row draws nothing
    interpreted(reverse_step, x, x, table, 49, seed=1, out=x)
    assert torch.equal(x[:, first:], wanted)


def test_alone_and_in_place():
    """One output only, as a sampler has it."""
    table = table_of(num_steps=50)
    x, m, _ = inputs((2, 3, 12, 14), torch.float32, table)
    expected = reverse_step(x, m, table, 7, seed=1)
    same(interpreted(reverse_step, x, m, table, 7, seed=1), expected)
    result = interpreted(reverse_step, x, m, table, 7, seed=1, out=x)
    assert result is x
    same(x, expected)


def test_gradients_and_tracing():
    table = table_of(num_steps=50)
    x, m, _ = inputs((2, 3, 4, 4), torch.float32, table)
    x.requires_grad_()
    interpreted(reverse_step, x, m, table, 7, seed=1).square().sum().backward()
    (expected,) = torch.autograd.grad(reverse_step(x, m, table, 7, seed=1).square().sum(), x)
    torch.testing.assert_close(x.grad, expected)

    def f(x):
        return reverse_step(x, m, table, 7, seed=1) + add_noise(x, 3, SCHEDULE, seed=1)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    x = x.detach()
    assert torch.equal(interpreted(compiled, x), f(x))


def test_sampler():
    def samples(backend):
        sampler = Sampler(
            lambda x, t: 0.5 * x, SCHEDULE, variance="fixed_large", num_steps=5, backend=backend
        )
        return sampler.sample([2, 3, 8, 8], seed=4, sample_ids=[5, 2**40])

    same(samples("triton"), samples("cpu"))


def test_the_interpreter_as_it_is(own_arithmetic):
    """Until Triton 3.9 it rounds twice where a GPU rounds once."""
    table = table_of(num_steps=50)
    x, m, _ = inputs((2, 3, 12, 14), torch.float32, table)
    expected = reverse_step(x, m, table, 7, seed=1)
    found = interpreted(reverse_step, x, m, table, 7, seed=1)
    assert (found - expected).abs().max() < 2e-6
    assert (interpreted(randn, (1, 4096), seed=1) - randn((1, 4096), seed=1)).abs().max() < 1e-6


def test_the_status_says_that_it_is_interpreted():
    status = ddpm_fast.backends()["triton"]
    assert status.available
    assert "interpreted on the host, slowly, as TRITON_INTERPRET says: CPU tensors only" in str(
        status
    )
    select = import_module("ddpm_fast.backends").select
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"takes CPU tensors; got .*meta"):
        select(torch.device("meta"))
