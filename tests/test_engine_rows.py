"""Samples of one call at steps of their own: the bits that each has alone, and nothing waits."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import DTYPES, no_gpu
from test_engine import DIFFUSERS, OURS, model_of
from unet_weights import gap

from ddpm_fast import prepare
from ddpm_fast.backends import native
from ddpm_fast.engine import Trajectory, mixed_step
from ddpm_fast.nn import native_plan, time_table, trajectory
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


@pytest.fixture
def made(monkeypatch):
    """The classes and first steps of the parts that are made, in order."""
    seen, part = [], TimeTable.part

    def counted(self, label, start):
        seen.append((label, start))
        return part(self, label, start)

    monkeypatch.setattr(TimeTable, "part", counted)
    return seen


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


def test_wrong_rows():
    model = model_of("ho")
    x = images(model, 2)
    step = prepare(model).trajectory([5, 3]).step
    for row in (2, -1, torch.tensor(2), torch.tensor([-1]), torch.tensor([0, 2])):
        with pytest.raises(IndexError, match="row must lie in 0 … 1; got"):
            step(row, x)
    for row in (0.5, "0", None, [0, 1]):
        with pytest.raises(TypeError, match="row must be an integer, the timestep's place in"):
            step(row, x)
    for row in (torch.tensor(0.0), torch.tensor([0, 1], dtype=torch.int32), torch.tensor(True)):
        with pytest.raises(TypeError, match="row must be int64 where it is a tensor; got torch"):
            step(row, x)
    for shape in ((3,), (2, 1), (1, 1), (0,)):
        with pytest.raises(ValueError, match=r"row must be 0-d or have shape \[2\]; got \["):
            step(torch.zeros(shape, dtype=torch.int64), x)
    with pytest.raises(ValueError, match="row is on meta, and the plan on cpu"):
        step(torch.zeros(2, dtype=torch.int64, device="meta"), x)
    for keyword in ("return_dict", "labels"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            step(torch.tensor(0), x, **{keyword: None})


def test_wrong_rows_on_a_device(on_device):
    none = prepare(model_of("ho")).trajectory([])
    with pytest.raises(IndexError, match="this one has no timesteps"):
        none.step(torch.tensor(0), torch.zeros(1, 1, 8, 8))


def test_wrong_places():
    model = model_of("ho")
    plan, x = prepare(model), images(model, 2)
    one = plan.trajectory([5, 3])
    for places in ([], ()):
        with pytest.raises(ValueError, match="places must have one pair a sample; got none"):
            mixed_step(places, x[:0])
    with pytest.raises(ValueError, match="places must be 2, one a sample; got 1"):
        mixed_step([(one, 0)], x)
    for place in (one, 0, (one,), (0, one), (plan, 0), "ab"):
        with pytest.raises(TypeError, match=r"be pairs of a Trajectory and a row; got .* at 1"):
            mixed_step([(one, 0), place], x)
    for row in (0.5, None):
        with pytest.raises(TypeError, match="row must be an integer"):
            mixed_step([(one, 0), (one, row)], x)
    for row in (-1, 2):
        with pytest.raises(IndexError, match=f"row must lie in 0 … 1; got {row}"):
            mixed_step([(one, 0), (one, row)], x)
    for keyword in ("return_dict", "labels"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            mixed_step([(one, 0), (one, 1)], x, **{keyword: None})
    with pytest.raises(ValueError, match="sides must be multiples of 4"):
        mixed_step([(one, 0), (one, 1)], x[..., :6])
    with pytest.raises(ValueError, match="class_labels given to a UNet without"):
        mixed_step([(one, 0), (one, 1)], x, torch.tensor([0, 1]))


def test_trajectories_of_several_plans():
    model = model_of("ho", seed=1)
    plan, x = prepare(model), images(model, 2)
    one = plan.trajectory([5, 3])
    again = plan.trajectory([7])
    assert one.family == again.family
    other = prepare(model).trajectory([5])
    model.conv_out.bias.data.add_(0)  # nothing has changed
    assert plan.trajectory([7]).family == one.family
    with torch.no_grad():
        model.conv_out.bias.add_(1)
    changed = plan.trajectory([5])
    for second in (other, changed):
        assert second.family != one.family
        with pytest.raises(ValueError, match="of one plan, of the same weights; sample 1's is of"):
            mixed_step([(one, 0), (second, 0)], x)
    assert mixed_step([(one, 0), (again, 0)], x).shape == x.shape


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


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["ho", "classes", "guided"])
def test_one_graph_serves_all_rows(name, dtype):
    model = model_of(name)
    # A copy, since others read the model where it is
    plan = prepare(type(model)(model.config).cuda().eval(), dtype=dtype)
    trajectory, x = plan.trajectory(range(999, -1, -1)), images(model).cuda()
    for labels in labels_of(model, "cuda"):
        for shape in ((1,), (COUNT,)):
            row = torch.zeros(shape, dtype=torch.int64, device="cuda")
            with torch.cuda.stream(torch.cuda.Stream()):
                trajectory.step(row, x, labels)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = trajectory.step(row, x, labels)
            for number in (999, 3, 64):
                row.fill_(number)
                graph.replay()
                assert torch.equal(output, trajectory.step(row, x, labels))
                if shape == (1,):
                    assert torch.equal(output, trajectory.step(number, x, labels))


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu(), reason="no GPU")
def test_samples_at_several_rows_wait_for_nothing_on_a_gpu():
    model = model_of("classes")
    plan, x = prepare(type(model)(model.config).cuda().eval()), images(model).cuda()
    places = places_of(plan)
    for labels in labels_of(model, "cuda"):
        expected = mixed_step(places, x, labels)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = mixed_step(places, x, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found, expected)
