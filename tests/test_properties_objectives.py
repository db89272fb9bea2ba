"""denoising_loss, vlb_terms and the hybrid at any shape, strides, dtypes, timesteps and address."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import assume, given
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
    values,
)

from ddpm_fast import NoiseSchedule, denoising_loss, hybrid_loss, use_backend, vlb_terms

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
VARIANCES = ["fixed_small", "fixed_large", "learned", "learned_range"]
SCHEDULE = NoiseSchedule.linear(40)


@st.composite
def calls(draw, op):
    """The op with its options, the model's output, x0 and t; the address, and the weights."""
    prediction = draw(st.sampled_from(PREDICTIONS))
    variance = draw(st.sampled_from(VARIANCES[2:] if op is hybrid_loss else VARIANCES))
    doubled = variance in ("learned", "learned_range")
    of_model = draw(shapes(least_ndim=2 if doubled else 1, even_channels=doubled))
    assume(all(of_model[1:]))  # of no elements there is no mean
    shape = (of_model[0], of_model[1] // 2, *of_model[2:]) if doubled else of_model
    output = draw(tensors(of_model, draw(st.sampled_from(FLOATS))))
    x0 = draw(tensors(shape, torch.uint8))
    if draw(st.booleans()):
        x0 = draw(tensors(shape, draw(st.sampled_from(FLOATS)), bounded=True))
    steps = st.integers(0, len(SCHEDULE) - 1)
    t = draw(steps | integers_of(shape[0], steps))
    options = {"prediction": prediction, "variance": variance}
    if op is vlb_terms:
        options["clip"] = draw(st.sampled_from([None, (-1.0, 1.0)]))
    if op is not denoising_loss:
        options["cdf"] = draw(st.sampled_from(["exact", "tanh"]))
    given = draw(addresses(shape[0]))
    names = ["simple_weights", "vlb_weights"] if op is hybrid_loss else ["weights"]
    for name in names:
        if draw(st.booleans()):
            given[name] = values((shape[0], 2), torch.float32, 3).abs()[:, 0]
    if draw(st.integers(0, 4)) == 0:
        given["noise"] = draw(tensors(shape, draw(st.sampled_from(FLOATS))))
    return functools.partial(op, **options), output, x0, t, given


def evaluate(op, output, x0, t, given):
    """The losses and the gradient of their sum."""
    output = output.detach().requires_grad_()
    if op.func is denoising_loss:
        losses = op(output, t, SCHEDULE, x0=x0, **given)
    else:
        losses = op(output, x0, t, SCHEDULE, **given)
    losses.sum().backward()
    return losses.detach(), output.grad


def as_contiguous(op, output, x0, t, given):
    return evaluate(
        op, plain(output), plain(x0), plain(t), {name: plain(v) for name, v in given.items()}
    )


def close(found, expected, dtype):
    """Of numbers of one sign and gradients of both: differences, times up to 10⁴ at the first
    timesteps."""
    (losses, gradient), (expected_losses, expected_gradient) = found, expected
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-5)
    largest = expected_gradient.abs().max().item() if gradient.numel() else 0.0
    eps = max(1e-4, 2 * torch.finfo(dtype).eps)
    least = 0.02 * len(gradient) / max(gradient.numel(), 1)
    torch.testing.assert_close(gradient, expected_gradient, rtol=eps, atol=eps * largest + least)


def check(call, data):
    op, output, x0, t, given = call
    losses, gradient = evaluate(*call)
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    assert gradient.shape == output.shape
    contiguous = as_contiguous(*call)
    # Sums go in memory order, which strides may change
    close((losses, gradient), contiguous, output.dtype)
    if op.keywords.get("cdf") != "tanh":  # whose tail has no digits in the reference's float32
        with use_backend("reference"):
            close(contiguous, as_contiguous(*call), output.dtype)
    samples = len(output)
    address = {name: given[name] for name in ("seed", "sample_ids", "stream", "index")}
    for part in data.draw(cut(samples)):
        some = {name: part_of(plain(value), part, samples) for name, value in given.items()}
        some.update(address_of_part(address, part, samples))
        found, _ = evaluate(
            op, plain(output)[part], plain(x0)[part], part_of(t, part, samples), some
        )
        assert torch.equal(found, contiguous[0][part])


@examples(60)
@given(calls(denoising_loss), st.data())
def test_denoising_loss(call, data):
    check(call, data)


@examples(60)
@given(calls(vlb_terms), st.data())
def test_vlb_terms(call, data):
    check(call, data)


@examples(50)
@given(calls(hybrid_loss), st.data())
def test_hybrid_loss(call, data):
    check(call, data)
