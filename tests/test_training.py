"""The trainer: a function of the samples consumed, whatever parts they come in."""

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
    go_on,
    log_of,
    new_trainer,
    tiny_config,
    tiny_images,
    trained,
    weights,
)

from ddpm_fast import UNet, randn
from ddpm_fast.training import checkpoints
from ddpm_fast.training.checkpoints import load_model, read_checkpoint, steps_in
from ddpm_fast.training.dropout import AddressedDropout, SampleAddress, address_dropout
from ddpm_fast.training.ema import Averages
from ddpm_fast.training.errors import RunError
from ddpm_fast.training.interrupts import Interrupts
from ddpm_fast.training.lock import RunLock
from ddpm_fast.training.loop import Loop

pytestmark = pytest.mark.usefixtures("one_thread")


def losses(trainer):
    return [loss for _, loss, _ in trainer.read()]


def assert_same_weights(a, b, tolerance=0.0):
    for name, value in weights(a).items():
        torch.testing.assert_close(weights(b)[name], value, rtol=0, atol=tolerance)


# The samples decide ------------------------------------------------------------------------


def test_a_run_is_a_function_of_its_seed():
    config = tiny_config()
    first, second = trained(config, 3), trained(config, 3)
    assert losses(first) == losses(second)
    assert_same_weights(first, second)
    other = trained(tiny_config(seed=1), 3)
    assert not torch.equal(weights(first)["conv_in.weight"], weights(other)["conv_in.weight"])


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"optimizer": {"name": "adam", "clip_norm": None}, "grad_accum": 2},
        {"loss": {"timestep_sampling": "loss_second_moment"}, "schedule": {"num_steps": 4}},
        {"loss": {"timestep_sampling": "antithetic", "weighting": "min_snr"}, "precision": "bf16"},
        {"loss": {"variance": "learned_range", "objective": "hybrid"}, "ema_rates": []},
    ],
    ids=["adamw", "accumulated", "second moment", "bf16", "hybrid"],
)
def test_resumed_to_the_bit(tmp_path, over):
    """Through the files: weights, averages, the optimiser, the loss's history."""
    config = tiny_config(**over)
    straight = trained(config, 6)
    begun = trained(config, 3)
    path = checkpoints.write_checkpoint(tmp_path, begun.snapshot())
    resumed = new_trainer(config)
    resumed.restore(read_checkpoint(path))
    go_on(resumed, 3)
    assert_same_weights(straight, resumed)
    a, b = straight.snapshot(), resumed.snapshot()
    assert (a.step, a.samples, a.state) == (b.step, b.samples, b.state) == (6, 48, a.state)
    assert a.optimizer.keys() == b.optimizer.keys()
    assert all(torch.equal(a.optimizer[name], b.optimizer[name]) for name in a.optimizer)
    for rate in config.ema_rates:
        assert all(torch.equal(a.averages[rate][n], b.averages[rate][n]) for n in a.averages[rate])
    assert losses(straight)[3:] == losses(resumed)


def test_parts_make_the_batch():
    """Dropout, dropped labels and timesteps included: 1e-6 is float32's rounding."""
    whole, parts = trained(tiny_config(), 3), trained(tiny_config(grad_accum=4), 3)
    torch.testing.assert_close(
        torch.tensor(losses(whole)), torch.tensor(losses(parts)), rtol=2e-6, atol=0
    )
    assert_same_weights(whole, parts, 1e-5)


def test_activation_checkpointing_changes_no_bit():
    plain, again = trained(tiny_config(), 3), trained(tiny_config(activation_checkpointing=True), 3)
    assert losses(plain) == losses(again)
    assert_same_weights(plain, again)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    again.model.mid_res1.conv1.register_forward_hook(count)
    go_on(again, 1)
    assert calls == 2  # the second in the backward pass


def test_what_is_trained_on():
    """The loss of the first step, by hand: the order, noise and timesteps of ids 0 … 7."""
    config = tiny_config(loss={"label_dropout": 0.0}, unet={"dropout": 0.0})
    trainer = new_trainer(config)
    from ddpm_fast import add_noise, reference
    from ddpm_fast.training.data import data_order

    data, ids = tiny_images(), torch.arange(8)
    images, labels = data.batch(data_order(len(data), 0, 8, seed=0).tolist())
    schedule = config.build_schedule()
    t = reference.random_timesteps(1000, torch.zeros(8, dtype=torch.int64), ids)
    x_t = add_noise(images, t, schedule, seed=0, sample_ids=ids)
    eps = randn(x_t.shape, seed=0, sample_ids=ids, stream=2)
    torch.manual_seed(0)
    model = UNet(config.unet)
    expected = torch.nn.functional.mse_loss(model(x_t, t, labels), eps)
    go_on(trainer, 1)
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-6)


def test_a_shorter_warm_up_moves_more():
    config = tiny_config()
    assert [config.optimizer.learning_rate_at(s) for s in (1, 5, 10, 11)] == [
        1e-4,
        5e-4,
        1e-3,
        1e-3,
    ]
    trainer = trained(config, 2)
    assert trainer.learning_rate == 2e-4


@pytest.mark.parametrize("limit", [0.1, 1e6, None])
def test_clipping_is_torchs(limit):
    trainer = new_trainer(tiny_config())
    ours, theirs = (list(trainer.model.parameters()) for _ in range(2))
    gradients = [torch.randn_like(p) for p in ours]
    for parameter, gradient in zip(ours, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = trainer._clip(limit)
    clipped = [p.grad for p in ours]
    for parameter, gradient in zip(theirs, gradients, strict=True):
        parameter.grad = gradient
    expected = torch.nn.utils.clip_grad_norm_(theirs, limit or math.inf, foreach=True)
    assert torch.equal(norm, expected)
    assert all(torch.equal(a, p.grad) for a, p in zip(clipped, theirs, strict=True))


def test_fp16_passes_over_a_step_that_overflows(tmp_path):
    """The loss scale is halved, kept in checkpoints, and the run goes on."""
    config = tiny_config(precision="fp16", steps=4)
    trainer = new_trainer(config)

    def overflow(grad):
        return grad * math.inf if trainer.step_count == 2 else grad  # in the third step

    trainer.model.conv_out.weight.register_hook(overflow)
    go_on(trainer, 2)
    before = weights(trainer)
    go_on(trainer, 1)
    assert not math.isfinite(trainer.read()[-1][2])
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    kept = read_checkpoint(checkpoints.write_checkpoint(tmp_path, trainer.snapshot()))
    assert kept.state["scaler"]["scale"] == 2.0**15
    resumed = new_trainer(config)
    resumed.restore(kept)
    assert_same_weights(go_on(trainer, 1), go_on(resumed, 1))
    assert not torch.equal(before["conv_in.weight"], weights(trainer)["conv_in.weight"])


def test_sharding_takes_several_processes():
    with pytest.raises(RunError, match="fsdp takes several processes"):
        new_trainer(tiny_config(), "fsdp")


# Dropout -----------------------------------------------------------------------------------


def test_dropout_of_a_sample_is_its_own():
    address = SampleAddress(seed=3)
    drop = AddressedDropout(0.3, address, 5)
    x = torch.ones(64, 4, 16, 16)
    address.sample_ids = torch.arange(100, 164)
    mask = drop(x)
    assert torch.equal(
        mask, torch.where(randn_of(address, x.shape, 5) < -0.524400512708041, 0, x / 0.7)
    )
    share = (mask == 0).double().mean()
    assert abs(share - 0.3) < 5 * math.sqrt(0.21 / x.numel())  # five sigma
    address.sample_ids = torch.tensor([130, 101])
    assert torch.equal(drop(x[:2]), mask[[30, 1]])
    assert torch.equal(drop(x[:2].contiguous(memory_format=torch.channels_last)), mask[[30, 1]])
    assert not torch.equal(AddressedDropout(0.3, address, 6)(x[:2]), mask[[30, 1]])
    assert drop.eval()(x) is x


def randn_of(address, shape, index):
    return randn(shape, seed=address.seed, sample_ids=address.sample_ids, stream=9, index=index)


def test_every_dropout_is_replaced():
    model = UNet(tiny_config().unet)
    found = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    address_dropout(model, SampleAddress(0))
    replaced = [m for m in model.modules() if isinstance(m, AddressedDropout)]
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(found) == len(replaced) == 8
    assert sorted(m.index for m in replaced) == list(range(8))
    assert {m.p for m in replaced} == {0.1}


# Averages ----------------------------------------------------------------------------------


def test_averages():
    """a ← d a + (1 − d) θ, d = min(rate, (1 + t)/(10 + t)), in float64."""
    weights = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    averages = Averages(weights, [0.5, 0.99])
    expected = {rate: [w.clone() for w in weights] for rate in (0.5, 0.99)}
    for t in range(30):
        for w in weights:
            w += torch.randn_like(w)
        averages.update(weights, t)
        for rate, ours in expected.items():
            d = min(rate, (1 + t) / (10 + t))
            ours[:] = [d * a + (1 - d) * w for a, w in zip(ours, weights, strict=True)]
    for rate, ours in expected.items():
        for a, b in zip(averages.shadows[rate], ours, strict=True):
            torch.testing.assert_close(a, b)
    kept = [w.clone() for w in weights]
    with averages.swapped_in(weights, 0.99):
        assert torch.equal(weights[0], averages.shadows[0.99][0])
    assert all(torch.equal(w, k) for w, k in zip(weights, kept, strict=True))


def test_samples_are_the_averages_and_change_nothing():
    trainer = trained(tiny_config(output={"num_samples": 4, "sampling_steps": 3}), 3)
    before = weights(trainer)
    images = trainer.sample()
    assert (images.dtype, images.shape) == (torch.uint8, (4, 1, 8, 8))
    assert torch.equal(images, trainer.sample())
    assert trainer.model.training
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    one_by_one = trained(tiny_config(output={"num_samples": 1, "sampling_steps": 3}), 3).sample()
    assert (one_by_one[0].int() - images[0].int()).abs().max() <= 1


@pytest.mark.parametrize(
    "over",
    [
        {"loss": {"prediction": "v_prediction"}, "schedule": {"zero_terminal_snr": True}},
        {"loss": {"variance": "learned"}, "unet": {"num_classes": None}, "precision": "bf16"},
        {"schedule": {"name": "jsd", "num_steps": 2}, "loss": {"prediction": "sample"}},
    ],
    ids=["zero snr", "learned, unconditional", "two steps"],
)
def test_samples_of_every_kind(over):
    trainer = trained(tiny_config(output={"num_samples": 2, "sampling_steps": 3}, **over), 2)
    assert trainer.sample().shape == (2, 1, 8, 8)
    assert all(math.isfinite(loss) for loss in losses(trainer))


# The loop ----------------------------------------------------------------------------------


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
    with pytest.raises(RunError, match=rf"in use by another process \(pid {os.getpid()}\)"):
        RunLock(tmp_path / "lock")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # outlives the process that forked it, as a data worker might
        os.write(writing, b"x")
        signal.pause()
    os.read(reading, 1)
    os.close(lock._descriptor)  # as the kernel does when the process is killed
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
