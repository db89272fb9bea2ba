"""The CUDA kernels' bodies, run on the host: which of them takes a problem, and the CPU's bits from
every tile of odd-shaped ones. Their tests against float64 are the ops' own (fixture ``isa``)."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import cuda_on_host
import pytest
import torch
from helpers import DTYPES, laid_out, poisoned_like
from reverse_step_cases import SCHEDULE, SEED, inputs, table_of

from ddpm_fast import add_noise, randn, reference, reverse_step

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Vectors fit all of them but the last two; tiles of 512 elements, or 384 and 768, end where they
# like.
SHAPES = [
    (2, 256),
    (3, 520),
    (2, 3, 12, 14),
    (1, 3, 32, 32),
    (3, 4, 16, 20),
    (2, 3, 24, 25),
    (2, 1, 20, 20),
    (1, 8, 12, 12),
    (2, 3, 2, 8, 12),
    (2, 3, 9, 11),
    (5, 3),
]
FORMATS = ["contiguous", "channels_last"]


def same_bits(on_host: ModuleType, call) -> str:
    """call() gives one tensor or several; returns the body that ran."""
    expected, found = call(), on_host.run(call)
    if isinstance(expected, torch.Tensor):
        expected, found = (expected,), (found,)
    for a, b in zip(expected, found, strict=True):
        assert not b.isnan().any()
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    return on_host.last_body()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_randn(shape, layout, on_host):
    for dtype in DTYPES:
        memory_format = torch.contiguous_format
        if layout == "channels_last" and len(shape) > 3:
            memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        same_bits(
            on_host,
            lambda dtype=dtype, memory_format=memory_format: randn(
                shape, seed=SEED, stream=9, index=4, dtype=dtype, memory_format=memory_format
            ),
        )


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_noise(shape, layout, on_host):
    values = randn(shape, seed=1).clamp(-1, 1)
    t = torch.tensor([999, 3, 500])[: shape[0]] if shape[0] < 4 else 7
    for dtype in [*DTYPES, torch.uint8]:
        x0 = (127.5 * (values + 1)).to(dtype) if dtype == torch.uint8 else values.to(dtype)
        x0, noise = laid_out(x0, layout), laid_out(randn(shape, seed=2), layout)
        for out, given in itertools.product(DTYPES, (None, noise, noise.bfloat16())):
            same_bits(
                on_host,
                lambda x0=x0, out=out, given=given: add_noise(
                    x0, t, SCHEDULE, seed=5, index=3, noise=given, dtype=out
                ),
            )


def options_of(shape, variant, table, uncond):
    options = {}
    if "guidance" in variant:
        options |= {"model_output_uncond": uncond, "guidance_scale": torch.tensor(1.7)}
    if "x0 out" in variant:
        options["return_x0"] = True
    if "x0 in" in variant:
        options["x0"] = randn(shape, seed=8).bfloat16()
    if "noise" in variant:
        options["noise"] = randn(shape, seed=9).half()
    return options


VARIANTS = ["plain", "guidance", "x0 out", "x0 in, noise", "guidance, x0 out, noise"]


# Learned variances come in channels.
CASES = [("fixed_small", shape) for shape in SHAPES]
CASES += [("learned_range", shape) for shape in SHAPES if len(shape) > 2]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("variance", "shape"), CASES, ids=str)
def test_reverse_step(shape, layout, variance, on_host):
    table = table_of("v_prediction", variance, num_steps=50)
    steps = (
        torch.arange(49, 49 - 12 * shape[0], -12) % 50
    )  # the last row, without noise, among them
    for dtype, model_dtype in itertools.product(DTYPES, DTYPES):
        tensors = inputs(shape, dtype, table, model_dtype)
        x, m, uncond = (laid_out(tensor, layout) for tensor in tensors)
        for variant in VARIANTS:
            options = options_of(shape, variant, table, uncond)
            for out, lowp in itertools.product((False, True), (None, *DTYPES[1:])):

                def call(x=x, m=m, options=options, out=out, lowp=lowp):
                    low = None if lowp is None else poisoned_like(x, lowp)
                    target = x.clone() if out else None  # in place
                    result = reverse_step(
                        x if target is None else target, m, table, steps, seed=SEED,
                        out=target, out_lowp=low, **options,
                    )  # fmt: skip
                    found = result if isinstance(result, tuple) else (result,)
                    return found if low is None else (*found, low)

                same_bits(on_host, call)


@pytest.mark.parametrize(
    ("shape", "layout", "dtypes", "variant", "body"),
    [
        ((2, 3, 32, 32), "contiguous", "ff", "plain", "Float32, Float32, Contiguous<4>, 0"),
        ((2, 3, 32, 32), "contiguous", "fb", "plain", "Float32, BFloat16, Contiguous<4>, 0"),
        ((2, 3, 32, 32), "contiguous", "bb", "plain", "BFloat16, BFloat16, Contiguous<8>, 0"),
        ((2, 3, 32, 32), "contiguous", "hh", "guidance", "Float16, Float16, Contiguous<8>, 1"),
        ((2, 3, 32, 32), "contiguous", "fh", "x0 out", "Float32, Float16, Contiguous<4>, 7"),
        ((2, 3, 32, 32), "channels_last", "ff", "plain", "Float32, ChannelsLast<3, 4, 4>, 0"),
        ((2, 3, 32, 32), "channels_last", "bb", "plain", "BFloat16, ChannelsLast<3, 8, 8>, 0"),
        ((2, 4, 32, 32), "channels_last", "ff", "noise", "Float32, ChannelsLast<4, 4, 4>, 7"),
        ((2, 4, 32, 32), "channels_last", "hh", "plain", "Float16, ChannelsLast<4, 4, 8>, 0"),
        ((2, 1, 32, 32), "channels_last", "ff", "plain", "Float32, Contiguous<4>, 0"),
        ((2, 5, 32, 32), "channels_last", "ff", "plain", "ReverseStepBlock"),
        ((2, 3, 31, 31), "contiguous", "ff", "plain", "ReverseStepBlock"),
        ((2, 3, 9, 9), "contiguous", "ff", "plain", "ReverseStepBlock"),
        ((2, 3, 32, 32), "contiguous", "bf", "plain", "ReverseStepBlock"),
    ],
)
def test_body_for_a_problem(shape, layout, dtypes, variant, body, on_host):
    named = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}
    table = table_of(num_steps=50)
    tensors = inputs(shape, named[dtypes[0]], table, named[dtypes[1]])
    x, m, uncond = (laid_out(tensor, layout) for tensor in tensors)
    options = options_of(shape, variant, table, uncond)
    found = same_bits(on_host, lambda: reverse_step(x, m, table, 7, seed=1, **options))
    assert body in found.replace("ddpm_fast::", "").replace("cuda::", "")


def test_body_for_learned_variances(on_host):
    table = table_of("epsilon", "learned_range", num_steps=50)
    for channels, layout, body in (
        (3, "contiguous", "Contiguous<4>, 2"),
        (3, "channels_last", "ChannelsLast<3, 4, 4>, 2"),
        (1, "contiguous", "Contiguous<4>, 2"),
        (1, "channels_last", "Contiguous<4>, 2"),
        (5, "channels_last", "ReverseStepBlock"),
    ):
        x, m, _ = inputs((2, channels, 32, 32), torch.float32, table)
        x, m = laid_out(x, layout), laid_out(m, layout)
        found = same_bits(on_host, lambda x=x, m=m: reverse_step(x, m, table, 7, seed=1))
        assert body in found.replace("ddpm_fast::", "").replace("cuda::", "")


def test_memory_that_vectors_cannot_reach(on_host):
    """A tensor that begins 4 bytes past a multiple of 16 is read an element at a time."""
    table = table_of(num_steps=50)
    x, m, _ = inputs((2, 3, 16, 16), torch.float32, table)
    shifted = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    assert shifted.data_ptr() % 16 == 4
    body = same_bits(on_host, lambda: reverse_step(shifted, m, table, 7, seed=1))
    assert "ReverseStepBlock" in body
    for out in (torch.zeros_like(x), shifted):
        expected = reverse_step(x, m, table, 7, seed=1)
        on_host.run(lambda out=out: reverse_step(x, m, table, 7, seed=1, out=out))
        assert torch.equal(out, expected)


def test_nothing_but_the_result_is_written(on_host):
    """Neighbours of an output keep their values, at a tile's end and at a sample's."""
    table = table_of(num_steps=50)
    for shape, dtype in (((2, 3, 12, 14), torch.float32), ((1, 520), torch.bfloat16)):
        x, m, _ = inputs(shape, dtype, table)
        memory = torch.full((x.numel() + 64,), 3.0, dtype=dtype)
        out = memory[32:-32].view(shape)
        on_host.run(lambda x=x, m=m, out=out: reverse_step(x, m, table, 7, seed=1, out=out))
        assert (memory[:32] == 3).all()
        assert (memory[-32:] == 3).all()
        assert torch.equal(out, reverse_step(x, m, table, 7, seed=1))


def test_rows_and_timesteps_out_of_range(on_host, monkeypatch):
    """On a device they cannot be checked before the launch: they are brought into the table."""
    monkeypatch.setattr(import_module("ddpm_fast.ops.checks"), "check_range_on_host", lambda *_: 0)
    table = table_of(num_steps=50)
    for shape in ((3, 3, 16, 16), (3, 5)):
        x, m, _ = inputs(shape, torch.float32, table)
        word = torch.full((1,), 99, dtype=torch.int32)
        steps = torch.tensor([7, 50, -1])
        out = on_host.run(
            lambda x=x, m=m, steps=steps, word=word: reverse_step(
                x, m, table, steps, seed=1, nan_step=word
            )
        )
        assert word.item() == -1
        assert torch.equal(out, reverse_step(x, m, table, torch.tensor([7, 49, 49]), seed=1))
        noised = on_host.run(
            lambda x=x: add_noise(x, torch.tensor([7, 1000, -1]), SCHEDULE, seed=1)
        )
        assert torch.equal(noised, add_noise(x, torch.tensor([7, 999, 999]), SCHEDULE, seed=1))
        drawn = on_host.run(
            lambda shape=shape: randn(shape, seed=1, index=torch.tensor([7, 2**24 + 5, -1]))
        )
        assert torch.equal(drawn, randn(shape, seed=1, index=torch.tensor([7, 5, 2**24 - 1])))


def test_nan_past_the_end_is_not_reported(on_host):
    """The lanes past a sample's end see nothing of the memory behind it."""
    table = table_of(num_steps=50)
    memory = torch.full((2 * 520 + 4096,), torch.nan)
    x = memory[:1040].view(2, 520).copy_(randn((2, 520), seed=1))
    word = torch.full((1,), 99, dtype=torch.int32)
    on_host.run(lambda: reverse_step(x, x, table, 7, seed=1, out=x, nan_step=word))
    assert word.item() == 99
    assert memory[1040:].isnan().all()


@pytest.mark.parametrize("elements", [2**31 + 520, 2**31 + 517])
def test_more_elements_than_32_bits_count(elements, on_host):
    """The last tiles of one sample of 2^31 elements and of many: addresses take 64 bits."""
    on_host.set_most_tiles(64)
    for shape in ((1, elements), (3, elements // 3 // 8 * 8 + elements % 8)):
        out = on_host.run(lambda shape=shape: lazily(shape))
        assert out.numel() > 2**31 - 64
        per_sample = shape[1]
        first = per_sample // 4 * 4 - 63 * 4
        blocks = torch.arange(first // 4, (per_sample + 3) // 4)
        words = reference.noise_words(
            blocks, torch.tensor(0), torch.tensor(3), torch.tensor(shape[0] - 1)
        )
        pairs = [*reference.box_muller(*words[:2]), *reference.box_muller(*words[2:])]
        expected = torch.stack(pairs, 1).flatten()[: per_sample - first]
        assert torch.equal(out[-1, first:], expected.to(torch.bfloat16))


def lazily(shape):
    """randn without its memory filled first: pages that no tile writes are never there."""
    torch.use_deterministic_algorithms(False)
    return randn(shape, seed=3, dtype=torch.bfloat16)


@pytest.mark.slow
def test_under_address_and_undefined_behaviour_sanitizers():
    """The bodies' tests once more: each lane keeps inside its tensors, reading and writing."""
    runtimes = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True)
        if found.returncode != 0 or not Path(found.stdout.strip()).is_absolute():
            pytest.skip(f"needs gcc's {name}")
        runtimes.append(found.stdout.strip())
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", __file__,
            str(Path(__file__).with_name("test_cuda_objective.py")),
            str(Path(__file__).with_name("test_cuda_group_norm_silu.py")),
            "-m", "not slow", "-k", "not 32_bits and not 64_bits",
        ],
        env={
            **os.environ,
            "TEST_CXXFLAGS": "-fsanitize=address,undefined -fno-sanitize-recover=all -g1",
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        },
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert " passed" in run.stdout


def test_division():
    """By every divisor up to 3000 and some large ones, next to their multiples and at random."""
    quotient = cuda_on_host.load().quotient
    rng = random.Random(0)
    for divisor in [*range(1, 3001), 2**20, 2**20 + 1, 2**30 - 1, 2**30 + 1, 2**31 - 1]:
        most = (2**31 - 1) // divisor
        for multiple in {0, 1, most, most // 2, rng.randint(0, most)}:
            for n in (multiple * divisor - 1, multiple * divisor, multiple * divisor + 1):
                if 0 <= n < 2**31:
                    assert quotient(n, divisor) == n // divisor
