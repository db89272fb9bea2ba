"""Runs small enough for tests: a tiny network, its commands, what is compared of two runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddpm_fast.cli import main
from ddpm_fast.training.checkpoints import read_checkpoint
from ddpm_fast.training.config import RunConfig
from ddpm_fast.training.data import ImageData, Loader, TensorImages
from ddpm_fast.training.fields import merged
from ddpm_fast.training.presets import completed
from ddpm_fast.training.trainer import Parallel, Trainer
from ddpm_fast.training.world import World

TINY: dict[str, Any] = {
    "data": {"path": "digits"},
    "unet": {
        "channels": [8, 8],
        "num_res_blocks": 1,
        "attention_resolutions": [4],
        "num_heads": 2,
        "dropout": 0.1,
        "norm_groups": 4,
    },
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "warmup_steps": 10},
    "ema_rates": [0.99, 0.9],
    "batch_size": 8,
    "steps": 6,
    "output": {"log_every": 1, "sample_every": 0, "checkpoint_every": 50, "tensorboard": False},
}
CHILD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def tiny_images(count: int = 100) -> TensorImages:
    """Images without a data set's import."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return TensorImages(images, torch.arange(count) % 10)


def tiny_config(**over: Any) -> RunConfig:
    return completed(merged(TINY, over), (1, 8, 8), 10)


def trained(config: RunConfig, steps: int, data: ImageData | None = None) -> Trainer:
    """A trainer after some steps; its losses are pending."""
    return go_on(new_trainer(config), steps, data)


def new_trainer(config: RunConfig, parallel: Parallel = "ddp") -> Trainer:
    return Trainer(config, World("cpu"), parallel)


def go_on(trainer: Trainer, steps: int, data: ImageData | None = None) -> Trainer:
    loader = Loader(data or tiny_images(), trainer.positions(), seed=trainer.config.seed)
    batches = iter(loader)
    for _ in range(steps):
        trainer.step(batches)
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def losses(trainer):
    return [loss for _, loss, _ in trainer.read()]


def assert_same_weights(a, b, tolerance=0.0):
    for name, value in weights(a).items():
        torch.testing.assert_close(weights(b)[name], value, rtol=0, atol=tolerance)


@pytest.fixture(name="config")
def config_file(tmp_path) -> Path:
    return written(tmp_path / "tiny.json", {})


def written(path: Path, over: dict) -> Path:
    path.write_text(json.dumps(merged(TINY, over)))
    return path


@pytest.fixture(name="images")
def image_folder(tmp_path) -> Path:
    """A folder with two classes, of images of several sizes and modes."""
    for i in range(24):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.effect_noise((8 + i % 3, 8 + i % 2), 60 + i)
        picture.convert(("L", "RGB", "RGBA", "P")[i % 4]).save(folder / f"{i:02}.png")
    return tmp_path / "images"


def train(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


# A folder's images are read when they are asked for, however few they are.
READS_FILES = """
from ddpm_fast.training import data
data.IN_MEMORY_BYTES = 0
from ddpm_fast.cli import main
raise SystemExit(main())
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ddpm_fast.cli", "train", *map(str, arguments)]


def torchrun(
    processes: int, *arguments: object, program: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """``ddpm-fast train`` or another program in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc-per-node={processes}"]
    launcher += ["-m", "ddpm_fast.cli", "train"] if program is None else [str(program), "train"]
    return subprocess.run(
        [*launcher, *map(str, arguments)], env=CHILD, capture_output=True, text=True, timeout=240
    )


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_run(a: Path, b: Path) -> None:
    """The last checkpoints to the bit, file by file, and the logs but for the time they took."""
    one, other = (out / "checkpoints" / "latest" for out in (a, b))
    assert read_checkpoint(one).step == read_checkpoint(other).step
    for file in ("config.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    states = [re.sub(r'"path": ".*"', "", (c / "state.json").read_text()) for c in (one, other)]
    assert states[0] == states[1]
    for line, same in zip(log_of(a), log_of(b), strict=True):
        assert {**line, "images_per_second": 0} == {**same, "images_per_second": 0}
