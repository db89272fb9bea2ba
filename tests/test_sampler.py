"""Sampler: what a user relies on around the kernel."""

from __future__ import annotations

import math
import types
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, randn, reference, reverse_step
from ddpm_fast.stepping import dynamic_threshold

SCHEDULE = NoiseSchedule.linear()
SHAPE = (4, 3, 8, 8)


def model(x, t, shift=None):
    """Smooth, elementwise, dependent on t: so each sample is exactly independent of its batch."""
    eps = torch.sin(2 * x) * (0.5 + t.reshape(-1, 1, 1, 1) / 2000)
    return eps if shift is None else eps + shift.reshape(-1, 1, 1, 1)


def sampler_of(model=model, **kwargs):
    return Sampler(model, SCHEDULE, **{"num_steps": 20, **kwargs})


@pytest.mark.parametrize("method", [{}, {"method": "ddim", "eta": 0.5}])
def test_is_the_loop_of_reverse_steps(method):
    sampler = sampler_of(**method)
    x = randn(SHAPE, seed=9)
    for row, t in enumerate(sampler.table.timesteps.tolist()):
        x = reverse_step(x, model(x, torch.full((4,), t)), sampler.table, row, seed=9)
    assert torch.equal(sampler.sample(SHAPE, seed=9), x)
    assert len(sampler) == 20


def test_samples_do_not_depend_on_the_batch():
    """Ids 0 … 99 in one batch, in ten, in another order: the same bits for each id."""
    sampler = sampler_of()
    whole = sampler.sample([100, 3, 8, 8], seed=3)
    for first in range(0, 100, 10):
        ids = range(first, first + 10)
        assert torch.equal(sampler.sample([10, 3, 8, 8], seed=3, sample_ids=ids), whole[ids])
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sampler.sample([100, 3, 8, 8], seed=3, sample_ids=order), whole[order])
    seeds = torch.full((100,), 3)
    assert torch.equal(sampler.sample([100, 3, 8, 8], seed=seeds), whole)
    assert not torch.equal(sampler.sample([100, 3, 8, 8], seed=4), whole)


def test_inside_inference_mode():
    """Where tensors have no version that could tell whether a model changed them."""
    expected = sampler_of().sample(SHAPE, seed=1)
    with torch.inference_mode():
        assert torch.equal(sampler_of().sample(SHAPE, seed=1), expected)
        assert torch.equal(list(sampler_of().stream(SHAPE, seed=1))[-1].x, expected)


def test_stream_and_callback_see_every_step():
    sampler = sampler_of()
    expected = sampler.sample(SHAPE, seed=1)
    steps = list(sampler.stream(SHAPE, seed=1))
    assert [s.step for s in steps] == list(range(20))
    assert [s.t for s in steps] == sampler.table.timesteps.tolist()
    assert torch.equal(steps[-1].x, expected)
    assert torch.equal(steps[-1].x0, expected)  # the last step returns x̂₀
    assert len({s.x.data_ptr() for s in steps}) == 20  # each may be kept
    assert all(s.x0.abs().max() <= 1 for s in steps)
    seen = []
    assert torch.equal(sampler.sample(SHAPE, seed=1, callback=seen.append), expected)
    assert all(torch.equal(a.x, b.x) for a, b in zip(seen, steps, strict=True))


def test_resuming_from_any_row():
    sampler = sampler_of()
    steps = list(sampler.stream(SHAPE, seed=1))
    for row in (1, 7, 19):
        before = steps[row - 1].x
        kept = before.clone()
        assert torch.equal(sampler.sample(SHAPE, seed=1, x_T=before, start=row), steps[-1].x)
        assert torch.equal(before, kept)
    given = randn(SHAPE, seed=1)
    assert torch.equal(sampler.sample(SHAPE, seed=1, x_T=given), steps[-1].x)


def test_inpainting_by_callback():
    """The known half pasted in at every step ends up in the sample."""
    sampler = sampler_of(lambda x, t: model(x, t) + x.mean((1, 2, 3), keepdim=True))
    known = torch.linspace(-0.9, 0.9, 8).expand(SHAPE)

    def paste(step):
        step.x[..., :4] = known[..., :4]

    result = sampler.sample(SHAPE, seed=1, callback=paste)
    assert torch.equal(result[..., :4], known[..., :4])
    assert not torch.equal(result[..., 4:], sampler.sample(SHAPE, seed=1)[..., 4:])


def test_results_are_ordinary_tensors():
    result = sampler_of().sample(SHAPE, seed=1)
    result.requires_grad_()
    result.square().sum().backward()
    assert result.grad is not None


def test_guidance_merges_two_outputs():
    shifts = torch.tensor([0.1, -0.1, 0.3, 0.0])
    sampler = sampler_of(guidance_scale=2.5)
    found = sampler.sample(
        SHAPE, seed=1, model_kwargs={"shift": shifts}, uncond_kwargs={"shift": 0 * shifts}
    )
    merged = sampler_of(
        lambda x, t: torch.lerp(model(x, t, 0 * shifts), model(x, t, shifts), 2.5)
    ).sample(SHAPE, seed=1)
    torch.testing.assert_close(found, merged, rtol=1e-3, atol=1e-3)
    per_sample = sampler_of(guidance_scale=torch.full((4,), 2.5)).sample(
        SHAPE, seed=1, model_kwargs={"shift": shifts}, uncond_kwargs={"shift": 0 * shifts}
    )
    assert torch.equal(per_sample, found)


@pytest.mark.parametrize(
    "scale", [2, np.float32(2), np.float64(2), np.int64(2), Fraction(2)], ids=repr
)
def test_any_number_is_a_guidance_scale(scale):
    arguments = {"model_kwargs": {"shift": torch.ones(4)}, "uncond_kwargs": {}}
    found = sampler_of(guidance_scale=scale).sample(SHAPE, seed=1, **arguments)
    assert torch.equal(found, sampler_of(guidance_scale=2.0).sample(SHAPE, seed=1, **arguments))


def test_dynamic_threshold():
    x0 = torch.cat([3 * randn((1, 3, 8, 8), seed=1), 0.1 * randn((1, 3, 8, 8), seed=2)])
    for quantile in (0.5, 0.95, 1.0):
        found = dynamic_threshold(x0, quantile)
        s = x0.flatten(1).abs().quantile(quantile, 1).clamp(min=1).reshape(-1, 1, 1, 1)
        torch.testing.assert_close(found, x0.clamp(-s, s) / s)
    assert torch.equal(found[1], x0[1])  # inside the bound nothing changes
    low, high = x0[0].abs().max() - 0.1, 2.0
    assert torch.equal(dynamic_threshold(x0[:1], 1.0, high) <= high, torch.ones(1, 3, 8, 8).bool())
    assert low > 1


def test_dynamic_threshold_in_the_sampler():
    sampler = sampler_of(dynamic_threshold=0.9)
    x = randn(SHAPE, seed=9)
    rows = sampler.table.rows
    for row, t in enumerate(sampler.table.timesteps.tolist()):
        m = model(x, torch.full((4,), t))
        x0 = reference.predict_x0(x, m, rows, torch.full((4,), row))
        x = reverse_step(x, m, sampler.table, row, seed=9, x0=dynamic_threshold(x0, 0.9))
    assert torch.equal(sampler.sample(SHAPE, seed=9), x)


@pytest.mark.parametrize("eps_source", ["x0", "model"])
def test_denoised_fn_runs_before_the_clip(eps_source):
    calls = []

    def denoised(x0):
        calls.append(x0.abs().max().item())
        return x0

    kwargs = {"method": "ddim", "eta": 1.0, "eps_source": eps_source}
    unchanged = sampler_of(denoised_fn=denoised, **kwargs).sample(SHAPE, seed=1)
    assert torch.equal(unchanged, sampler_of(**kwargs).sample(SHAPE, seed=1))
    assert len(calls) == 20
    assert max(calls) > 1
    fixed = sampler_of(denoised_fn=lambda x0: torch.full_like(x0, 3.0), **kwargs)
    assert torch.equal(fixed.sample(SHAPE, seed=1), torch.ones(SHAPE))


def test_denoised_fn_sees_the_guided_prediction():
    shifts = torch.tensor([0.1, -0.1, 0.3, 0.0])
    arguments = {"model_kwargs": {"shift": shifts}, "uncond_kwargs": {}}
    plain = sampler_of(guidance_scale=2.0).sample(SHAPE, seed=1, **arguments)
    through = sampler_of(guidance_scale=2.0, denoised_fn=lambda x0: x0)
    assert torch.equal(through.sample(SHAPE, seed=1, **arguments), plain)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_learned_variances(variance, method):
    def doubled(x, t):
        return torch.cat([model(x, t), torch.full_like(x, -3.0)], 1)

    sampler = sampler_of(doubled, variance=variance, method=method)
    result = sampler.sample(SHAPE, seed=1)
    assert result.shape == torch.Size(SHAPE)
    if method == "ddim":  # takes no notice of them
        assert torch.equal(result, sampler_of(method="ddim").sample(SHAPE, seed=1))


def test_model_calling_conventions():
    expected = sampler_of().sample(SHAPE, seed=1)
    seen = []

    def output_object(x, t):
        seen.append((x.dtype, t.dtype, tuple(t.shape)))
        return types.SimpleNamespace(sample=model(x, t))

    assert torch.equal(sampler_of(output_object).sample(SHAPE, seed=1), expected)
    assert set(seen) == {(torch.float32, torch.int64, (4,))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_model_gets_its_dtype(dtype):
    class Low(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(2.0, dtype=dtype))
            self.inputs = []

        def forward(self, x, t):
            self.inputs.append(x.clone())
            return torch.sin(self.gain * x)

    low = Low().eval()
    states = [randn(SHAPE, seed=1)]
    result = sampler_of(low).sample(SHAPE, seed=1, callback=lambda s: states.append(s.x))
    assert result.dtype == torch.float32
    for given, state in zip(low.inputs, states, strict=False):
        assert torch.equal(given, state.to(dtype))
    assert torch.equal(sampler_of(low).sample(SHAPE, seed=1), result)


def test_channels_last_start_gives_the_same_samples():
    x = randn(SHAPE, seed=1)
    expected = sampler_of().sample(SHAPE, seed=1, x_T=x)
    last = sampler_of().sample(SHAPE, seed=1, x_T=x.to(memory_format=torch.channels_last))
    assert torch.equal(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)
    strided = randn((4, 3, 8, 16), seed=1)[..., ::2]
    sampler_of().sample(SHAPE, seed=1, x_T=strided)


def test_model_that_returns_one_buffer():
    """As a captured graph does: the unconditional output overwrites the conditional one."""
    buffer = torch.empty(SHAPE)

    def static(x, t, shift):
        return buffer.copy_(model(x, t, shift))

    shifts = torch.tensor([0.1, -0.1, 0.3, 0.0])
    arguments = {"model_kwargs": {"shift": shifts}, "uncond_kwargs": {"shift": 0 * shifts}}
    found = sampler_of(static, guidance_scale=2.0).sample(SHAPE, seed=1, **arguments)
    plain = sampler_of(guidance_scale=2.0).sample(SHAPE, seed=1, **arguments)
    assert torch.equal(found, plain)


def test_no_false_alarm_on_channels_last():
    """A partial last granule, with NaN in the memory that the scratch is made of."""
    shape = (3, 3, 11, 13)
    x = randn(shape, seed=1).to(memory_format=torch.channels_last)
    for size in (5_000, 10_000, 50_000):
        poison = [torch.full((size,), math.nan) for _ in range(8)]
        del poison
        assert sampler_of().sample(shape, seed=1, x_T=x).isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_empty_batch(backend):
    assert sampler_of(backend=backend).sample([0, 3, 8, 8], seed=1).shape == (0, 3, 8, 8)
    assert sampler_of().sample([0, 3, 8, 8], seed=1).shape == (0, 3, 8, 8)
    assert sampler_of(dynamic_threshold=0.9).sample([0, 3, 8, 8]).shape == (0, 3, 8, 8)


def test_one_step():
    schedule = NoiseSchedule([0.5])
    for method in ("ddpm", "ddim"):
        sampler = Sampler(model, schedule, method=method)
        x = randn(SHAPE, seed=1)
        t = torch.zeros(4, dtype=torch.int64)
        x0 = reference.x0_from_eps(x.double(), model(x, t).double(), t, schedule).clamp(-1, 1)
        torch.testing.assert_close(sampler.sample(SHAPE, seed=1).double(), x0, rtol=1e-6, atol=1e-6)


def test_progress_bar(capsys):
    sampler_of().sample(SHAPE, progress=True)
    assert "20/20" in capsys.readouterr().err


def test_backends_agree():
    fast = sampler_of(backend="cpu").sample(SHAPE, seed=1)
    assert torch.equal(sampler_of(backend="reference").sample(SHAPE, seed=1), fast)


def test_training_mode_warns():
    class Net(torch.nn.Module):
        def forward(self, x, t):
            return x

    with pytest.warns(UserWarning, match="training mode"):
        sampler_of(Net()).sample(SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler_of(Net().eval()).sample(SHAPE)


@pytest.mark.parametrize("when", [0, 7, 19])
def test_nan_is_named_with_its_step(when):
    calls = []

    def turns_nan(x, t):
        calls.append(int(t[0]))
        out = model(x, t)
        if len(calls) == when + 1:
            out[2, 1, 3, 3] = math.nan
        return out

    with pytest.raises(
        FloatingPointError, match=f"turned NaN at step {when}, t = {950 - 50 * when}:"
    ):
        sampler_of(turns_nan).sample(SHAPE)
    assert len(calls) == when + 1  # and it stops there


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": None}, TypeError, "model must be callable"),
        ({"clip": (1, -1)}, ValueError, "clip must be"),
        ({"clip": 1.0}, ValueError, "clip must be"),
        ({"schedule": [0.1]}, TypeError, "schedule must be a NoiseSchedule; got list"),
        ({"guidance_scale": "2"}, TypeError, "guidance_scale must be a number or a tensor"),
        ({"guidance_scale": math.nan}, ValueError, "guidance_scale must be finite"),
        ({"guidance_scale": torch.ones(2).double()}, TypeError, "must be float32, 0-d or"),
        ({"denoised_fn": 3}, TypeError, "denoised_fn must be callable; got int"),
        ({"dynamic_threshold": 0.0}, ValueError, r"must lie in \(0, 1\]"),
        ({"dynamic_threshold": 0.9, "clip": (-1, 2)}, ValueError, r"needs a clip of \(-c, c\)"),
        ({"dynamic_threshold": 0.9, "clip": None}, ValueError, "needs a clip"),
        ({"graph": "yes"}, ValueError, "graph must be 'auto' or 'off'"),
        ({"backend": "gpu"}, ValueError, "backend must be one of 'auto', 'reference', 'cpu'"),
        ({"backend": "gpu"}, ValueError, "backend must be one of 'auto'"),
        ({"prediction": "noise"}, ValueError, "prediction must be one of"),
        ({"num_steps": 1001}, ValueError, "num_steps must be an integer in 1 … 1000"),
    ],
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        Sampler(**{"model": model, "schedule": SCHEDULE, **arguments})


X = torch.zeros(SHAPE)


@pytest.mark.parametrize(
    ("sampler", "arguments", "error", "message"),
    [
        ({}, {"shape": [4]}, ValueError, r"shape must be \[N, C, …\]"),
        ({}, {"shape": 4}, TypeError, r"shape must be \[N, C, …\]; got 4"),
        ({}, {"start": 3}, ValueError, "start needs x_T"),
        ({}, {"start": 1.5, "x_T": X}, TypeError, "start must be an integer; got 1.5"),
        ({}, {"x_T": [1.0]}, TypeError, "x_T must be a tensor; got list"),
        ({"guidance_scale": torch.ones(3)}, {"uncond_kwargs": {}}, ValueError,
         r"guidance_scale must have shape \[4\]"),
        ({"model": lambda x, t: x.mul_(2)}, {}, ValueError, "changed its input x in place"),
        ({"model": torch.nn.Linear(8, 8).double().eval()}, {}, TypeError, "parameters are float64"),
        ({}, {"start": 20, "x_T": X}, ValueError, "start must lie in 0 … 19; got 20"),
        ({}, {"x_T": X[:2]}, ValueError, r"x_T must have shape \[4, 3, 8, 8\]"),
        ({}, {"x_T": X.long()}, TypeError, "x_T must be floating point"),
        ({}, {"uncond_kwargs": {}}, ValueError, "both or neither"),
        ({"guidance_scale": 2.0}, {}, ValueError, "both or neither"),
        ({}, {"sample_ids": [1, 2]}, ValueError, r"sample_ids must have shape \[4\]; got \[2\]"),
        ({}, {"sample_ids": torch.tensor([0, 1, 2, -3])}, ValueError, "must not be negative"),
        ({}, {"seed": -1}, ValueError, "seed must lie in"),
        ({"model": lambda x, t: x[:, :2]}, {}, ValueError,
         r"shape \[4, 3, 8, 8\], at step 0, t = 950; got \[4, 2, 8, 8\]"),
        ({"model": lambda x, t: x, "variance": "learned"}, {}, ValueError, r"shape \[4, 6, 8, 8\]"),
        ({"model": lambda x, t: x.double()}, {}, ValueError, "float tensor of shape .*float64"),
        ({"model": lambda x, t: None}, {}, TypeError, "model must return a tensor, or an object"),
        ({"denoised_fn": lambda x0: x0[:1]}, {}, ValueError, "denoised_fn must return a float"),
    ],
)  # fmt: skip
def test_bad_calls(sampler, arguments, error, message):
    with pytest.raises(error, match=message):
        sampler_of(**sampler).sample(**{"shape": SHAPE, **arguments})
