"""reverse_step at any shape, strides, dtypes, rows and address: the reference's bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_cases import (
    FLOATS,
    address_of_part,
    cut,
    examples,
    integers_of,
    part_of,
    plain,
    seeds_and_ids,
    shapes,
    tensors,
    values,
)

from ddpm_fast import NoiseSchedule, reverse_step, use_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
VARIANCES = ["fixed_small", "fixed_large", "learned", "learned_range"]
SCHEDULE = NoiseSchedule.cosine(30)


@st.composite
def tables(draw):
    options = {
        "prediction": draw(st.sampled_from(PREDICTIONS)),
        "variance": draw(st.sampled_from(VARIANCES)),
        "num_steps": draw(st.sampled_from([None, 1, 7])),
    }
    if draw(st.booleans()):
        options.update(method="ddim", eta=draw(st.sampled_from([0.0, 0.5, 1.0])))
        options["eps_source"] = draw(st.sampled_from(["x0", "model"]))
    return SCHEDULE.step_table(**options)


@st.composite
def calls(draw):
    """Positional arguments, and the others."""
    table = draw(tables())
    doubled = table.model_variance != "none"
    shape = draw(shapes(least_ndim=2 if doubled else 1))
    samples = shape[0]
    of_model = (samples, 2 * shape[1], *shape[2:]) if doubled else shape
    dtypes = st.sampled_from(FLOATS)
    x = draw(tensors(shape, draw(dtypes)))
    model_dtype = draw(dtypes)
    rows = st.integers(0, len(table) - 1)
    step = draw(rows | rows.map(torch.tensor) | integers_of(samples, rows))
    options = draw(seeds_and_ids(samples))
    options["clip"] = draw(st.sampled_from([(-1.0, 1.0), None, (0, 0), (-0.0, 2.5)]))
    options["return_x0"] = draw(st.booleans())
    if draw(st.integers(0, 2)) == 0:
        options["model_output_uncond"] = draw(tensors(of_model, model_dtype))
        scales = [torch.tensor(1.5), values((samples,), torch.float32, 5)]
        scales.append(torch.full((2 * samples,), 3.0)[::2])
        options["guidance_scale"] = draw(st.floats(-2, 9, width=32) | st.sampled_from(scales))
    for name in ("noise", "x0"):
        if draw(st.integers(0, 4)) == 0:
            options[name] = draw(tensors(shape, draw(dtypes)))
    return (x, draw(tensors(of_model, model_dtype)), table, step), options


def as_contiguous(positional, options):
    """The same call without strides."""
    x, model_output, table, step = (plain(argument) for argument in positional)
    return reverse_step(
        x, model_output, table, step, **{name: plain(value) for name, value in options.items()}
    )


def same(found, expected):
    assert isinstance(found, tuple) == isinstance(expected, tuple)
    if not isinstance(found, tuple):
        found, expected = (found,), (expected,)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@examples(110)
@given(calls())
def test_any_call(call):
    positional, options = call
    found = reverse_step(*positional, **options)
    same(found, as_contiguous(*call))
    with use_backend("reference"):
        expected = as_contiguous(*call)
    if positional[2].model_variance not in ("learned", "learned_range"):
        same(found, expected)
        return
    # The exponential of PyTorch is another one
    found, expected = (r[0] if options["return_x0"] else r for r in (found, expected))
    eps = max(2e-6, 2 * torch.finfo(found.dtype).eps)
    torch.testing.assert_close(found, expected, rtol=eps, atol=4 * eps)


@examples(60)
@given(calls(), st.data())
def test_a_batch_is_its_parts(call, data):
    (x, model_output, table, step), options = call
    whole = reverse_step(x, model_output, table, step, **options)
    whole = whole if isinstance(whole, tuple) else (whole,)
    samples = len(x)
    for part in data.draw(cut(samples)):
        address = {name: options[name] for name in ("seed", "sample_ids")}
        some = {name: part_of(value, part, samples) for name, value in options.items()}
        some.update(address_of_part(address, part, samples))
        found = reverse_step(
            x[part], model_output[part], table, part_of(step, part, samples), **some
        )
        same(found if isinstance(found, tuple) else (found,), tuple(t[part] for t in whole))


@examples(80)
@given(calls(), st.sampled_from(["in place", "out", "lowp", "both"]))
def test_where_results_go(call, way):
    """In place, elsewhere, and a second time in fewer bits."""
    (x, model_output, table, step), options = call
    options = {**options, "return_x0": False}
    expected = as_contiguous((x, model_output, table, step), options)
    x = x.contiguous() if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
    if way == "in place":
        options["out"] = x = x.clone()
    elif way in ("out", "both"):
        options["out"] = torch.empty_like(x)
    if way in ("lowp", "both"):
        options["out_lowp"] = torch.empty_like(x, dtype=torch.bfloat16)
    options["nan_step"] = torch.tensor([99], dtype=torch.int32)
    found = reverse_step(x, model_output, table, step, **options)
    assert torch.equal(found, expected)
    if "out" in options:
        assert found is options["out"]
    if "out_lowp" in options and x.dtype == torch.float32:
        assert torch.equal(options["out_lowp"], expected.bfloat16())
    assert options["nan_step"].item() == 99


@examples(60)
@given(st.data())
def test_outputs_that_overlap_in_part_are_refused(data):
    """Whatever the offset; and never written."""
    count, table = data.draw(st.integers(1, 40)), SCHEDULE.step_table(
        prediction="epsilon", variance="fixed_small"
    )  # fmt: skip
    memory = values((3 * count,), torch.float32, 1)
    offset = data.draw(st.integers(0, 2 * count))
    out = memory[offset : offset + count].view(1, count)
    name = data.draw(st.sampled_from(["x", "model_output", "noise", "x0"]))
    start = data.draw(st.integers(0, 2 * count))
    arguments = {other: values((1, count), torch.float32, 2) for other in ("x", "model_output")}
    arguments[name] = memory[start : start + count].view(1, count)
    step = data.draw(st.integers(0, len(table) - 2))

    def call(**more):
        return reverse_step(table=table, step=step, seed=0, **arguments, **more)

    expected, before = call(), memory.clone()
    if 0 < abs(start - offset) < count:
        with pytest.raises(ValueError, match=f"must not overlap {name} in part"):
            call(out=out)
        assert torch.equal(memory, before)
    else:
        assert torch.equal(call(out=out), expected)
