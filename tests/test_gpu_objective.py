"""The objective's kernels on a GPU: the CPU's results and gradients, graphs, and more than 2^31
elements."""

from __future__ import annotations

import pytest
import torch
from gpu_backends import (
    BIG,
    FORMATS,
    gpu,
    on_each,  # noqa: F401
    same,
)
from helpers import DTYPES, laid_out
from reverse_step_cases import SCHEDULE, SEED

import ddpm_fast
from ddpm_fast import denoising_loss, hybrid_loss, randn, reference, use_backend, vlb_terms

pytestmark = pytest.mark.gpu


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
