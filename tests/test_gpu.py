"""The kernels on a GPU: the frozen noise, the CPU's bits, the float64 formula, and more than 2^31
elements. Needs nothing but pytest, torch with CUDA and the package."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest
import torch
from gpu_backends import (
    BIG,
    FORMATS,
    gpu,
    on_each,  # noqa: F401
    same,
)
from helpers import (
    DTYPES,
    FROZEN_HASH,
    LAYOUTS,
    SHAPES,
    assert_as_good_as_eager,
    frozen_block,
    laid_out,
    sha256,
)
from machine_code import find_nvcc
from reverse_step_cases import SCHEDULE, SEED, VARIANCES, eagerly, exactly, inputs, table_of

from ddpm_fast import add_noise, randn, reference, reverse_step, use_backend

pytestmark = pytest.mark.gpu

GPU_SHAPES = [*SHAPES, (2, 3, 12, 14), (3, 4, 16, 20), (2, 3, 24, 25), (2, 3, 256, 256)]


@pytest.mark.sanitize
def test_frozen_noise(on):
    with use_backend(on.name):
        block = frozen_block("cuda")
    assert sha256(block) == FROZEN_HASH


def test_the_reference_on_a_gpu():
    """Plain PyTorch on the GPU: the frozen noise, and the CPU's step."""
    table = table_of(num_steps=50)
    x, m, _ = inputs((2, 3, 12, 14), torch.float32, table)
    with use_backend("reference"):
        assert sha256(frozen_block("cuda")) == FROZEN_HASH
        found = reverse_step(x.cuda(), m.cuda(), table, 7, seed=1)
    same(found, reverse_step(x, m, table, 7, seed=1))


def test_256_million_normals(on):
    """More addresses than the frozen block has, among them every place of the polynomial."""
    for sample in range(4):
        shape, ids = (1, 2**26), [sample]
        expected = randn(shape, seed=SEED, sample_ids=ids)
        found = on.randn(shape, seed=SEED, sample_ids=ids, device="cuda")
        assert torch.equal(found.cpu(), expected)


def test_every_root(tmp_path: Path):
    if find_nvcc() is None:
        pytest.skip("needs nvcc")
    source, program = Path(__file__).parent / "native" / "roots.cu", tmp_path / "roots"
    subprocess.run(
        [find_nvcc(), "-std=c++17", "-arch=native", str(source), "-o", str(program)], check=True
    )
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "compared, 0 differ" in run.stdout


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_randn(shape, layout, on):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = torch.contiguous_format
    if layout == "channels_last":
        memory_format = formats.get(len(shape), memory_format)
    ids = torch.arange(shape[0]) * 2**33 + 5
    for dtype in DTYPES:
        kwargs = {"stream": 9, "dtype": dtype, "memory_format": memory_format}
        expected = randn(shape, seed=SEED, sample_ids=ids, **kwargs)
        found = on.randn(shape, seed=SEED, sample_ids=ids.cuda(), device="cuda", **kwargs)
        same(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_add_noise(shape, dtype, layout, on):
    values = randn(shape, seed=1).clamp(-1, 1)
    x0 = (127.5 * (values + 1)).to(dtype) if dtype == torch.uint8 else values.to(dtype)
    x0, noise = laid_out(x0, layout), laid_out(randn(shape, seed=2), layout)
    t = torch.tensor([999, 3, 500])[: shape[0]]
    z = randn(shape, seed=5, stream=2, index=3)
    wide = reference.unit_from_pixel(x0.double()) if dtype == torch.uint8 else x0.double()
    for out, given in itertools.product(DTYPES, (None, noise)):
        kwargs = {"seed": 5, "index": 3, "dtype": out}
        expected = add_noise(x0, t, SCHEDULE, noise=given, **kwargs)
        found = on.add_noise(x0.cuda(), t.cuda(), SCHEDULE, noise=gpu(given), **kwargs)
        same(found, expected)
        eps = z if given is None else given
        exact = reference.q_sample(wide, t, SCHEDULE, eps.double())
        signal, sigma = (
            reference.at(SCHEDULE.forward_weights(x0.device)[:, i], t, wide).to(out) for i in (0, 1)
        )
        assert_as_good_as_eager(found.cpu(), signal * wide.to(out) + sigma * eps.to(out), exact)


# What Triton compiles here; its interpreter has every pair of types, on any machine.
COMPILED = {
    (torch.float32, torch.float32): "fixed_small",
    (torch.float32, torch.bfloat16): "learned_range",
    (torch.bfloat16, torch.bfloat16): "learned",
    (torch.float16, torch.float16): "fixed_large",
}


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [*itertools.product(DTYPES, DTYPES)], ids=str)
def test_reverse_step(dtypes, layout, variance, on):
    """Every pair of types, plain and with everything, against float64 and the CPU's bits."""
    if on.name == "triton" and COMPILED.get(dtypes) != variance:
        pytest.skip("triton: one variance of each of four pairs of types, to end in time")
    table = table_of("v_prediction", variance, num_steps=50)
    for shape in ((3, 3, 24, 28), (3, 4, 16, 20), (3, 3, 9, 11)):
        tensors = inputs(shape, dtypes[0], table, dtypes[1])
        x, m, uncond = (laid_out(tensor, layout) for tensor in tensors)
        steps = torch.tensor([0, 49, 25])
        z = randn(shape, seed=SEED, stream=1, index=table.timesteps[steps])
        scales = torch.tensor([0.0, 1.0, 2.5])
        for options in (
            {},
            {"model_output_uncond": uncond, "guidance_scale": scales},
            {"x0": laid_out(torch.sin(x), layout)},
        ):
            low = torch.empty_like(x, dtype=torch.bfloat16)
            kwargs = {"seed": SEED, "return_x0": True, **options}
            expected, x0 = reverse_step(x, m, table, steps, out_lowp=low, **kwargs)
            on_gpu = {name: gpu(value) for name, value in kwargs.items()}
            low_gpu = torch.empty_like(x, dtype=torch.bfloat16, device="cuda")
            found, x0_gpu = on.reverse_step(
                x.cuda(), m.cuda(), table, steps.cuda(), out_lowp=low_gpu, **on_gpu
            )
            same(found, expected)
            same(x0_gpu, x0)
            same(low_gpu, low)
            plain = on.reverse_step(x.cuda(), m.cuda(), table, steps.cuda(), **on_gpu)[0]
            same(plain, expected)
            exact = exactly(x, m, table, steps, z, clip=(-1.0, 1.0), **options)
            eager = eagerly(x, m, table, steps, z, clip=(-1.0, 1.0), **options)
            for i in range(3):
                assert_as_good_as_eager(found[i].cpu(), eager[0][i], exact[0][i])
        without_x0 = on.reverse_step(x.cuda(), m.cuda(), table, steps.cuda(), seed=SEED)
        same(without_x0, reverse_step(x, m, table, steps, seed=SEED))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(2, 3, 12, 14), (2, 3, 5, 7)], ids=str)
def test_noise_that_is_given(shape, layout, on):
    """In a row whose sigma is 0 it does not matter, NaN or not."""
    table = table_of("epsilon", "learned_range", num_steps=50)
    x, m, _ = (laid_out(t, layout) for t in inputs(shape, torch.float32, table))
    noise, steps = laid_out(randn(shape, seed=3), layout), torch.tensor([7, 49])
    noise[1] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        given = noise.to(dtype)
        expected = reverse_step(x, m, table, steps, seed=1, noise=given)
        found = on.reverse_step(x.cuda(), m.cuda(), table, steps.cuda(), seed=1, noise=given.cuda())
        same(found, expected)


def test_more_samples_than_a_grid_is_wide(on):
    x = randn((70_001, 3), seed=1)
    same(on.randn(x.shape, seed=1, device="cuda"), x)
    table, steps = table_of(num_steps=50), torch.arange(len(x)) % 50
    expected = reverse_step(x, x, table, steps, seed=1)
    same(on.reverse_step(x.cuda(), x.cuda(), table, steps.cuda(), seed=1), expected)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(2, 3, 12, 14), (2, 3, 24, 25), (2, 4, 16, 20)], ids=str)
def test_within_its_tensors(shape, layout, on):
    """What compute-sanitizer watches: each op, tiles that end early and single elements."""
    for dtype in (torch.float32, torch.bfloat16):
        for variance in ("fixed_small", "learned_range"):
            table = table_of("epsilon", variance, num_steps=50)
            tensors = inputs(shape, dtype, table)
            x, m, uncond = (laid_out(tensor, layout) for tensor in tensors)
            options = {"seed": 1, "guidance_scale": 1.5, "return_x0": True}
            expected = reverse_step(x, m, table, 7, model_output_uncond=uncond, **options)
            found = on.reverse_step(
                x.cuda(), m.cuda(), table, 7, model_output_uncond=uncond.cuda(), **options
            )
            same(found[0], expected[0])
            same(found[1], expected[1])
        same(on.add_noise(x.cuda(), 9, SCHEDULE, seed=1), add_noise(x, 9, SCHEDULE, seed=1))
        drawn = on.randn(shape, seed=1, dtype=dtype, device="cuda")
        assert torch.equal(drawn.cpu(), randn(shape, seed=1, dtype=dtype))


@pytest.mark.sanitize
def test_memory_that_vectors_cannot_reach(on):
    table = table_of(num_steps=50)
    x, m, _ = inputs((2, 3, 16, 16), torch.float32, table)
    shifted = torch.empty(x.numel() + 1, device="cuda")[1:].view(x.shape).copy_(x)
    expected = reverse_step(x, m, table, 7, seed=1)
    same(on.reverse_step(shifted, m.cuda(), table, 7, seed=1), expected)
    same(on.reverse_step(shifted, m.cuda(), table, 7, seed=1, out=shifted), expected)


@pytest.mark.sanitize
def test_nan_and_rows_out_of_range(on):
    table = table_of(num_steps=50)
    for shape in ((3, 3, 16, 16), (3, 3, 5, 5)):
        x, m, _ = (gpu(tensor) for tensor in inputs(shape, torch.float32, table))
        word = torch.full((1,), 99, dtype=torch.int32, device="cuda")
        on.reverse_step(x, m, table, 7, seed=1, nan_step=word)
        assert word.item() == 99
        m[1, 2, 4, 4] = torch.nan
        out = on.reverse_step(x, m, table, torch.tensor([9, 7, 3]).cuda(), seed=1, nan_step=word)
        assert word.item() == 7
        assert out.isnan().sum() == 1
        m[1, 2, 4, 4] = 0.0
        steps = torch.tensor([7, 50, -1]).cuda()
        out = on.reverse_step(x, m, table, steps, seed=1, nan_step=word)
        assert word.item() == -1
        inside = torch.tensor([7, 49, 49]).cuda()
        assert torch.equal(out, on.reverse_step(x, m, table, inside, seed=1))


@pytest.mark.parametrize("elements", [BIG, BIG - 3])
def test_more_elements_than_32_bits_count(elements, on):
    """4 GB of bfloat16, by vectors and one element at a time: the end is what its address says."""
    if torch.cuda.mem_get_info()[0] < 3 * 2 * BIG:
        pytest.skip("needs 13 GB of free GPU memory")
    torch.use_deterministic_algorithms(False)  # NaN in all of it would take its time
    x = on.randn((1, elements), seed=3, dtype=torch.bfloat16, device="cuda")
    first = elements // 4 * 4 - 4096
    blocks = torch.arange(first // 4, (elements + 3) // 4)
    words = reference.noise_words(blocks, torch.tensor(0), torch.tensor(3), torch.tensor(0))
    pairs = [*reference.box_muller(*words[:2]), *reference.box_muller(*words[2:])]
    expected = torch.stack(pairs, 1).flatten()[: elements - first]
    assert torch.equal(x[0, first:].cpu(), expected.bfloat16())

    table = table_of(num_steps=50)
    tail = x[:, first:].cpu()
    on.reverse_step(x, x, table, 49, seed=1, out=x)  # the last row draws nothing
    assert torch.equal(x[:, first:].cpu(), reverse_step(tail, tail, table, 49, seed=1))


def test_gradients(on):
    table = table_of(num_steps=50)
    x, m, _ = inputs((2, 3, 8, 8), torch.float32, table)
    leaves = [x.cuda().requires_grad_(), m.cuda().requires_grad_()]
    on.reverse_step(*leaves, table, 7, seed=1).square().sum().backward()
    on_host = [x.requires_grad_(), m.requires_grad_()]
    reverse_step(*on_host, table, 7, seed=1).square().sum().backward()
    for found, expected in zip(leaves, on_host, strict=True):
        torch.testing.assert_close(found.grad.cpu(), expected.grad)


def test_bad_arguments(on):
    table = table_of(num_steps=50)
    x, m, _ = inputs((2, 3, 8, 8), torch.float32, table)
    with pytest.raises(ValueError, match="model_output must be on cuda:0, as the others are"):
        on.reverse_step(x.cuda(), m, table, 7, seed=1)
    with pytest.raises(ValueError, match="step must be on cuda:0"):
        on.reverse_step(x.cuda(), m.cuda(), table, torch.tensor(7), seed=1)
    with pytest.raises(RuntimeError, match="takes CUDA tensors; got one on cpu"):
        on.reverse_step(x, m, table, 7, seed=1)
    before = torch.cuda.memory_allocated()
    with pytest.raises(torch.OutOfMemoryError):
        on.randn((2**14, 2**30), seed=1, device="cuda")
    assert torch.cuda.memory_allocated() == before
