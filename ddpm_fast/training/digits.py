"""A class-conditional DDPM on scikit-learn's bundled handwritten digits, start to finish.

1,797 real images of 8×8 pixels: trains on four fifths of them, samples every class with guidance,
and asks a classifier fitted on the same real training images what it sees.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..loss import DenoisingLoss
from ..nn import UNet, UNetConfig
from ..nn.checkpoint import write_bytes
from ..sampler import Sampler
from ..schedule import NoiseSchedule
from .checkpoints import Snapshot, write_folder
from .config import DataConfig, LossConfig, OptimizerConfig, RunConfig, ScheduleConfig
from .order import data_order

REQUIRED_ACCURACY = 0.9


@dataclass(frozen=True)
class DigitsConfig:
    """What the demo trains and draws."""

    train_steps: int = 1500
    batch_size: int = 128
    learning_rate: float = 2e-3
    ema_decay: float = 0.995
    sampling_steps: int = 100
    label_dropout: float = 0.1
    guidance_scale: float = 1.5
    samples_per_class: int = 50
    seed: int = 0
    unet: UNetConfig = field(
        default_factory=lambda: UNetConfig(
            image_size=8,
            in_channels=1,
            channels=(32, 64),
            num_res_blocks=1,
            attention_resolutions=(4,),
            num_heads=2,
            dropout=0.05,
            num_classes=10,
            label_dropout=0.0,  # the loss drops labels
            norm_groups=8,
        )
    )


@dataclass(frozen=True)
class Digits:
    """uint8 images [N, 1, 8, 8] in 0 … 255 and int64 labels [N]."""

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load_digits(seed: int = 0) -> Digits:
    """The bundled digits, a fifth of each class held out."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    data = load()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
    parts = train_test_split(
        images, data.target, test_size=0.2, random_state=seed, stratify=data.target
    )
    train_images, held_out_images, train_labels, held_out_labels = map(torch.from_numpy, parts)
    return Digits(train_images, train_labels.long(), held_out_images, held_out_labels.long())


def train(
    digits: Digits, schedule: NoiseSchedule, config: DigitsConfig, progress: bool
) -> tuple[UNet, list[float]]:
    """ε-regression (Ho et al. 2020, algorithm 1); the EMA of the weights and each step's loss."""
    from tqdm.auto import tqdm

    torch.manual_seed(config.seed)
    model: UNet = UNet(config.unet).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=config.train_steps, pct_start=0.1
    )
    objective = DenoisingLoss(
        schedule, label_dropout=config.label_dropout, null_label=config.unet.num_classes
    )
    losses = []
    bar = tqdm(
        range(config.train_steps),
        desc="training",
        unit="step",
        mininterval=1.0,
        disable=not progress,
    )
    for step in bar:
        chosen = data_order(
            len(digits.train_labels), objective.samples_seen, config.batch_size, config.seed
        )
        loss = objective(
            model,
            digits.train_images[chosen],
            seed=config.seed,
            model_kwargs={"class_labels": digits.train_labels[chosen]},
        ).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        ema.update_parameters(model)
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(np.mean(losses[-50:])):.4f}")
    averaged = ema.module
    assert isinstance(averaged, UNet)
    return averaged.eval(), losses


def snapshot(model: UNet, config: DigitsConfig) -> Snapshot:
    """The averaged model as a run's checkpoint, which ddpm-fast samples from, serves, evaluates and
    converts; for training to go on, it lacks the optimiser and the rate's one cycle."""
    run = RunConfig(
        DataConfig("digits"),
        config.unet,
        ScheduleConfig("cosine"),
        LossConfig(variance="fixed_small", label_dropout=config.label_dropout),
        OptimizerConfig("adamw", config.learning_rate, warmup_steps=0),
        ema_rates=(),  # the weights are the average already
        batch_size=config.batch_size,
        steps=config.train_steps,
        seed=config.seed,
    )
    names = [str(label) for label in range(10)]
    samples = config.train_steps * config.batch_size
    return Snapshot(
        run, run.steps, samples, model.state_dict(), {}, {}, state={"class_names": names}
    )


def to_pixels(x: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[N, 1, 8, 8] in [-1, 1] as uint8 [N, 8, 8]."""
    levels = ((x[:, 0] + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).numpy()


class Judge:
    """A classifier of real digits (a support vector machine), asked about generated ones."""

    def __init__(self, digits: Digits) -> None:
        from sklearn.svm import SVC

        self._classifier = SVC(gamma=0.001, C=10.0)
        self._classifier.fit(_features(digits.train_images[:, 0].numpy()), digits.train_labels)

    def accuracy(self, pixels: np.ndarray[Any, np.dtype[np.uint8]], labels: Tensor) -> float:
        seen = self._classifier.predict(_features(pixels))
        return float((seen == labels.numpy()).mean())


def _features(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, Any]:
    return pixels.reshape(len(pixels), -1) * (16 / 255)  # as the data set has them


def run(directory: Path, config: DigitsConfig, progress: bool = True) -> dict[str, Any]:
    """Trains, samples, judges and writes everything; the report.

    Files: checkpoint/, samples.png, denoising.gif, loss.png, report.json.
    """
    from . import figures

    directory.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    digits = load_digits(config.seed)
    schedule = NoiseSchedule.cosine(1000)
    model, losses = train(digits, schedule, config, progress)
    trained = time.perf_counter()

    labels = torch.arange(10).repeat(config.samples_per_class)  # 0 … 9, 0 … 9, …
    sampler = Sampler(
        model,
        schedule,
        num_steps=config.sampling_steps,
        spacing="trailing",
        guidance_scale=config.guidance_scale,
    )
    shown, frames = 10, []
    every = max(1, config.sampling_steps // 50)

    def keep_frame(step: Any) -> None:
        if step.step % every == 0 or step.step == len(sampler) - 1:
            frames.append(to_pixels(step.x[: 10 * shown]))

    samples = sampler.sample(
        [len(labels), 1, 8, 8],
        seed=config.seed,
        model_kwargs={"class_labels": labels},
        uncond_kwargs={"class_labels": None},
        progress=progress,
        callback=keep_frame,
    )
    sampled = time.perf_counter()

    pixels = to_pixels(samples)
    judge = Judge(digits)
    report = {
        "images_trained_on": len(digits.train_labels),
        "images_held_out": len(digits.held_out_labels),
        "generated": len(labels),
        "accuracy_on_generated": judge.accuracy(pixels, labels),
        "accuracy_on_held_out_real": judge.accuracy(
            digits.held_out_images[:, 0].numpy(), digits.held_out_labels
        ),
        "required_accuracy": REQUIRED_ACCURACY,
        "loss_first_100_steps": float(np.mean(losses[:100])),
        "loss_last_100_steps": float(np.mean(losses[-100:])),
        "seconds_training": round(trained - started, 1),
        "seconds_sampling": round(sampled - trained, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "config": asdict(config),
    }
    write_folder(directory / "checkpoint", snapshot(model, config))
    write_bytes(directory / "samples.png", figures.sample_grid(pixels[: 10 * shown]))
    write_bytes(directory / "denoising.gif", figures.animation(frames))
    write_bytes(directory / "loss.png", figures.loss_curve(losses))
    report["seconds_total"] = round(time.perf_counter() - started, 1)
    write_bytes(directory / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    return report
