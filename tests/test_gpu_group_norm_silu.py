"""group_norm_silu on a GPU, by each backend: errors against float64, gradients, layouts, strides,
graphs, streams, and bits in which the batch has no say."""

from __future__ import annotations

import pytest
import torch
from gpu_backends import BACKENDS, BIG, On, gpu
from group_norm_cases import COMBINATIONS, eager, exact, problem
from helpers import DTYPES, assert_as_good_as_eager, no_gpu, ulp

import ddpm_fast
from ddpm_fast import group_norm_silu, use_backend

pytestmark = pytest.mark.gpu

# Groups of 4 channels in one chunk and in many, of 12, of 3, of 320, which no tile holds; 5 and 2
# dimensions.
SHAPES = [
    ((2, 128, 16, 16), 32),
    ((1, 64, 80, 64), 16),
    ((2, 96, 9, 8), 8),
    ((2, 6, 5, 7), 2),
    ((1, 320, 8, 8), 1),
    ((2, 8, 2, 4, 12), 4),
    ((3, 40), 5),
]
CASES = [
    pytest.param(shape, groups, layout, id=f"{shape}-{layout}")
    for shape, groups in SHAPES
    for layout in ("contiguous", "channels_last")[: 1 + (len(shape) > 3)]
]
FORMATS = ["contiguous", "channels_last"]
EVERYTHING = {"weight", "bias", "emb", "scale", "shift", "residual"}


@pytest.fixture(params=BACKENDS)
def on(request: pytest.FixtureRequest):
    """Each backend for GPUs that runs here."""
    status = ddpm_fast.backends()[request.param]
    if no_gpu() or not status.available:
        pytest.skip(f"{request.param}: {status.detail}")
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    yield On(request.param)
    torch.use_deterministic_algorithms(False)


def combinations(on, i, dtype):
    """Everything, and what else is given: of that by Triton, which compiles each, a part."""
    if on.name == "cuda":
        return [(EVERYTHING, True), *COMBINATIONS]
    if dtype == torch.float16:
        pytest.skip("triton: two types, to end in time")
    return [(EVERYTHING, True) if dtype == torch.float32 else COMBINATIONS[i % 6]]


def run(on, tensors, groups, silu=True, **options):
    """y and s, on the GPU."""
    found = on.group_norm_silu(
        **{name: gpu(tensor) for name, tensor in tensors.items()},
        num_groups=groups, silu=silu, **options,
    )  # fmt: skip
    return found if isinstance(found, tuple) else (found, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups", "layout"), CASES)
def test_forward(shape, groups, layout, dtype, on):
    for given, silu in combinations(on, SHAPES.index((shape, groups)), dtype):
        tensors = problem(shape, given, dtype, layout)
        x = tensors["x"]
        y, s = run(on, tensors, groups, silu)
        assert y.is_cuda
        assert y.stride() == x.stride()
        if s is not None:
            assert torch.equal(s.cpu(), x + tensors["residual"])
            assert s.stride() == x.stride()
        assert_as_good_as_eager(y.cpu(), eager(tensors, groups, silu), exact(tensors, groups, silu))


def gradients(call, tensors, dtype=None, device="cpu"):
    """By each tensor, of a sum of y and s with weights."""
    leaves = {
        name: tensor.to(device, dtype or tensor.dtype).detach().requires_grad_()
        for name, tensor in tensors.items()
    }
    found = call(leaves)
    loss = 0.0
    for i, result in enumerate(found if isinstance(found, tuple) else (found,)):
        weights = torch.cos(torch.arange(result.numel()) * (1.3 + i)).view(result.shape)
        loss = loss + (result * weights.to(result.device, result.dtype)).sum()
    by = torch.autograd.grad(loss, [*leaves.values()])
    return {name: gradient.cpu() for name, gradient in zip(leaves, by, strict=True)}


def with_sum(formula, leaves, groups, silu):
    ones = torch.ones(leaves["x"].shape[1], dtype=leaves["x"].dtype)
    y = formula({"weight": ones, **leaves}, groups, silu)  # PyTorch's has no bias without weight
    return (y, leaves["x"] + leaves["residual"]) if "residual" in leaves else y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups", "layout"), CASES)
def test_gradients(shape, groups, layout, dtype, on):
    if on.name == "triton" and (layout == "contiguous") != (dtype == torch.float32):
        pytest.skip("triton: one type of each layout, to end in time")
    for given, silu in combinations(on, SHAPES.index((shape, groups)), dtype):
        tensors = problem(shape, given, dtype, layout)
        if "residual" in tensors:
            tensors["residual"].zero_()  # s is then the same in every dtype

        def ours(leaves, silu=silu):
            return on.group_norm_silu(**leaves, num_groups=groups, silu=silu)

        found = gradients(ours, tensors, device="cuda")
        wide, low = (
            gradients(lambda v, f=f, s=silu: with_sum(f, v, groups, s), tensors, of)
            for f, of in ((exact, torch.float64), (eager, dtype))
        )
        for name, gradient in found.items():
            error, of_eager = ((g.double() - wide[name]).abs().max() for g in (gradient, low[name]))
            # Sums of many terms, of which there may be but a few: 4 ulp.
            allowed = 4 * ulp(gradient.dtype) * max(1.0, wide[name].abs().max().item())
            assert error <= 2 * of_eager + allowed, name


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_batch_has_no_say(dtype, layout, on):
    """Results and gradients of a sample, alone and in a batch: the same bits."""
    for shape, groups in (((5, 128, 32, 32), 32), ((3, 12, 3, 3), 3)):
        tensors = {k: gpu(v) for k, v in problem(shape, EVERYTHING, dtype, layout).items()}

        def results(part, shape=shape, tensors=tensors, groups=groups):
            of_part = {
                name: (t[part] if t.ndim > 1 and len(t) == shape[0] else t).detach()
                for name, t in tensors.items()
            }
            of_part["x"].requires_grad_()
            y, s = on.group_norm_silu(**of_part, num_groups=groups)
            loss = y.float().square().sum() + s.float().sum()
            return y.detach(), torch.autograd.grad(loss, of_part["x"])[0]

        together = results(slice(None))
        alone = [results(slice(i, i + 1)) for i in range(shape[0])]
        for whole, *parts in zip(together, *alone, strict=True):
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [
        ((2, 48, 9, 9), "contiguous", torch.float32),
        ((2, 48, 9, 9), "channels_last", torch.bfloat16),
        ((1, 160, 3, 5), "channels_last", torch.float32),
    ],
    ids=str,
)
def test_within_its_tensors(shape, layout, dtype, on):
    """What compute-sanitizer watches: tiles that end early, in channels and in pixels."""
    tensors = problem(shape, EVERYTHING, dtype, layout)
    y, _ = run(on, tensors, 2)
    assert_as_good_as_eager(y.cpu(), eager(tensors, 2, True), exact(tensors, 2, True))
    gradients(lambda v: on.group_norm_silu(**v, num_groups=2), tensors, device="cuda")


@pytest.mark.parametrize("channels", [64, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_with_gaps(dtype, channels, on):
    """x and the residual are slices of channels, the result the interior of a padded buffer: what
    lies between is neither read nor written."""
    wide = torch.full((2, 3 * channels, 17, 18), torch.nan, dtype=dtype, device="cuda")
    wide = wide.contiguous(memory_format=torch.channels_last)
    tensors = problem((2, channels, 17, 18), {"weight", "emb", "residual"}, dtype, "channels_last")
    x, residual = wide[:, :channels], wide[:, 2 * channels :]
    x.copy_(tensors["x"])
    residual.copy_(tensors["residual"])
    buffer = torch.full((2, 19, 20, channels), 3.0, dtype=dtype, device="cuda")
    out = buffer[:, 1:-1, 1:-1].permute(0, 3, 1, 2)
    run(on, {**tensors, "x": x, "residual": residual}, 2, out=out)
    assert_as_good_as_eager(out.cpu(), eager(tensors, 2, True), exact(tensors, 2, True))
    border = buffer.clone()
    border[:, 1:-1, 1:-1] = 3
    assert (border == 3).all()
    assert wide[:, channels : 2 * channels].isnan().all()
    del tensors["residual"]
    expected, _ = run(on, tensors, 2)
    x = tensors["x"].cuda()
    assert torch.equal(run(on, {**tensors, "x": x}, 2, out=x)[0], expected)


@pytest.mark.parametrize("layout", FORMATS)
def test_a_mean_far_from_zero(layout, on):
    """10^4 standard deviations away: E[x²] − E[x]² would leave nothing of the variance."""
    tensors = problem((1, 32, 64, 64), set(), torch.float32, layout, mean=1e4)
    y, _ = run(on, tensors, 8, silu=False)
    assert (y.cpu().double() - exact(tensors, 8, False)).abs().max() < 2e-3


@pytest.mark.parametrize("layout", FORMATS)
def test_nan_and_memory_that_vectors_cannot_reach(layout, on):
    """NaN stays in its group."""
    x = problem((2, 64, 8, 8), set(), torch.float32, layout)["x"]
    expected = on.group_norm_silu(x.cuda(), 8)
    memory = torch.empty(x.numel() + 1, device="cuda")[1:]
    shifted = memory.as_strided(x.shape, x.stride()).copy_(x)
    found = on.group_norm_silu(shifted, 8)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    shifted[0, 9, 3, 3] = torch.nan
    is_nan = on.group_norm_silu(shifted, 8).isnan()
    assert is_nan[0, 8:16].all()
    assert is_nan.sum() == is_nan[0, 8:16].numel()


def test_more_samples_than_a_grid_is_wide(on):
    x = problem((70_001, 8), {"scale", "shift"}, torch.float32)
    y, _ = run(on, x, 2)
    assert_as_good_as_eager(y.cpu(), eager(x, 2, True), exact(x, 2, True))


@pytest.mark.parametrize("shape", [(1, 2, BIG // 2), (1, 8, 2**14, 2**14 + 1)], ids=str)
def test_more_elements_than_32_bits_count(shape, on):
    """4 GB of bfloat16, contiguous and channels_last, of normals: mean 0, variance 1."""
    if torch.cuda.mem_get_info()[0] < 4 * 2 * BIG:
        pytest.skip("needs 17 GB of free GPU memory")
    torch.use_deterministic_algorithms(False)  # NaN in all of it would take its time
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    x = on.randn(
        shape, seed=3, dtype=torch.bfloat16, device="cuda", memory_format=memory_format
    )  # fmt: skip
    y = on.group_norm_silu(x, 2, silu=False)
    last = (..., slice(-4096, None)) if x.ndim == 3 else (slice(None), slice(None), -1)
    torch.testing.assert_close(y[last], x[last], rtol=1e-2, atol=1e-3)


def test_a_captured_norm_serves_every_batch(on):
    """One graph of the result and its gradients; all that they read changes between replays."""
    for layout in FORMATS:
        first = problem((2, 64, 16, 16), EVERYTHING, torch.float32, layout)
        static = {name: gpu(tensor).clone().requires_grad_() for name, tensor in first.items()}

        def step(static=static):
            y, s = on.group_norm_silu(**static, num_groups=16)
            loss = y.square().sum() + s.sum()
            return y.detach(), *torch.autograd.grad(loss, [*static.values()])

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        for i in range(3):
            with torch.no_grad():
                for name, tensor in static.items():
                    tensor.copy_(first[name] * (1 + 0.3 * i) + 0.1 * i)
            graph.replay()
            replayed = [tensor.clone() for tensor in found]
            for a, b in zip(replayed, step(), strict=True):
                assert torch.equal(a, b)
        assert not replayed[0].isnan().any()


def test_the_current_stream_is_used(on):
    """Behind work that takes a while: on the wrong stream the kernels would come too soon."""
    tensors = {k: gpu(v) for k, v in problem((2, 64, 16, 16), EVERYTHING, torch.float32).items()}
    expected, _ = run(on, tensors, 16)
    source, target = tensors["x"], torch.zeros_like(tensors["x"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(on, {**tensors, "x": target}, 16)  # loads the kernels, and leaves memory for it
        torch.cuda._sleep(1_000_000_000)
        target.copy_(source)
        found, _ = run(on, {**tensors, "x": target}, 16)
        assert not side.query()  # the host has come here first
    side.synchronize()
    assert torch.equal(found, expected)


def test_nothing_waits_for_the_gpu(on):
    tensors = {
        name: gpu(tensor).requires_grad_()
        for name, tensor in problem((2, 64, 16, 16), EVERYTHING, torch.bfloat16).items()
    }

    def step():
        y, s = on.group_norm_silu(**tensors, num_groups=16)
        torch.autograd.grad(y.sum() + s.sum(), [*tensors.values()])

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_whole(on):
    tensors = problem((2, 64, 8, 8), EVERYTHING, torch.float32, "channels_last")
    leaves = {name: gpu(tensor).requires_grad_() for name, tensor in tensors.items()}

    def f(leaves):
        y, s = group_norm_silu(**leaves, num_groups=16)
        return (y * y).sum() + s.sum()

    with use_backend(on.name):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for a, b in zip(
            torch.autograd.grad(f(leaves), [*leaves.values()]),
            torch.autograd.grad(compiled(leaves), [*leaves.values()]),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
