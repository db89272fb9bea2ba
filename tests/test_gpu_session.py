"""Sessions on a GPU: samples as they are drawn alone, and nothing waits but for what lands."""

from __future__ import annotations

import pytest
import torch
from gpu_backends import backend_in_use  # noqa: F401
from session_cases import SCHEDULE, SECONDS, SHAPE, Gated, alone, drawn, exact, maker, over
from test_gpu_engine import full_float32, unet  # noqa: F401
from unet_weights import gap

from ddpm_fast import Sampler
from ddpm_fast.sessions.flight import Flight, Flyer

pytestmark = pytest.mark.gpu
IMAGE = (3, 16, 16)


def on_gpu(model=exact, **arguments):
    return maker(model, device="cuda", **arguments)


def test_session_draws_what_is_drawn_alone():
    make = on_gpu()
    asked = [
        {"seed": [0, 2**64 - 1][i % 2], "sample_id": i, "num_steps": 1 + i % 13} for i in range(300)
    ]
    with make().session(SHAPE, max_batch=7) as session:
        found = drawn(session, asked)
        finished = [session.submit(**each) for each in asked]
        assert set(session) == set(finished)
    for arguments, x, handle in zip(asked, found, finished, strict=True):
        assert x.is_cuda
        assert torch.equal(x, alone(make, SHAPE, **arguments))
        assert torch.equal(handle.result(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", ["auto", "off"])
def test_session_of_a_network(plan, dtype):
    """As near to float32 as what is drawn alone."""
    exactly = maker(unet("plain"), method="ddim", backend="reference")
    make = maker(unet("plain").cuda().to(dtype), method="ddim", plan=plan)
    asked = [{"sample_id": i, "num_steps": 3 + i % 3} for i in range(9)]
    with make().session(IMAGE, max_batch=4) as session:
        found = drawn(session, asked)
    apart = [alone(make, IMAGE, **each) for each in asked]
    expected = [alone(exactly, IMAGE, **each) for each in asked]
    assert error(found, expected) <= 2 * error(apart, expected) + 1e-6


def error(found, expected):
    return (torch.stack(found).cpu() - torch.stack(expected)).square().mean().sqrt().item()


@pytest.mark.usefixtures("full_float32")
def test_session_with_classes_and_guidance():
    make = maker(unet("classes").cuda(), variance="learned_range", method="ddpm")
    asked = [
        {
            "sample_id": i,
            "num_steps": 2 + i % 3,
            "model_kwargs": {"class_labels": torch.tensor([i], device="cuda")},
            **({"uncond_kwargs": {}, "guidance_scale": 1.0 + i} if i % 2 else {}),
        }
        for i in range(8)
    ]
    with make().session(IMAGE, max_batch=3) as session:
        found = drawn(session, asked)
    for arguments, x in zip(asked, found, strict=True):
        assert gap(x, alone(make, IMAGE, **arguments)) < 1e-3


def test_session_waits_for_nothing_but_what_lands():
    """While no sample is to be finished, and samples join and leave, the host does not wait."""
    flight = Flight(on_gpu()(), SHAPE, 8)
    kwargs = [{"a": torch.full((1,), 0.5 + i, device="cuda")} for i in range(8)]
    numbers = [20, 5, 7]
    # The lengths' tables, and what is compiled at first use
    flight.join(Flyer(0, i, number, kwargs[i]) for i, number in enumerate(numbers))
    while flight.busy:
        flight.step() or flight.settle()
    flyers = [Flyer(1, i, numbers[i % 3], kwargs[i]) for i in range(6)]
    flight.join([Flyer(2, 0, 20, kwargs[0])])
    torch.cuda.set_sync_debug_mode("error")
    try:
        flight.step()
        for flyer in flyers:
            flight.join([flyer])
            flight.step()
        flight.drop(flyers[:2])
        flight.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    landed = []
    while flight.busy:
        landed += flight.step() or flight.settle()
    found = {each.flyer: each.result for each in landed}
    for i, flyer in enumerate(flyers[2:], 2):
        of = {"seed": 1, "sample_id": i, "num_steps": flyer.num_steps, "model_kwargs": kwargs[i]}
        assert torch.equal(found[flyer], alone(on_gpu(), SHAPE, **of))


def test_session_tells_nan_when_a_sample_lands():
    def model(x, t, at):
        return torch.where(over(at == t, x).bool(), torch.nan, exact(x, t))

    make = on_gpu(model)
    bad = make().table.timesteps.tolist()[2]
    asked = [
        {"sample_id": i, "model_kwargs": {"at": torch.tensor([at], device="cuda")}}
        for i, at in enumerate([-1, bad, -1, -1])
    ]
    with make().session(SHAPE, max_batch=3) as session:
        handles = [session.submit(**arguments) for arguments in asked]
    with pytest.raises(FloatingPointError, match="the state turned NaN: the output of the model"):
        handles[1].result()
    for i in (0, 2, 3):
        assert torch.equal(handles[i].result(), alone(make, SHAPE, **asked[i]))


def test_session_takes_arguments_of_other_streams():
    """Which are still being computed when the sample is asked for, and forgotten at once."""
    make = on_gpu()
    with make().session(SHAPE, max_batch=4) as session:
        handles = []
        for i in range(6):
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(20_000_000)
                a = torch.full((1, *SHAPE), 0.5 + i, device="cuda")
                handles.append(session.submit(sample_id=i, model_kwargs={"a": a}))
                del a
                torch.full((64, *SHAPE), torch.nan, device="cuda")  # in its memory, if it is free
        found = [handle.result(SECONDS) for handle in handles]
    for i, x in enumerate(found):
        kwargs = {"a": torch.full((1, *SHAPE), 0.5 + i, device="cuda")}
        assert torch.equal(x, alone(make, SHAPE, sample_id=i, model_kwargs=kwargs))


def test_session_gives_results_that_any_stream_may_read():
    make = on_gpu()
    expected = [alone(make, SHAPE, sample_id=i) for i in range(20)]
    with make().session(SHAPE, max_batch=4) as session:
        handles = [session.submit(sample_id=i) for i in range(20)]
        with torch.cuda.stream(torch.cuda.Stream()):
            copies = [handle.result(SECONDS).cpu() for handle in handles]
    for x, y in zip(copies, expected, strict=True):
        assert torch.equal(x, y.cpu())


def test_session_fails_and_is_cancelled_on_a_gpu():
    gate = Gated()
    sampler = Sampler(gate, SCHEDULE, num_steps=4, device="cuda")
    with sampler.session(SHAPE, max_batch=2) as session:
        handles = [session.submit(sample_id=i) for i in range(5)]
        gate.reached()
        handles[0].cancel()
        handles[4].cancel()
        gate.open()
        bad = session.submit(model_kwargs={"a": "not a tensor"})
    for i in (1, 2, 3):
        make = on_gpu(num_steps=4)
        assert torch.equal(handles[i].result(), alone(make, SHAPE, sample_id=i))
    with pytest.raises(AttributeError):
        bad.result()


def test_session_of_few_lengths_keeps_its_memory():
    sampler = on_gpu()()
    with sampler.session([3, 64, 64], max_batch=8) as session:
        for _ in range(2):
            drawn(session, [{"sample_id": i, "num_steps": 1 + i % 4} for i in range(40)])
            torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        drawn(session, [{"sample_id": i, "num_steps": 1 + i % 4} for i in range(80)])
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before + 2**20
