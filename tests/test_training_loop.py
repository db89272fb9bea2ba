"""The training loop: its log, samples and checkpoints, what stops it, the lock of its folder."""

from __future__ import annotations

import errno
import math
import os
import signal
import sys

import pytest
import torch
from PIL import Image
from training_runs import (
    assert_same_run,
    assert_same_weights,
    log_of,
    losses,
    new_trainer,
    tiny_config,
    tiny_images,
    trained,
)

from ddpm_fast.training import checkpoints
from ddpm_fast.training.checkpoints import load_model, read_checkpoint, steps_in
from ddpm_fast.training.errors import RunError
from ddpm_fast.training.interrupts import Interrupts
from ddpm_fast.training.lock import RunLock
from ddpm_fast.training.loop import Loop

pytestmark = pytest.mark.usefixtures("one_thread")


def looped(out, config, data=None, start=None):
    trainer = new_trainer(config)
    if start is not None:
        trainer.restore(start)
    out.mkdir(exist_ok=True)
    loop = Loop(trainer, data or tiny_images(), out, start, quiet=True)
    return loop.run(), trainer


def test_log_samples_and_checkpoints(tmp_path):
    output = {"log_every": 2, "sample_every": 3, "checkpoint_every": 2, "keep": 2, "num_samples": 3}
    config = tiny_config(steps=7, output={**output, "sampling_steps": 2})
    assert looped(tmp_path, config)[0] == 0
    log = log_of(tmp_path)
    assert [line["step"] for line in log] == [2, 4, 6, 7]
    assert [line["samples"] for line in log] == [16, 32, 48, 56]
    every = losses(trained(tiny_config(steps=7), 7))
    means = [sum(every[a:b]) / (b - a) for a, b in ((0, 2), (2, 4), (4, 6), (6, 7))]
    assert [line["loss"] for line in log] == pytest.approx(means, rel=1e-12)
    assert log[0]["learning_rate"] == pytest.approx(2e-4)
    assert all(line["grad_norm"] > 0 for line in log)
    assert sorted(os.listdir(tmp_path / "samples")) == [
        "step-00000003.png", "step-00000006.png", "step-00000007.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "samples" / "step-00000007.png") as image:
        assert image.size == (3 * 10 + 2, 12)
    assert [step for step, _ in steps_in(tmp_path / "checkpoints")] == [6, 7]
    assert load_model(tmp_path).step == 7


def test_the_log_goes_on_where_the_checkpoint_is(tmp_path):
    """Lines beyond it, and one cut short, are dropped; a mean over both sides is the same."""
    config = tiny_config(steps=6, output={"log_every": 4, "checkpoint_every": 3, "keep": 0})
    looped(tmp_path, config)
    whole = log_of(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    start = read_checkpoint(tmp_path / "checkpoints" / "step-00000003")
    looped(tmp_path, config, start=start)
    assert [{**line, "images_per_second": 0} for line in log_of(tmp_path)] == [
        {**line, "images_per_second": 0} for line in whole
    ]


def test_tensorboard(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny_config(
        steps=4, output={"tensorboard": True, "sample_every": 4, "sampling_steps": 2}
    )
    looped(tmp_path, config)
    events = reading.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss",
        "grad_norm",
        "learning_rate",
        "images_per_second",
    }
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [
        (line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in log_of(tmp_path)
    ]
    assert [event.step for event in events.Images("samples")] == [4]


def test_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = tiny_config(steps=1, output={"tensorboard": True})
    trainer = new_trainer(config)
    Loop(trainer, tiny_images(), tmp_path, None, quiet=False).run()
    err = capsys.readouterr().err
    assert err.count("TensorBoard is not installed") == 1
    assert "images/s" in err
    assert not (tmp_path / "tensorboard").exists()


def test_values_read_seldom_are_the_same(tmp_path):
    """As on a GPU, which is waited for only where a line, a checkpoint or the end is due."""
    config = tiny_config(steps=11, output={"log_every": 4, "checkpoint_every": 6})
    looped(tmp_path / "each", config)
    trainer = new_trainer(config)
    (tmp_path / "seldom").mkdir()
    loop = Loop(trainer, tiny_images(), tmp_path / "seldom", None, quiet=True)
    loop.reads_every_step = False
    reads, read = [], trainer.read
    trainer.read = lambda: reads.append(trainer.step_count) or read()
    loop.run()
    assert reads == [4, 6, 8, 11]
    assert_same_run(tmp_path / "each", tmp_path / "seldom")


@pytest.mark.parametrize(
    ("reads_every_step", "bad_step", "where"),
    [
        (True, 4, "at step 4 (sample ids 24 … 31, of them not finite: 29)"),
        (False, 3, "at step 3 (sample ids 16 … 23)"),  # seen at step 4, before it is saved
    ],
)
def test_a_loss_that_is_not_finite(tmp_path, reads_every_step, bad_step, where, monkeypatch):
    """Stops with the step, the ids and the last good checkpoint, which stays good."""
    config = tiny_config(output={"checkpoint_every": 2, "log_every": 6})
    trainer = new_trainer(config)
    original, steps = trainer.loss._measured, iter(range(1, 10))

    def measured(*args):
        result = original(*args)
        bad = torch.arange(8) == 5
        return result.masked_fill(bad, math.nan) if next(steps) == bad_step else result

    monkeypatch.setattr(trainer.loss, "_measured", measured)
    loop = Loop(trainer, tiny_images(), tmp_path, None, quiet=True)
    loop.reads_every_step = reads_every_step
    with pytest.raises(RunError) as stopped:
        loop.run()
    last = tmp_path / "checkpoints" / "step-00000002"
    assert str(stopped.value) == f"the loss is nan {where}; the last good checkpoint is {last}"
    assert stopped.value.status == 1
    assert load_model(tmp_path).path == last
    assert all(p.isfinite().all() for p in load_model(last).model.parameters())


def test_a_gradient_that_is_not_finite(tmp_path):
    trainer = new_trainer(tiny_config())
    trainer.model.conv_out.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(
        RunError, match=r"gradient's norm is (nan|inf) at step 1 \(sample ids 0 … 7\)"
    ):
        Loop(trainer, tiny_images(), tmp_path, None, quiet=True).run()


def test_a_disk_that_fills(tmp_path, monkeypatch):
    config = tiny_config(output={"checkpoint_every": 2})
    original = checkpoints.weights.write_bytes

    def write(path, *parts):
        if "step-00000004" in str(path) and path.name == "optimizer.safetensors":
            path.write_bytes(parts[0][:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, *parts)

    monkeypatch.setattr(checkpoints.weights, "write_bytes", write)
    with pytest.raises(RunError) as stopped:
        looped(tmp_path, config)
    folder = tmp_path / "checkpoints"
    assert str(stopped.value) == (
        f"cannot write the checkpoint of step 4 to {folder}: No space left on device; the last "
        f"good checkpoint is {folder / 'step-00000002'}"
    )
    assert sorted(os.listdir(folder)) == ["latest", "step-00000000", "step-00000002"]
    monkeypatch.undo()
    _, resumed = looped(tmp_path, config, start=read_checkpoint(folder / "latest"))
    assert_same_weights(resumed, trained(config, 6))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_log_that_cannot_be_written(tmp_path):
    trainer = new_trainer(tiny_config(output={"checkpoint_every": 2, "log_every": 3}))
    loop = Loop(trainer, tiny_images(), tmp_path, None, quiet=True)
    loop._journal._log = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    with pytest.raises(RunError, match=r"No space left on device; the last good .*step-00000002"):
        loop.run()
    assert load_model(tmp_path).step == 2


def test_an_image_that_cannot_be_read(tmp_path):
    """Found when it is its turn, in a folder too large for memory."""
    from ddpm_fast.training.data import open_data

    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        Image.new("L", (8, 8), 10 * i).save(images / f"{i:02}.png")
    (images / "13.png").write_bytes(b"not an image")
    config = tiny_config(unet={"num_classes": None})
    data = open_data(images, image_size=8, channels=1, in_memory=False)
    with pytest.raises(
        RunError, match=r"cannot read image .*13\.png: .*--on-bad-image skip .*good"
    ):
        looped(tmp_path / "run", config, data)
    data = open_data(images, image_size=8, channels=1, in_memory=False, on_bad_image="skip")
    looped(tmp_path / "other", config, data)
    assert len(data.bad_images) == 1
    assert log_of(tmp_path / "other")[-1]["bad_images"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(tmp_path, number):
    config = tiny_config(steps=50, output={"log_every": 20})
    trainer = new_trainer(config)
    step = trainer.step

    def interrupted(batches):
        step(batches)
        if trainer.step_count == 3:
            os.kill(os.getpid(), number)

    trainer.step = interrupted
    before = signal.getsignal(number)
    loop = Loop(trainer, tiny_images(), tmp_path, None, quiet=True)
    loop.reads_every_step = number == signal.SIGINT
    assert loop.run() == number
    assert signal.getsignal(number) is before
    start = read_checkpoint(tmp_path / "checkpoints" / "latest")
    assert start.step == 3
    assert len(start.state["losses"]) == 3
    shorter = tiny_config(steps=6)
    _, resumed = looped(tmp_path, shorter, start=start)
    assert_same_weights(resumed, trained(shorter, 6))


def test_a_second_ctrl_c_stops_at_once(capfd):
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "Ctrl-C again stops at once" in capfd.readouterr().err


# The lock ----------------------------------------------------------------------------------


def test_the_lock_is_the_process_alone(tmp_path):
    lock = RunLock(tmp_path / "lock")
    with pytest.raises(RunError, match="in use by another call in this process: wait"):
        RunLock(tmp_path / "lock")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # outlives the process that forked it, as a data worker might
        os.write(writing, b"x")
        signal.pause()
    os.read(reading, 1)
    lock._file.close()  # as the kernel does when the process is killed
    try:
        with RunLock(tmp_path / "lock"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_ends_a_loop_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    """A reading process that was killed, and images of which none can be read."""
    from ddpm_fast.training.images import NoReadableImageError

    failures = {
        "a process that reads images has ended: DataLoader worker (pid 7) is killed": RuntimeError(
            "DataLoader worker (pid 7) is killed by signal: Killed.\nmore"
        ),
        "none of the 3 images": NoReadableImageError("none of the 3 images of x is readable"),
    }
    for i, (message, failure) in enumerate(failures.items()):
        out = tmp_path / str(i)
        out.mkdir()
        loop = Loop(new_trainer(tiny_config()), tiny_images(), out, None, True)

        def fails(*_, failure=failure):
            raise failure

        monkeypatch.setattr(loop, "step", fails)
        with pytest.raises(RunError) as caught:
            loop.run()
        assert str(caught.value).startswith(message)
        good = out / "checkpoints" / "step-00000000"
        assert str(caught.value).endswith(f"; the last good checkpoint is {good}")


def test_a_lost_peer_is_told_without_guesses():
    from ddpm_fast.training.world import first_line

    error = RuntimeError(
        "[pair.cc:544] Connection closed by peer [::1]:9. This is typically caused by the remote "
        "process crashing.\nmore"
    )
    assert first_line(error) == "[pair.cc:544] Connection closed by peer [::1]:9"


def test_the_log_holds_finite_numbers(tmp_path):
    from ddpm_fast.training.journal import Journal

    journal = Journal(tmp_path, tiny_config(), 0, [0.5], True)
    journal.write_line(1, grad_norm=math.inf, other=math.nan)
    journal.close()
    (line,) = log_of(tmp_path)
    assert (line["loss"], line["grad_norm"], line["other"]) == (0.5, None, None)


def test_torchrun_s_patience_is_told(monkeypatch, capfd):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.signal == signal.SIGTERM
    assert "torchrun kills what has not ended after 30 s" in capfd.readouterr().err
