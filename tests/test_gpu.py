"""The kernels on a GPU: the frozen noise, the CPU's bits, the float64 formula, graphs, streams, and
more than 2^31 elements. Needs nothing but pytest, torch with CUDA and the package."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import (
    DTYPES,
    FROZEN_HASH,
    LAYOUTS,
    SHAPES,
    assert_as_good_as_eager,
    frozen_block,
    laid_out,
    no_gpu,
    sha256,
)
from machine_code import find_nvcc
from reverse_step_cases import SCHEDULE, SEED, VARIANCES, eagerly, exactly, inputs, table_of

import ddpm_fast
from ddpm_fast import (
    Sampler,
    add_noise,
    denoising_loss,
    hybrid_loss,
    randn,
    reference,
    reverse_step,
    use_backend,
    vlb_terms,
)

pytestmark = pytest.mark.gpu

BACKENDS = ["cuda", "triton"]
GPU_SHAPES = [*SHAPES, (2, 3, 12, 14), (3, 4, 16, 20), (2, 3, 24, 25), (2, 3, 256, 256)]
FORMATS = ["contiguous", "channels_last"]
BIG = 2**31 + 520


class On:
    """The ops on one backend for GPUs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, op: str):
        def run(*args, **kwargs):
            with use_backend(self.name):
                return getattr(ddpm_fast, op)(*args, **kwargs)

        return run


@pytest.fixture(params=BACKENDS, autouse=True)
def on(request: pytest.FixtureRequest):
    """Each backend for GPUs that runs here; tensors on the CPU keep to the CPU's kernels."""
    status = ddpm_fast.backends()[request.param]
    if no_gpu() or not status.available:
        pytest.skip(f"{request.param}: {status.detail}")
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    yield On(request.param)
    torch.use_deterministic_algorithms(False)


def gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bits, and strides."""
    assert found.is_cuda
    assert not found.isnan().any()
    assert torch.equal(found.cpu(), expected)
    assert found.stride() == expected.stride()


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


@pytest.mark.parametrize("counted", [(), (4,)], ids=["one row", "a row a sample"])
def test_a_captured_step_serves_every_step(counted, on):
    """One graph of a step and its counter; inputs, seeds and scales change between replays."""
    table = table_of(num_steps=20).to("cuda")
    shape = (4, 3, 32, 32)
    x, m, uncond = (torch.zeros(shape, device="cuda") for _ in range(3))
    counter = torch.zeros(counted, dtype=torch.int64, device="cuda")
    seeds, ids = (torch.zeros(4, dtype=torch.int64, device="cuda") for _ in range(2))
    scale = torch.ones(counted, device="cuda")

    def step():
        on.reverse_step(x, m, table, counter, seed=seeds, sample_ids=ids, out=x,
                        model_output_uncond=uncond, guidance_scale=scale)  # fmt: skip
        counter.add_(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for run in range(2):
        start = randn(shape, seed=run)
        seeds.fill_(run + 5)
        ids.copy_(torch.arange(4) * 7 + run)
        scale.fill_(1.5 + run)
        x.copy_(start)
        counter.zero_()
        expected = start
        for row in range(len(table)):
            outputs = [randn(shape, seed=1000 * run + 2 * row + i).mul_(0.1) for i in (0, 1)]
            m.copy_(outputs[0])
            uncond.copy_(outputs[1])
            graph.replay()
            expected = reverse_step(
                expected, outputs[0], table, row, seed=run + 5, model_output_uncond=outputs[1],
                sample_ids=torch.arange(4) * 7 + run, guidance_scale=1.5 + run,
            )  # fmt: skip
            same(x, expected)


def test_the_current_stream_is_used(on):
    """Behind work that takes a while: on the wrong stream the kernel would come too soon."""
    table = table_of(num_steps=50).to("cuda")
    x, m, _ = inputs((2, 3, 32, 32), torch.float32, table)
    expected = reverse_step(x, m, table, 7, seed=1)
    source, target, m = x.cuda(), torch.zeros_like(x, device="cuda"), m.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on.reverse_step(target, m, table, 7, seed=1)  # loads the kernel, and leaves memory for it
        torch.cuda._sleep(1_000_000_000)
        target.copy_(source)
        out = on.reverse_step(target, m, table, 7, seed=1)
        assert not side.query()  # the host has come here first
    side.synchronize()
    same(out, expected)


def test_nothing_waits_for_the_gpu(on):
    table = table_of(num_steps=50).to("cuda")
    x, m, _ = (gpu(tensor) for tensor in inputs((2, 3, 32, 32), torch.float32, table_of()))
    steps, seeds = torch.tensor([3, 4]).cuda(), torch.tensor([8, 9]).cuda()
    word = torch.full((1,), 99, dtype=torch.int32, device="cuda")
    SCHEDULE.forward_weights(x.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (7, steps, steps[0]):
            on.reverse_step(x, m, table, step, seed=seeds, sample_ids=seeds, nan_step=word, out=x)
            on.add_noise(x, steps, SCHEDULE, seed=seeds)
            on.randn(x.shape, seed=seeds, index=steps, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


def test_every_gpu_of_the_machine(on):
    """Tensors of a GPU that is not the current one."""
    table = table_of(num_steps=50)
    x, m, _ = inputs((2, 3, 32, 32), torch.float32, table)
    expected = reverse_step(x, m, table, 7, seed=1)
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        found = on.reverse_step(x.to(device), m.to(device), table, 7, seed=1)
        assert torch.equal(found.cpu(), expected)
        assert torch.cuda.current_device() == 0
    if torch.cuda.device_count() == 1:
        pytest.skip("one GPU: another that is not the current one could not be tried")


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_sampler(low, on):
    """A model whose arithmetic is exact: the samples are the CPU's to the last bit."""

    class Halves(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((), 0.5, dtype=low or torch.float32))

        def forward(self, x, t):
            return x * self.weight

    def samples(device, backend):
        model, kwargs = Halves().to(device).eval(), {"variance": "fixed_large", "num_steps": 25}
        sampler = Sampler(model, SCHEDULE, backend=backend, **kwargs)
        return sampler.sample([3, 3, 32, 32], seed=4, sample_ids=[5, 9, 2**40])

    assert torch.equal(samples("cuda", on.name).cpu(), samples("cpu", "cpu"))


def test_compiles_whole(on):
    table = table_of(num_steps=50).to("cuda")
    x, m, _ = (gpu(tensor) for tensor in inputs((2, 3, 16, 16), torch.float32, table_of()))

    def f(x, m):
        noise = randn(x.shape, seed=1, device="cuda")
        return reverse_step(x, m, table, 7, seed=1) + add_noise(x, 3, SCHEDULE, seed=1) + noise

    with use_backend(on.name):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, m), f(x, m))


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


# What Triton compiles of the objective, to end in time.
COMPILED_OBJECTIVE = {
    torch.float32: "fixed_large",
    torch.bfloat16: "learned_range",
    torch.float16: "learned",
}
OBJECTIVE_VARIANCES = ["fixed_small", "fixed_large", "learned", "learned_range"]


def objective_inputs(shape, dtype, x0_dtype, variance, layout="contiguous"):
    """A model's output, x_0, and eps that is given."""
    pixels = (127.5 + 127.5 * randn(shape, seed=1).clamp(-1, 1)).byte()
    wide = reference.unit_from_pixel(pixels)
    parts = [wide + 0.1 * randn(shape, seed=2)]
    if variance.startswith("learned"):
        parts.append(0.5 * randn(shape, seed=3) - (4 if variance == "learned" else 0))
    x0 = pixels if x0_dtype == torch.uint8 else wide.to(x0_dtype)
    output, noise = torch.cat(parts, 1).to(dtype), randn(shape, seed=4)
    return laid_out(output, layout), laid_out(x0, layout), laid_out(noise, layout)


def with_gradient(op, output, *args, **kwargs):
    """What the op gives, then its gradient."""
    output = output.detach().requires_grad_()
    found = op(output, *args, **kwargs)
    found = found if isinstance(found, tuple) else (found,)
    found[0].sum().backward()
    return [*(f.detach() for f in found), output.grad]


def objective(on, shape, dtype, x0_dtype, variance, layout, prediction, t):
    """Of each op a call on the CPU, and one on the GPU of a part of the batch."""
    output, x0, noise = objective_inputs(shape, dtype, x0_dtype, variance, layout)
    ids = torch.arange(len(output)) * 2**33 + 5
    weights = torch.tensor([0.3, 1.7, 0.01])[: len(output)]
    common = {"seed": SEED, "stream": 7, "sample_ids": ids, "index": ids % 1000}
    common |= {"prediction": prediction, "variance": variance}
    learned = variance.startswith("learned")
    calls = {
        "loss": ("denoising_loss", (output, t), {"x0": x0, "weights": weights, **common}),
        "terms": ("vlb_terms", (output, x0, t), {"return_mse": True, **common}),
        "given": ("vlb_terms", (output, x0, t), {"noise": noise, "clip": (-1.0, 1.0), **common}),
    }
    if learned:
        both = {"simple_weights": weights, "vlb_weights": weights.flip(0), **common}
        calls["hybrid"] = ("hybrid_loss", (output, x0, t), both)
    for op, args, kwargs in calls.values():

        def on_cpu(op=op, args=args, kwargs=kwargs):
            return with_gradient(getattr(ddpm_fast, op), *args, SCHEDULE, **kwargs)

        def on_gpu(part=slice(None), op=op, args=args, kwargs=kwargs):
            args = [gpu(arg)[part] for arg in args]
            kwargs = {name: gpu(value)[part] if isinstance(value, torch.Tensor) else value
                      for name, value in kwargs.items()}  # fmt: skip
            return with_gradient(getattr(on, op), *args, SCHEDULE, **kwargs)

        yield on_cpu, on_gpu


def check_objective(on_cpu, on_gpu):
    """The CPU's gradient to the bit, and the same result for each sample alone."""
    (*expected, gradient), (*found, ours) = on_cpu(), on_gpu()
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-6, atol=1e-9)
    same(ours, gradient)
    alone = [on_gpu(slice(i, i + 1)) for i in range(len(gradient))]
    for whole, *parts in zip((*found, ours), *alone, strict=True):
        if whole.dtype == torch.float16:  # whose least digits depend on how many are kept
            torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("variance", OBJECTIVE_VARIANCES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_objective(dtype, layout, variance, on):
    if on.name == "triton" and COMPILED_OBJECTIVE[dtype] != variance:
        pytest.skip("triton: one variance of each type, to end in time")
    t = torch.tensor([500, 200, 40])
    cases = {"epsilon": dtype, "sample": torch.float32, "v_prediction": torch.uint8}
    for shape in ((3, 3, 24, 28), (3, 4, 16, 20), (3, 3, 9, 11), (3, 2, 5, 26)):
        for prediction, x0_dtype in cases.items():
            if on.name == "triton" and (shape[1] != 3 or prediction == "sample"):
                continue
            arguments = (shape, dtype, x0_dtype, variance, layout, prediction, t)
            for calls in objective(on, *arguments):
                check_objective(*calls)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(3, 3, 12, 14), (3, 3, 24, 25), (3, 4, 16, 20)], ids=str)
def test_objective_within_its_tensors(shape, layout, on):
    """What compute-sanitizer watches: tiles that end early, single elements, the decoder."""
    t = torch.tensor([500, 0, 3])
    arguments = (shape, torch.float32, torch.uint8, "learned_range", layout, "epsilon", t)
    for on_cpu, on_gpu in objective(on, *arguments):
        (*expected, gradient), (*found, ours) = on_cpu(), on_gpu()
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=1e-9)
        assert torch.equal(ours.cpu()[[0, 2]], gradient[[0, 2]])


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
@pytest.mark.parametrize("variance", ["fixed_small", "learned"])
def test_objective_at_t_0(variance, cdf, on):
    """The decoder in float32, beside a sample at t > 0; where the mean is far off it is clamped."""
    t = torch.tensor([0, 700, 0])
    for shape in ((3, 3, 24, 28), (3, 3, 9, 11)):
        output, x0, _ = objective_inputs(shape, torch.float32, torch.uint8, variance)
        output[2, :, 3] = 1e3
        kwargs = {"prediction": "sample", "variance": variance, "cdf": cdf, "seed": 1}
        terms, gradient = with_gradient(vlb_terms, output, x0, t, SCHEDULE, **kwargs)
        found, ours = with_gradient(
            on.vlb_terms, output.cuda(), x0.cuda(), t.cuda(), SCHEDULE, **kwargs
        )
        torch.testing.assert_close(found.cpu(), terms, rtol=5e-6, atol=1e-9)
        assert torch.equal(ours[1].cpu(), gradient[1])
        for i in (0, 2):
            limit = gradient[i].abs().max().item()
            torch.testing.assert_close(ours[i].cpu(), gradient[i], rtol=1e-3, atol=1e-4 * limit)


@pytest.mark.sanitize
def test_objective_of_what_is_out_of_range(on):
    """t past the ends is T−1, of an index 24 bits count; NaN and infinity stay in their sample."""
    out_t, out_index = torch.tensor([7, 1000, -1]).cuda(), torch.tensor([7, 2**24 + 5, -1]).cuda()
    in_t, in_index = torch.tensor([7, 999, 999]).cuda(), torch.tensor([7, 5, 2**24 - 1]).cuda()
    for shape in ((3, 3, 16, 16), (3, 3, 5, 5)):
        tensors = objective_inputs(shape, torch.float32, torch.uint8, "fixed_small")
        output, x0, _ = (tensor.cuda() for tensor in tensors)
        kwargs = {"prediction": "v_prediction", "seed": 1}
        for op, x in ((on.denoising_loss, ()), (on.vlb_terms, (x0,))):
            options = kwargs if x else {"x0": x0, **kwargs}
            found = op(output, *x, out_t, SCHEDULE, index=out_index, **options)
            assert torch.equal(found, op(output, *x, in_t, SCHEDULE, index=in_index, **options))
        output[1, 2, 4, 4], output[2, 1, 3, 3] = torch.nan, 1e30
        losses, gradient = with_gradient(on.denoising_loss, output, 9, SCHEDULE, seed=1)
        assert losses.isnan().tolist() == [False, True, False]
        assert losses.isinf().tolist() == [False, False, True]
        assert gradient.isnan().nonzero().tolist() == [[1, 2, 4, 4]]
        for t in (0, 9):
            terms = on.vlb_terms(output, x0, t, SCHEDULE, seed=1)
            assert terms.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(70_001, 3), (2, 3, 512, 512), (3, 0, 4, 4)], ids=str)
def test_objective_of_many_samples_and_many_shares(shape, on):
    output = randn(shape, seed=1)
    (expected, gradient), (found, ours) = (
        with_gradient(op, m, 9, SCHEDULE, seed=1)
        for op, m in ((denoising_loss, output), (on.denoising_loss, output.cuda()))
    )
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=0, equal_nan=True)
    assert torch.equal(ours.cpu(), gradient)


def test_a_captured_objective_serves_every_batch(on):
    """One graph of both losses and their gradients; all that they read changes between replays."""
    shape = (4, 3, 32, 32)
    output = torch.zeros((4, 6, 32, 32), device="cuda", requires_grad=True)
    x0 = torch.zeros(shape, dtype=torch.uint8, device="cuda")
    t, seeds, ids, index = (torch.zeros(4, dtype=torch.int64, device="cuda") for _ in range(4))
    weights = torch.ones(4, device="cuda")
    address = {"seed": seeds, "sample_ids": ids, "index": index, "variance": "learned_range"}

    def step():
        loss = on.denoising_loss(output, t, SCHEDULE, weights=weights, **address)
        hybrid = on.hybrid_loss(output, x0, t, SCHEDULE, vlb_weights=weights, **address)
        gradients = [torch.autograd.grad(found.sum(), output)[0] for found in (loss, hybrid)]
        return loss.detach(), hybrid.detach(), *gradients

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for run in range(3):
        m, pixels, _ = objective_inputs(shape, torch.float32, torch.uint8, "learned_range")
        m, pixels = m + run, pixels.roll(run, 0)
        values = torch.arange(4) * 7 + run
        for target, value in ((t, values + 1), (seeds, values + 5), (ids, values * 3)):
            target.copy_(value)
        index.copy_(values)
        weights.copy_(values / 10)
        x0.copy_(pixels)
        with torch.no_grad():
            output.copy_(m)
        graph.replay()
        kwargs = {"seed": values + 5, "sample_ids": values * 3, "index": values}
        kwargs["variance"] = "learned_range"
        of_loss, of_hybrid = (
            with_gradient(denoising_loss, m, values + 1, SCHEDULE, weights=values / 10, **kwargs),
            with_gradient(
                hybrid_loss, m, pixels, values + 1, SCHEDULE, vlb_weights=values / 10, **kwargs
            ),
        )
        torch.testing.assert_close(found[0].cpu(), of_loss[0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[1].cpu(), of_hybrid[0], rtol=1e-6, atol=1e-9)
        same(found[2], of_loss[1])
        same(found[3], of_hybrid[1])


def test_nothing_of_the_objective_waits_for_the_gpu(on):
    tensors = objective_inputs((2, 3, 32, 32), torch.float32, torch.uint8, "learned_range")
    output, x0, noise = (tensor.cuda() for tensor in tensors)
    t, seeds = torch.tensor([3, 4]).cuda(), torch.tensor([8, 9]).cuda()
    kwargs = {"seed": seeds, "sample_ids": seeds, "index": t, "variance": "learned_range"}

    def step():
        with_gradient(on.denoising_loss, output, t, SCHEDULE, noise=noise, **kwargs)
        with_gradient(on.vlb_terms, output, x0, t, SCHEDULE, return_mse=True, **kwargs)
        with_gradient(on.hybrid_loss, output, x0, t, SCHEDULE, **kwargs)

    step()  # brings the schedule's tables to the GPU
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("elements", [BIG, BIG - 3])
def test_objective_of_more_elements_than_32_bits_count(elements, on):
    """The gradient's end is −2 w z / D of what lies at its address."""
    if torch.cuda.mem_get_info()[0] < 6 * 2 * BIG:
        pytest.skip("needs 26 GB of free GPU memory")
    torch.use_deterministic_algorithms(False)  # NaN in all of it would take its time
    output = torch.zeros((1, elements), dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weights = torch.tensor([elements / 2], device="cuda")
    loss = on.denoising_loss(output, 9, SCHEDULE, seed=3, weights=weights)
    (gradient,) = torch.autograd.grad(loss, output, torch.ones(1, device="cuda"))
    assert loss.item() / weights.item() == pytest.approx(1, abs=2e-4)  # 6 standard deviations
    first = elements // 4 * 4 - 4096
    z = noise_from(first, elements)
    expected = (-2.0 / elements * weights.item()) * z
    torch.testing.assert_close(gradient[0, first:].cpu().float(), expected, rtol=2**-8, atol=0)


def noise_from(first, elements):
    """ε of the first sample's elements from ``first`` on."""
    blocks, draw = torch.arange(first // 4, (elements + 3) // 4), torch.tensor(2 << 24)
    words = reference.noise_words(blocks, draw, torch.tensor(3), torch.tensor(0))
    pairs = [*reference.box_muller(*words[:2]), *reference.box_muller(*words[2:])]
    return torch.stack(pairs, 1).flatten()[: elements - first]


def test_the_objective_compiles_whole(on):
    tensors = objective_inputs((3, 3, 16, 16), torch.float32, torch.uint8, "learned_range")
    output, x0, _ = (tensor.cuda() for tensor in tensors)
    t = torch.tensor([3, 999, 500]).cuda()

    def f(output, x0, t):
        loss = denoising_loss(output, t, SCHEDULE, variance="learned_range", seed=7)
        return loss + hybrid_loss(output, x0, t, SCHEDULE, seed=7)

    with use_backend(on.name):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        expected = with_gradient(f, output, x0, t)
        for a, b in zip(expected, with_gradient(compiled, output, x0, t), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
