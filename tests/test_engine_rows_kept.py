"""What is kept for samples of one call at steps of their own, and for batches of any size."""

from __future__ import annotations

import gc

import pytest
import torch
from test_engine import model_of
from test_engine_rows import images, needs_native

from ddpm_fast import prepare
from ddpm_fast.engine import mixed_step
from ddpm_fast.nn import native_plan, time_table
from ddpm_fast.nn.time_table import TimeTable

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def made(monkeypatch):
    """The classes and first steps of the parts that are made, in order."""
    seen, part = [], TimeTable.part

    def counted(self, label, start):
        seen.append((label, start))
        return part(self, label, start)

    monkeypatch.setattr(TimeTable, "part", counted)
    return seen


def walk(trajectory, x, starts, steps, labels=None):
    """Samples that were begun one after another and go on together."""
    for step in range(steps):
        mixed_step([(trajectory, start + step) for start in starts], x, labels)


def test_parts_are_made_once(made):
    model = model_of("ho")
    trajectory = prepare(model).trajectory(range(999, -1, -1))
    x = images(model, 5)
    walk(trajectory, x, [0, 40, 60, 100, 900], 70)
    assert sorted(made) == [(None, start) for start in (0, 64, 128, 896, 960)]
    made.clear()
    trajectory.step(0, x)  # all at one row keep their own
    trajectory.step(1, x)
    assert made == [(None, 0)]


def test_parts_of_classes_are_made_once(made):
    model = model_of("classes")
    trajectory = prepare(model).trajectory(range(999, -1, -1))
    walk(trajectory, images(model, 4), [0, 5, 7, 500], 8, torch.tensor([0, 1, 1, 3]))
    # Of class 0 steps 0 … 7; of class 1 steps 5 … 14; of the null class steps 500 … 507
    assert sorted(made) == [(0, 0), (1, 0), (1, 8), (3, 496), (3, 504)]
    made.clear()
    walk(trajectory, images(model, 4), [0, 5, 7, 500], 8, torch.tensor([0, 1, 1, 3]))
    assert not made


def test_memory_of_parts_is_bounded_over_all_trajectories(made, monkeypatch):
    """Beside what the call itself needs, the latest."""
    model = model_of("classes")
    plan = prepare(model)
    some = [plan.trajectory(range(999, -1, -1)) for _ in range(3)]
    x = images(model, 3)
    mixed_step([(one, 0) for one in some], x)
    rows = plan._prepared.time
    size = 8 * sum(rows.widths) * 4
    assert size == next(iter(some[0]._table().kept.values())).lines.nbytes

    def kept():
        return [(i, key) for i, one in enumerate(some) for key in one._table().kept]

    monkeypatch.setattr(time_table, "KEPT", 2 * size + 1)
    mixed_step([(some[0], 8), (some[0], 9), (some[2], 1)], x)
    assert kept() == [(0, (3, 0)), (0, (3, 8)), (1, (3, 0)), (2, (3, 0))]
    mixed_step([(some[0], 16)], x[:1])
    # Three were not read, of which the one that was read before the others goes
    assert len(kept()) == 3
    assert {(0, (3, 8)), (2, (3, 0)), (0, (3, 16))} == set(kept())
    # A call may need more than that
    mixed_step([(some[1], row) for row in range(0, 240, 8)], images(model, 30))
    assert len(some[1]._table().kept) == 30
    assert len(kept()) == 32
    made.clear()
    mixed_step([(some[1], row) for row in range(7, 240, 8)], images(model, 30))
    assert not made
    del some[1]
    gc.collect()
    assert len(rows._tables) == 2  # what it kept has gone with it


def test_samples_that_go_together_keep_one_part_a_class(made):
    """As many as without calls at several rows, over the whole trajectory."""
    model = model_of("classes")
    trajectory = prepare(model).trajectory(range(999, -1, -1))
    x = images(model, 3)
    for row in range(0, 40):
        trajectory.step(row, x, torch.tensor([0, 2, 2]))
        trajectory.step(row, x)
    assert sorted(made) == sorted((c, start) for c in (0, 2, 3) for start in range(0, 40, 8))
    table = trajectory._table()
    assert not table.kept
    assert not table._whole
    assert {label: start for label, (start, _) in table._latest.items()} == {0: 32, 2: 32, 3: 32}


@needs_native
@pytest.mark.parametrize("order", [range(1, 33), range(32, 0, -1), [20, 3, 8, 5, 31, 6, 7] * 3])
def test_batches_of_all_sizes_are_recorded_once(order, monkeypatch):
    """And work on the memory of the largest part."""
    model = model_of("mixed")
    x = images(model, 32)
    expected = prepare(model).trajectory([5]).step(0, x)
    recorded, made = [], native_plan._Program

    def counted(plan, space, n, h, w):
        recorded.append(n)
        return made(plan, space, n, h, w)

    monkeypatch.setattr(native_plan, "_Program", counted)
    plan = prepare(model)
    trajectory = plan.trajectory([5])
    for count in order:
        assert torch.equal(trajectory.step(0, x[:count]), expected[:count])
    for count in range(1, 33):
        assert torch.equal(trajectory.step(0, x[:count]), expected[:count])
    recorded.clear()
    for count in (32, 1, 9, 17, 31, 4, 8, 23):
        assert torch.equal(trajectory.step(0, x[:count]), expected[:count])
    assert not recorded

    def held(plan):
        (programs,) = plan._prepared.executor._programs.values()
        programs._memory.begin_again()
        return sum(t.nbytes for free in programs._memory._free.values() for t in free)

    eight = prepare(model)
    eight.trajectory([5]).step(0, x[:8])
    assert held(plan) == held(eight)


@needs_native
def test_a_few_images_have_memory_for_a_few(monkeypatch):
    model = model_of("mixed")
    plan, x = prepare(model), images(model, 8)
    trajectory = plan.trajectory([5])
    for count, memory in ((1, 1), (3, 3), (2, 3), (8, 8), (1, 8)):
        trajectory.step(0, x[:count])
        (programs,) = plan._prepared.executor._programs.values()
        assert programs.images == memory
