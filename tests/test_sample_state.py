"""By what a session's saved state is known: the sampler, and the arithmetic of its steps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from checkpoint_cases import SCHEDULE, Net, unet

from ddpm_fast import Sampler
from ddpm_fast.sessions import Session

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = [2, 8, 8]
# What differs, as the error names it; the sampler's arguments there and here
DIFFERENCES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (r"the plan: channels_last.* there, none here", {"model": unet()}, {"plan": "off"}),
    (r"the plan: channels_last.* there, time_table in", {"model": unet()},
     {"plan": ["time_table"]}),
    (r"the plan: .* in torch.float32 there, .* in torch.bfloat16 here", {"model": unet()},
     {"plan_dtype": torch.bfloat16}),
    ("the model's dtype: torch.float32 there, torch.bfloat16 here", {},
     {"model": Net().eval().bfloat16()}),
    ("the backend: cpu there, reference here", {}, {"backend": "reference"}),
    ("method: ddpm there, ddim here", {}, {"method": "ddim"}),
    ("the model's net's weights: 6 tensors, SHA-256",
     {"model": (lambda net: lambda x, t: net(x, t))(Net().eval())},
     {"model": (lambda net: lambda x, t: net(x, t))(Net().eval().half())}),
]  # fmt: skip


def session_of(arguments: dict[str, Any], shape=SHAPE) -> Session:
    arguments = {"model": Net().eval(), "num_steps": 6, **arguments}
    return Sampler(schedule=SCHEDULE, **arguments).session(shape, max_batch=2)


@pytest.mark.parametrize(
    ("named", "there", "here"), DIFFERENCES, ids=[each[0].split(": ")[0] for each in DIFFERENCES]
)
def test_another_sampler_or_arithmetic_is_refused(tmp_path, named, there, here):
    with session_of(there) as session:
        expected = session.submit(seed=3, num_steps=4)
        session.save(tmp_path)
        expected = expected.result()
    with session_of({**there, **here}) as session, pytest.raises(ValueError, match=named):
        session.restore(tmp_path)
    with session_of(there) as session:
        (handle,) = session.restore(tmp_path)
        assert torch.equal(handle.result(), expected)


def test_autocast_is_that_of_who_made_the_session(tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        session = session_of({})
    with session:
        session.submit()
        session.save(tmp_path)  # by someone who has another
    with session_of({}) as session:
        with pytest.raises(ValueError, match=r"autocast: torch\.bfloat16 there, off here"):
            session.restore(tmp_path)
        refused = pytest.raises(ValueError, match=r"autocast: torch\.bfloat16 there, off here")
        with torch.autocast("cpu", torch.bfloat16), refused:  # of no account to the session
            session.restore(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        session = session_of({})
    with session:
        assert len(session.restore(tmp_path)) == 1


def test_another_shape_is_refused(tmp_path):
    with session_of({}) as session:
        session.submit()
        session.save(tmp_path)
    refused = pytest.raises(ValueError, match=r"shape: \[2, 8, 8\] there, \[2, 8, 4\] here")
    with session_of({}, [2, 8, 4]) as session, refused:
        session.restore(tmp_path)
    found = json.loads((tmp_path / "state.json").read_text())["description"]["sampler"]
    assert all(type(value) is str for value in found.values())
