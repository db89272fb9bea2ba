"""What the trainer adds to the model's time for the digits preset: data, averages, clipping, the
loop, the log, the bar. The bare step is forward, loss, backward and optimiser on one batch."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from results import OURS

from ddpm_fast import UNet
from ddpm_fast.loss import DenoisingLoss
from ddpm_fast.training.data import Loader, open_data
from ddpm_fast.training.dropout import SampleAddress, address_dropout
from ddpm_fast.training.fields import merged
from ddpm_fast.training.interrupts import Interrupts
from ddpm_fast.training.loop import Loop
from ddpm_fast.training.presets import completed, preset
from ddpm_fast.training.trainer import Trainer
from ddpm_fast.training.world import World

AT_ONCE = 5  # steps of each candidate in turn
KEPT = {"steps": 1 << 30, "output": {"checkpoint_every": 1 << 30, "sample_every": 0}}


def bare_step(trainer: Trainer, images: torch.Tensor, labels: torch.Tensor, by_address: bool):
    """One step of an equal model, with the trainer's dropout or with torch's."""
    config = trainer.config
    torch.manual_seed(config.seed)
    model = UNet(config.unet).to(images.device, memory_format=torch.channels_last).train()
    address = SampleAddress(config.seed)
    if by_address:
        address_dropout(model, address)
    loss = DenoisingLoss(
        trainer.loss.schedule, label_dropout=config.loss.label_dropout, null_label=10
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    size = len(images)

    def step() -> None:
        ids = range(loss.samples_seen, loss.samples_seen + size)
        address.sample_ids = torch.arange(ids.start, ids.stop, device=images.device)
        out = loss(model, images, seed=0, sample_ids=ids, model_kwargs={"class_labels": labels})
        loss.samples_seen += size
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_a_step(step: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(AT_ONCE):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / AT_ONCE


@pytest.mark.full
def bench_digits(record, device, tmp_path):
    data = open_data("digits", channels=1)
    values = merged({"data": {"path": "digits"}, **preset("digits")}, KEPT)
    config = completed(values, data.image_shape, data.num_classes)
    trainer = Trainer(config, World(str(device)))
    loop = Loop(trainer, data, tmp_path, None, quiet=False)
    batches = iter(Loader(data, trainer.positions(), seed=config.seed))
    interrupts = Interrupts()

    images, labels = data.batch(range(config.batch_size))
    assert labels is not None
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    candidates = {
        OURS: lambda: loop.step(batches, interrupts),
        "the model, its optimiser": bare_step(trainer, images, labels.to(device), True),
        "the same with torch's dropout": bare_step(trainer, images, labels.to(device), False),
    }
    for step in candidates.values():  # the first steps set things up
        seconds_a_step(step, device)
    rounds, seconds = [], 20.0
    names, deadline = list(candidates), time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(rounds) < 5:
        rounds.append({name: seconds_a_step(candidates[name], device) for name in names})
        names.append(names.pop(0))  # none always follows the same
    with record.checking("trainer, digits", images):
        assert trainer.step_count == AT_ONCE * (1 + len(rounds)), "steps of the trainer"
        parameters = [parameter.detach() for parameter in trainer.model.parameters()]
        assert all(p.isfinite().all() for p in parameters), "a parameter is not finite"
    loop.close()
    record("trainer, digits", images, [{n: r[n] for n in candidates} for r in rounds])
