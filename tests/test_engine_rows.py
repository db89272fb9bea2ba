"""Samples of one call at steps of their own: the bits that each has alone, and nothing waits."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import DTYPES
from test_engine import DIFFUSERS, OURS, model_of
from unet_weights import gap

from ddpm_fast import prepare
from ddpm_fast.backends import native
from ddpm_fast.engine import Trajectory, mixed_step
from ddpm_fast.nn import time_table, trajectory
from ddpm_fast.nn.prepared import Prepared
from ddpm_fast.nn.rewrites import REWRITES
from ddpm_fast.nn.time_table import TimeTable

pytestmark = pytest.mark.usefixtures("one_thread")
needs_native = pytest.mark.skipif(native is None, reason="installed without compiled kernels")
COUNT = 11  # images, more than go through the network together
# Rows of trajectories of 1000, 64 and 3 timesteps: twice the same, at the edges of parts, alone
ROWS = [(0, 0), (1, 63), (2, 2), (0, 63), (0, 64), (0, 999), (2, 0), (0, 64), (1, 0), (0, 500)]
ROWS.append((0, 7))


@pytest.fixture
def on_device(monkeypatch):
    """The CPU's memory is taken for that of a device, which the host does not look at."""
    for module in (time_table, trajectory):
        monkeypatch.setattr(module, "on_host", lambda tensor: False)


def images(model, count=COUNT):
    generator, config = torch.Generator().manual_seed(5), model.config
    side = getattr(config, "image_size", None) or config.sample_size
    return torch.randn((count, config.in_channels, side, side), generator=generator)


def labels_of(model, device="cpu", count=COUNT):
    """Each way in which labels may be given."""
    config = model.config
    classes = getattr(config, "embedded_classes", None) or getattr(config, "num_class_embeds", None)
    if classes is None:
        return [None]
    given = [torch.arange(count, device=device) % classes, torch.ones(1, device=device).long()]
    return [*given, None] if getattr(config, "null_class", False) else given


def places_of(plan):
    trajectories = [
        plan.trajectory(range(999, -1, -1)),
        plan.trajectory(torch.linspace(999, 0, 64)),
        plan.trajectory([900, 500, 3]),
    ]
    return [(trajectories[which], row) for which, row in ROWS]


def of(labels, index):
    """Those of some samples."""
    return labels if labels is None or len(labels) == 1 else labels[index]


def alone(places, x, labels):
    one = [slice(i, i + 1) for i in range(len(places))]
    return torch.cat(
        [
            trajectory.step(row, x[i], of(labels, i))
            for i, (trajectory, row) in zip(one, places, strict=True)
        ]
    )


@needs_native
@pytest.mark.parametrize("name", [*OURS, *DIFFUSERS])
def test_each_sample_has_the_bits_that_it_has_alone(name, monkeypatch):
    model = model_of(name)
    plan, x = prepare(model), images(model)
    assert "native_conv" in plan.rewrites
    places = places_of(plan)
    for labels in labels_of(model):
        expected = alone(places, x, labels)
        for _ in range(2):  # the second time from parts that were kept
            assert torch.equal(mixed_step(places, x, labels), expected)
        for chosen in ([9, 2, 0, 5], [3], [7, 4], [10, 10, 1, 10], range(10, -1, -1)):
            chosen = torch.tensor(list(chosen))
            found = mixed_step([places[i] for i in chosen], x[chosen], of(labels, chosen))
            assert torch.equal(found, expected[chosen])
        monkeypatch.setattr(time_table, "KEPT", 0)
        assert torch.equal(mixed_step(places, x, labels), expected)
        monkeypatch.undo()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["ho", "guided", "classes", "theirs"])
def test_in_pytorch_to_rounding(name, dtype):
    """Its kernels round by the size of the batch."""
    model = model_of(name)
    x = images(model)
    for without in ("native_conv", ("native_conv", "time_table")):
        plan = prepare(model, without=without, dtype=dtype)
        places = places_of(plan)
        for labels in labels_of(model):
            expected = alone(places, x, labels)
            tolerance = 2e-5 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
            assert gap(mixed_step(places, x, labels), expected) < tolerance
            # As they are alone where all are at one row, whatever else was called
            once = mixed_step([places[3]] * COUNT, x, labels)
            assert torch.equal(once, places[3][0].step(places[3][1], x, labels))


@needs_native
def test_the_null_class_beside_others():
    """One sample's None is its number among another's labels."""
    model = model_of("classes")
    plan, x = prepare(model), images(model, 4)
    places = places_of(plan)[:4]
    null = mixed_step(places, x)
    assert torch.equal(mixed_step(places, x, torch.full((4,), 3)), null)
    assert torch.equal(mixed_step(places, x, torch.tensor([3])), null)
    found = mixed_step(places, x, torch.tensor([0, 3, 1, 3]))
    assert torch.equal(found[1::2], null[1::2])
    assert not torch.equal(found[::2], null[::2])


@pytest.mark.parametrize("name", ["ho", "classes", "guided"])
@pytest.mark.parametrize("rewrites", ["all", ()])
def test_rows_in_a_tensor(name, rewrites):
    model = model_of(name)
    plan, x = prepare(model, rewrites=rewrites), images(model)
    trajectory = plan.trajectory(range(999, -1, -1))
    for labels in labels_of(model):
        expected = trajectory.step(64, x, labels)
        for row in (torch.tensor(64), torch.tensor([64])):
            assert torch.equal(trajectory.step(row, x, labels), expected)
            assert torch.equal(trajectory.of_row(x, row, class_labels=labels), expected)
        rows = torch.arange(COUNT) * 90
        found = trajectory.step(rows, x, labels)
        places = [(trajectory, row) for row in rows.tolist()]
        assert torch.equal(found, mixed_step(places, x, labels))
        if rewrites and native is not None:
            assert torch.equal(found, alone(places, x, labels))
        none = of(labels, slice(0))
        assert trajectory.step(rows[:0], x[:0], none).shape == found[:0].shape


@pytest.mark.parametrize("name", ["ho", "classes", "guided"])
@pytest.mark.parametrize("rewrites", ["all", ()])
def test_rows_in_a_tensor_on_a_device(name, rewrites, on_device):
    """Of the table of all steps: the bits of its parts."""
    model = model_of(name)
    plan, x = prepare(model, rewrites=rewrites), images(model)
    timesteps = range(999, 499, -1)
    for labels in labels_of(model):
        # Its parts are its own, not of the table that another has made
        numbers, rows = plan.trajectory(timesteps), plan.trajectory(timesteps)
        expected = {row: numbers.step(row, x, labels) for row in (0, 7, 63, 64, 499)}
        for row, output in expected.items():
            assert torch.equal(rows.step(torch.tensor(row), x, labels), output)
            assert torch.equal(rows.step(torch.tensor([row]), x, labels), output)
            assert torch.equal(rows.step(row, x, labels), output)
        for wrong, right in ((-1, 0), (-(2**62), 0), (500, 499), (2**62, 499)):
            assert torch.equal(rows.step(torch.tensor(wrong), x, labels), expected[right])
        each = rows.step(torch.tensor([7, 64] * 5 + [900]), x, labels)
        for i, row in enumerate([7, 64] * 5 + [499]):
            if labels is None and rewrites and native is not None:
                assert torch.equal(each[i], expected[row][i])
            assert gap(each[i], expected[row][i]) < 1e-5
        places = [(numbers, 7), (rows, 64)] * 5 + [(numbers, 499)]
        assert gap(mixed_step(places, x, labels), each) < 1e-5


@pytest.mark.parametrize("name", ["ho", "guided", "mixed", "classes"])
@pytest.mark.parametrize("rewrites", [REWRITES, ()])
def test_nothing_is_read_by_the_host(name, rewrites):
    """Nor can it be of tensors without memory, which go the way of a device's."""
    model = model_of(name)
    plan = Prepared(
        type(model)(model.config).to("meta").eval(), frozenset(rewrites), torch.bfloat16
    )
    one, two = Trajectory(plan, range(999, -1, -1)), Trajectory(plan, [9, 5, 3])
    x = images(model).to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()
    for labels in labels_of(model, "meta"):
        for shape in ((), (1,), (COUNT,)):
            row = torch.zeros(shape, dtype=torch.int64, device="meta")
            assert one.step(row, x, labels).dtype == torch.bfloat16
        assert mixed_step([(one, 3), (two, 1)] * 5 + [(one, 999)], x, labels).is_meta
        assert mixed_step([(one, 3)] * COUNT, x, labels).is_meta


def test_no_table_is_made_in_a_graph(monkeypatch):
    """What a capture computes has no values yet, so that nothing may keep it."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the table that it reads is made: call it once"):
        TimeTable(SimpleNamespace(classes=None), SimpleNamespace(is_cuda=True))
    prepare(model_of("ho")).trajectory([5]).step(torch.tensor(0), torch.zeros(1, 1, 8, 8))


@needs_native
def test_from_several_threads(monkeypatch):
    model = model_of("classes")
    plan, x = prepare(model), images(model)
    places, labels = places_of(plan), torch.arange(COUNT) % 4
    expected = alone(places, x, labels)
    monkeypatch.setattr(time_table, "KEPT", 0)  # they forget each other's
    wrong = []

    def work(shift):
        for turn in range(10):
            chosen = torch.tensor([(shift + turn * i) % COUNT for i in range(5)])
            found = mixed_step([places[i] for i in chosen], x[chosen], labels[chosen])
            if not torch.equal(found, expected[chosen]):
                wrong.append(chosen)

    threads = [threading.Thread(target=work, args=(shift,)) for shift in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
