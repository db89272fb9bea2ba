"""A sample() that keeps its state ends with the bits of an undisturbed one, wherever it stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoint_cases import (
    CASES,
    SHAPE,
    Net,
    Stop,
    every_case,
    row_in,
    sampler_of,
    stops_at,
    undisturbed,
)
from graph_on_host import HostRecorder

from ddpm_fast import states
from ddpm_fast.capture import recorder

pytestmark = pytest.mark.usefixtures("one_thread")


@every_case
def test_goes_on_to_the_same_bits(tmp_path, case):
    """Stopped three times, and each time made anew."""
    for row in (4, 5, 9):
        sampler, arguments = CASES[case]()
        with pytest.raises(Stop):
            sampler.sample(SHAPE, **arguments, checkpoint=tmp_path, callback=stops_at(row))
        assert row_in(tmp_path) == row  # that of the row is unfinished: its callback has raised
    sampler, arguments = CASES[case]()
    steps: list[int] = []
    found = sampler.sample(
        SHAPE, **arguments, checkpoint=tmp_path, callback=lambda step: steps.append(step.step)
    )
    assert steps == [9, 10, 11]
    assert torch.equal(found, undisturbed(case))
    assert found.stride() == undisturbed(case).stride()


IDS = torch.arange(3)
AGAIN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"sample_ids": [0, 1, 2]}),
    ({"sample_ids": IDS}, {"sample_ids": None}),
    ({"sample_ids": IDS + 4}, {"sample_ids": range(4, 7)}),
    ({"seed": 7}, {"seed": torch.full((3,), 7)}),
    ({"seed": torch.full((3,), -1)}, {"seed": (1 << 64) - 1}),
]


@pytest.mark.parametrize(("first", "then"), AGAIN)
def test_the_same_call_in_other_words(tmp_path, first, then):
    """Seeds and ids count by what they are."""
    with pytest.raises(Stop):
        sampler_of().sample(SHAPE, **first, checkpoint=tmp_path, callback=stops_at(8))
    sampler = sampler_of()
    found = sampler.sample(SHAPE, **then, checkpoint=tmp_path)
    assert sampler.model.calls == 4
    assert torch.equal(found, sampler_of().sample(SHAPE, **first))


@every_case
def test_without_a_callback(tmp_path, case):
    """Where steps are taken in place; the model fails in the middle of one."""
    sampler, arguments = CASES[case]()
    if isinstance(sampler.model, Net):

        def fails(call: int) -> None:
            if call == 7:
                raise Stop

        sampler.model.before = fails
        with pytest.raises(Stop):
            sampler.sample(SHAPE, **arguments, checkpoint=tmp_path)
        assert 2 < row_in(tmp_path) < 10
    sampler, arguments = CASES[case]()
    found = sampler.sample(SHAPE, **arguments, checkpoint=tmp_path)
    assert torch.equal(found, undisturbed(case))


def test_a_finished_call_is_read(tmp_path):
    sampler, arguments = CASES["guidance"]()
    sampler.sample(SHAPE, **arguments, checkpoint=str(tmp_path))
    assert row_in(tmp_path) == 12
    before = (tmp_path / "state.json").stat().st_mtime_ns
    sampler, arguments = CASES["guidance"]()
    found = sampler.sample(SHAPE, **arguments, checkpoint=tmp_path, callback=stops_at(11))
    assert torch.equal(found, undisturbed("guidance"))
    assert sampler.model.calls == 0
    assert (tmp_path / "state.json").stat().st_mtime_ns == before
    found.add_(1)  # the caller's own
    assert torch.equal(
        sampler.sample(SHAPE, **arguments, checkpoint=tmp_path), undisturbed("guidance")
    )


@pytest.mark.parametrize(("every", "rows"), [(1, range(12)), (5, [0, 5, 10]), (100, [0])])
def test_how_often_it_is_saved(tmp_path, monkeypatch, every, rows):
    seen: list[int] = []
    write = states.StateFolder.write

    def counted(self, description, tensors):
        seen.append(description["row"])
        write(self, description, tensors)

    monkeypatch.setattr(states.StateFolder, "write", counted)
    sampler_of().sample(SHAPE, checkpoint=tmp_path, checkpoint_every=every)
    assert seen == [*rows, 12]


def test_what_a_callback_changes_is_saved(tmp_path):
    def paste(step):
        step.x[..., :4] = 0.1 * step.step

    def paste_and_stop(step):
        if step.step == 6:
            step.x.fill_(7)  # half of what it wanted to do
            raise Stop
        paste(step)

    expected = sampler_of().sample(SHAPE, callback=paste)
    with pytest.raises(Stop):
        sampler_of().sample(SHAPE, checkpoint=tmp_path, callback=paste_and_stop)
    assert torch.equal(sampler_of().sample(SHAPE, checkpoint=tmp_path, callback=paste), expected)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("case", ["plain", "bf16", "guidance"])
def test_with_captured_steps(tmp_path, monkeypatch, case, watched):
    """Played from a graph, the steps' one state is a buffer of the graph."""

    def sample(stop: int = -1, **more: Any) -> torch.Tensor:
        sampler, arguments = CASES[case]()
        sampler.table = sampler.table_of(40)
        callback = stops_at(stop) if watched else None
        return sampler.sample(SHAPE, **arguments, callback=callback, **more)

    expected = sample()
    monkeypatch.setitem(recorder.RECORDERS, "cpu", HostRecorder)
    monkeypatch.setattr(HostRecorder, "recordings", [])
    written: list[int] = []
    write = states.StateFolder.write

    def stops(self, description, tensors):
        write(self, description, tensors)
        written.append(description["row"])
        if not watched and written == [0, 7, 14]:
            raise Stop

    monkeypatch.setattr(states.StateFolder, "write", stops)
    with pytest.raises(Stop):
        sample(18, checkpoint=tmp_path, checkpoint_every=7)
    (first,) = HostRecorder.recordings
    assert first.replays > 14
    assert written == ([0, 7, 14, 18] if watched else [0, 7, 14])
    assert torch.equal(sample(checkpoint=tmp_path), expected)
    assert HostRecorder.recordings[1].replays > 20


def test_the_keeper_holds_a_copy(tmp_path):
    """A callback may keep a step's x and change it later."""
    kept: list[torch.Tensor] = []

    def callback(step):
        for x in kept:
            x.zero_()
        kept.append(step.x)
        if step.step == 6:
            raise Stop

    with pytest.raises(Stop):
        sampler_of().sample(SHAPE, checkpoint=tmp_path, callback=callback)
    assert torch.equal(sampler_of().sample(SHAPE, checkpoint=tmp_path), undisturbed("plain"))


def test_inside_inference_mode_and_without_samples(tmp_path):
    with torch.inference_mode():
        with pytest.raises(Stop):
            sampler_of().sample(SHAPE, checkpoint=tmp_path / "a", callback=stops_at(3))
        found = sampler_of().sample(SHAPE, checkpoint=tmp_path / "a")
        assert torch.equal(found, undisturbed("plain"))
    for _ in range(2):
        found = sampler_of().sample((0, 2, 8, 8), checkpoint=tmp_path / "b")
        assert found.shape == (0, 2, 8, 8)


def test_progress_starts_at_what_was_done(tmp_path, capfd):
    with pytest.raises(Stop):
        sampler_of().sample(SHAPE, checkpoint=tmp_path, callback=stops_at(8))
    capfd.readouterr()
    sampler_of().sample(SHAPE, checkpoint=tmp_path, progress=True)
    shown = capfd.readouterr().err
    assert "12/12" in shown
    assert "| 0/12" not in shown


def test_other_callables_are_known_by_name(tmp_path):
    def zero(x, t):
        return torch.zeros_like(x)

    expected = sampler_of(zero).sample(SHAPE)
    with pytest.raises(Stop):
        sampler_of(zero).sample(SHAPE, checkpoint=tmp_path, callback=stops_at(3))
    assert torch.equal(sampler_of(zero).sample(SHAPE, checkpoint=tmp_path), expected)
    with pytest.raises(ValueError, match=r"model: .*zero there, .*<lambda> here"):
        sampler_of(lambda x, t: x).sample(SHAPE, checkpoint=tmp_path)
