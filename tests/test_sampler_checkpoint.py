"""A sample() that keeps its state ends with the bits of an undisturbed one, wherever it stopped."""

from __future__ import annotations

import errno
import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_on_host import HostRecorder
from test_states import count_to
from torch import nn

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, randn, states
from ddpm_fast.capture import recorder
from ddpm_fast.states import has_state, read_state

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEDULE = NoiseSchedule.linear(100)
SHAPE = (3, 2, 8, 8)


class Net(nn.Module):
    """Convolutions that know t and a class; ``calls`` counts, and ``before`` is called first."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        torch.manual_seed(outputs)
        self.inside = nn.Conv2d(2, 8, 3, padding=1)
        self.outside = nn.Conv2d(8, outputs, 3, padding=1)
        self.classes = nn.Embedding(5, 8)
        self.register_buffer("scale", torch.linspace(0.1, 1, 100), persistent=False)
        self.calls, self.before = 0, lambda call: None

    def forward(self, x, t, y=None, **ignored):
        self.before(self.calls)
        self.calls += 1
        h = self.inside(x) * self.scale[t.long()].to(x.dtype)[:, None, None, None]
        if y is not None:
            h = h + self.classes(y)[:, :, None, None]
        return self.outside(torch.sin(h))


UNET = UNetConfig(
    image_size=8, in_channels=2, channels=(16, 16), num_res_blocks=1, attention_resolutions=(4,),
    norm_groups=4, num_classes=3,
)  # fmt: skip


def unet() -> UNet:
    torch.manual_seed(5)
    return UNet(UNET).eval()


def sampler_of(model=None, **arguments: Any) -> Sampler:
    return Sampler(model or Net().eval(), SCHEDULE, **{"num_steps": 12, **arguments})


X_T = randn(SHAPE, seed=3)
CLASSES, OTHERS = torch.tensor([0, 3, 1]), torch.tensor([4, 4, 4])
# What is called: a sampler made anew, and the arguments of sample()
CASES: dict[str, Any] = {
    "plain": lambda: (sampler_of(), {}),
    "ddim": lambda: (sampler_of(method="ddim", eta=0.5), {"seed": (1 << 64) - 1}),
    "bf16": lambda: (sampler_of(Net().eval().bfloat16()), {"seed": 2}),
    "learned": lambda: (sampler_of(Net(4).eval(), variance="learned_range"), {}),
    "addresses": lambda: (
        sampler_of(), {"seed": torch.tensor([1, -1, 9]), "sample_ids": [5, 1 << 40, 0]},
    ),
    "guidance": lambda: (
        sampler_of(guidance_scale=torch.tensor([1.5, 2.0, 0.0])),
        {"model_kwargs": {"y": CLASSES}, "uncond_kwargs": {"y": OTHERS}},
    ),
    "threshold": lambda: (
        sampler_of(dynamic_threshold=0.9, denoised_fn=torch.tanh), {"seed": 4},
    ),
    "start": lambda: (
        sampler_of(), {"x_T": X_T.contiguous(memory_format=torch.channels_last), "start": 2},
    ),
    "unet": lambda: (sampler_of(unet()), {"model_kwargs": {"class_labels": CLASSES % 4}}),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


class Stop(Exception):
    pass


def stops_at(row: int):
    """A callback that ends the loop after the step of a row."""

    def callback(step):
        if step.step == row:
            raise Stop

    return callback


@functools.cache
def undisturbed(case: str) -> torch.Tensor:
    sampler, arguments = CASES[case]()
    return sampler.sample(SHAPE, **arguments)


def row_in(folder: Path) -> int:
    return read_state(folder, "sample")[0]["row"]


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


# Interrupted and killed ------------------------------------------------------------------------


OURS = ("sampler.py", "sampling.py", "resuming.py", "states.py", "locking.py", "checkpoint.py")


def interrupted_at(moment: int, call) -> bool:
    """Calls it with Ctrl-C before the line of that number of this package's; whether it came."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if os.path.basename(frame.f_code.co_filename) not in OURS:
            return None
        if event == "line":
            lines += 1
            if lines == moment:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize(
    "first", [14, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 14))]
)
def test_interrupted_anywhere(tmp_path, first):
    """In a step, while its state is copied or saved, at the beginning and at the end."""
    expected = sampler_of(num_steps=4).sample(SHAPE)
    for moment in range(first, 100_000, 14):
        folder = tmp_path / str(moment)
        call = functools.partial(
            sampler_of(num_steps=4).sample, SHAPE, checkpoint=folder, checkpoint_every=2
        )
        came = interrupted_at(moment, call)
        sampler = sampler_of(num_steps=4)
        assert torch.equal(sampler.sample(SHAPE, checkpoint=folder, checkpoint_every=2), expected)
        if not came:
            break
    assert moment > 300
    assert sampler.model.calls == 0  # that of the last was finished


def test_ctrl_c_while_the_model_runs(tmp_path):
    def interrupt(call):
        if call == 5:
            os.kill(os.getpid(), signal.SIGINT)

    sampler = sampler_of()
    sampler.model.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(SHAPE, checkpoint=tmp_path)
    assert row_in(tmp_path) == 5
    assert torch.equal(sampler_of().sample(SHAPE, checkpoint=tmp_path), undisturbed("plain"))


@pytest.mark.parametrize("first", [Stop("the first"), KeyboardInterrupt("the first")])
@pytest.mark.parametrize("second", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_save_that_fails_hides_nothing(tmp_path, monkeypatch, first, second):
    def fails(*_):
        raise second

    def stop(step):
        if step.step == 5:
            monkeypatch.setattr(states, "write_bytes", fails)
            raise first

    with (
        pytest.raises(type(first), match="the first"),
        pytest.warns(UserWarning, match=r"could not be saved in .* before step 4: (OSE|Keyb)"),
    ):
        sampler_of().sample(SHAPE, checkpoint=tmp_path, checkpoint_every=4, callback=stop)
    monkeypatch.undo()
    assert row_in(tmp_path) == 4
    assert torch.equal(sampler_of().sample(SHAPE, checkpoint=tmp_path), undisturbed("plain"))


@pytest.mark.filterwarnings("error")
def test_warnings_that_are_errors_hide_nothing(tmp_path, monkeypatch):
    def stop(step):
        if step.step == 2:
            monkeypatch.setattr(states, "write_bytes", None)
            raise Stop

    with pytest.raises(Stop):
        sampler_of().sample(SHAPE, checkpoint=tmp_path, callback=stop)
    assert row_in(tmp_path) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("at", [3, 5])
def test_disk_full(tmp_path, monkeypatch, at):
    """It ends cleanly, with the state before: the error comes once, and nothing is tried again."""
    write, count = states.write_bytes, 0

    def fills_up(path, *parts):
        nonlocal count
        count += 1
        if count >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, *parts)

    monkeypatch.setattr(states, "write_bytes", fills_up)
    with pytest.raises(OSError, match="No space left on device"):
        sampler_of().sample(SHAPE, checkpoint=tmp_path, checkpoint_every=4)
    assert count == at
    monkeypatch.undo()
    assert row_in(tmp_path) == {3: 0, 5: 4}[at]
    assert torch.equal(sampler_of().sample(SHAPE, checkpoint=tmp_path), undisturbed("plain"))


def test_a_state_with_nan_is_not_saved(tmp_path):
    def breaks(step):
        if step.step == 6:
            step.x[0, 0, 0, 0] = torch.nan

    with pytest.raises(FloatingPointError, match="NaN at step 7"):
        sampler_of().sample(SHAPE, checkpoint=tmp_path, checkpoint_every=1, callback=breaks)
    description, tensors = read_state(tmp_path, "sample")
    assert description["row"] == 6
    assert not tensors["x"].isnan().any()
    assert torch.equal(sampler_of().sample(SHAPE, checkpoint=tmp_path), undisturbed("plain"))


def forked(work) -> int:
    """Its exit status in another process; negative: the signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_at_any_file_operation(tmp_path, monkeypatch):
    for operation in range(0, 200, 3):
        folder = tmp_path / str(operation)

        def work(operation=operation, folder=folder):
            count_to(operation, monkeypatch, lambda: os._exit(9))
            sampler_of().sample(SHAPE, checkpoint=folder, checkpoint_every=3)
            os._exit(0)

        status = forked(work)
        sampler = sampler_of()
        found = sampler.sample(SHAPE, checkpoint=folder)
        assert torch.equal(found, undisturbed("plain"))
        assert sampler.model.calls == 0 or status == 9
        if status == 0:
            break
        assert status == 9
    assert operation > 40


@pytest.mark.parametrize("case", ["plain", "guidance", "unet"])
def test_killed_at_random(tmp_path, case):
    """kill -9 of process after process, each a little further; the last is left alone."""
    moments, folder, out = random.Random(case), tmp_path / "state", tmp_path / "found.pt"

    def work():
        sampler, arguments = CASES[case]()
        found = sampler.sample(
            SHAPE, **arguments, checkpoint=folder, checkpoint_every=1,
            callback=lambda _: time.sleep(0.01),
        )  # fmt: skip
        torch.save(found, out)
        os._exit(0)

    for _ in range(5):
        before = row_in(folder) if has_state(folder) else -1
        child = os.fork()
        if child == 0:
            try:
                work()
            finally:
                os._exit(1)
        while not (has_state(folder) and row_in(folder) > before):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert forked(work) == 0
    assert torch.equal(torch.load(out), undisturbed(case))
    assert len(os.listdir(folder)) == 3


GOES_ON = """
import sys
from pathlib import Path
import torch
import test_sampler_checkpoint as tests
torch.set_num_threads(1)
for case in tests.CASES:
    sampler, arguments = tests.CASES[case]()
    steps = []
    found = sampler.sample(
        tests.SHAPE, **arguments, checkpoint=Path(sys.argv[1]) / case,
        callback=lambda step: steps.append(step.step),
    )
    torch.save((steps, found), Path(sys.argv[1]) / (case + ".pt"))
"""


def test_in_another_interpreter(tmp_path):
    for case in CASES:
        sampler, arguments = CASES[case]()
        with pytest.raises(Stop):
            sampler.sample(SHAPE, **arguments, checkpoint=tmp_path / case, callback=stops_at(7))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "77",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    subprocess.run([sys.executable, "-c", GOES_ON, tmp_path], env=environment, check=True)
    for case in CASES:
        steps, found = torch.load(tmp_path / f"{case}.pt")
        assert steps == [7, 8, 9, 10, 11]
        assert torch.equal(found, undisturbed(case)), case
