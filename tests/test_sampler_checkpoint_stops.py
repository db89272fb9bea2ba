"""A sample() that keeps its state, interrupted and killed: nothing that was saved is lost."""

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

import pytest
import torch
from checkpoint_cases import (
    CASES,
    SHAPE,
    Stop,
    forked,
    row_in,
    sampler_of,
    stops_at,
    undisturbed,
)
from test_states import count_to

from ddpm_fast import states
from ddpm_fast.states import has_state, read_state

pytestmark = pytest.mark.usefixtures("one_thread")


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
        if before == 12:
            break  # done already
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
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (-signal.SIGKILL, 0)
    assert forked(work) == 0
    assert torch.equal(torch.load(out), undisturbed(case))
    assert len(os.listdir(folder)) == 3


GOES_ON = """
import sys
from pathlib import Path
import torch
import checkpoint_cases as tests
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
