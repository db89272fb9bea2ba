"""Images of a trained model by number: a batch at a time, or a folder of PNG files.

Image i of a seed is the same whichever others are drawn beside it, up to the rounding of the model
itself, which may depend on the batch. So batches are cut at multiples of the batch size, whichever
process draws them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..nn import UNet
from ..progress import job
from ..sampler import Sampler
from ..schedule import Method, NoiseSchedule, Prediction, Spacing, Variance
from .checkpoints import LoadedModel
from .drawn_folder import DrawnFolder, Share
from .pictures import to_uint8

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WRITERS = 4


@dataclass(frozen=True)
class DrawConfig:
    """How images are drawn.

    Attributes:
        seed: in [0, 2^64).
        method: "ddpm" or "ddim".
        num_steps: of the method; None: as many as the model was trained on.
        spacing: of the steps' timesteps, where they are fewer.
        eta: of "ddim".
        class_label: of all images; None: the image's number mod the number of classes.
        guidance_scale: of classifier-free guidance; None: without.
        precision: of the model's weights and arithmetic; the state is float32.
    """

    seed: int = 0
    method: Method = "ddpm"
    num_steps: int | None = None
    spacing: Spacing = "leading"
    eta: float = 0.0
    class_label: int | None = None
    guidance_scale: float | None = None
    precision: Precision = "fp32"


class Artist:
    """Draws the images of a model by number.

    Args:
        model: the UNet; it is moved to ``device`` and brought to the precision.
        schedule, prediction, variance: what it was trained with.
        config: how to draw.
        device: where; by default where the model is.

    Raises:
        ValueError: a class or guidance that the model has not learned, a method's argument out of
            range.

    >>> from ddpm_fast import NoiseSchedule, UNet, UNetConfig
    >>> config = UNetConfig(image_size=8, in_channels=1, channels=(32,), attention_resolutions=())
    >>> schedule = NoiseSchedule.linear(4)
    >>> artist = Artist(UNet(config), schedule, "epsilon", "fixed_small", DrawConfig(seed=7))
    >>> artist.images([4711]).shape
    torch.Size([1, 1, 8, 8])
    """

    def __init__(
        self,
        model: UNet,
        schedule: NoiseSchedule,
        prediction: Prediction,
        variance: Variance,
        config: DrawConfig,
        device: torch.device | str | None = None,
    ) -> None:
        classes = model.config.num_classes
        label, scale = config.class_label, config.guidance_scale
        if classes is None and (label is not None or scale is not None):
            what = "class" if label is not None else "guidance scale"
            raise ValueError(f"a {what} is given, and the model was trained without classes")
        if label is not None and classes is not None and not 0 <= label < classes:
            raise ValueError(f"class must lie in 0 … {classes - 1}; got {label}")
        self.config, self.num_classes = config, classes
        self.image_shape = (model.config.in_channels, *[model.config.image_size] * 2)
        model.eval().to(device=device, dtype=DTYPES[config.precision])
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.1 to 1.3 ×
        self.sampler = Sampler(
            model,
            schedule,
            prediction=prediction,
            variance=variance,
            method=config.method,
            eta=config.eta,
            num_steps=config.num_steps,
            spacing=config.spacing,
            guidance_scale=scale,
        )
        self._model = model

    @classmethod
    def of(
        cls, loaded: LoadedModel, config: DrawConfig, device: torch.device | str | None = None
    ) -> Artist:
        """For a model that :func:`~ddpm_fast.training.checkpoints.load_model` gave.

        Raises:
            ValueError: guidance of a model that never saw an image without its class.
        """
        loss = loaded.config.loss
        if config.guidance_scale is not None and loss.label_dropout == 0:
            raise ValueError(
                "a guidance scale is given, and the model was trained without label dropout: it "
                "has not learned what images are like whose class is not told"
            )
        schedule = loaded.config.build_schedule()
        return cls(loaded.model, schedule, loss.prediction, loss.variance, config, device)

    def labels(self, ids: Sequence[int]) -> Tensor | None:
        """The classes of these images, int64 [N], or None where the model has none."""
        if self.num_classes is None:
            return None
        label = self.config.class_label
        return torch.tensor([i % self.num_classes if label is None else label for i in ids])

    def images(self, ids: Sequence[int], labels: Tensor | None = None) -> Tensor:
        """The images of these numbers, uint8 [N, C, H, W] on the CPU.

        Args:
            ids: non-negative.
            labels: int64 [N] in place of :meth:`labels`.

        Raises:
            FloatingPointError: the model gave NaN.
        """
        labels = self.labels(ids) if labels is None else labels
        device = self._model.conv_in.weight.device
        kwargs = {} if labels is None else {"class_labels": labels.to(device)}
        x = self.sampler.sample(
            [len(ids), *self.image_shape],
            seed=self.config.seed,
            sample_ids=list(ids),
            model_kwargs=kwargs,
            uncond_kwargs=None if self.config.guidance_scale is None else {"class_labels": None},
        )
        return to_uint8(x)

    def fingerprint(self) -> str:
        """Of all that decides what an image looks like, its number aside; 16 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=8)
        table = self.sampler.table
        described = {
            **asdict(self.config),
            "unet": asdict(self._model.config),
            "prediction": table.prediction,
            "variance": table.variance,
        }
        digest.update(json.dumps(described, sort_keys=True).encode())
        for tensor in (table.rows, table.timesteps, *self._model.state_dict().values()):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


@dataclass(frozen=True)
class Drawn:
    """What a process has drawn.

    Attributes:
        images: how many.
        seconds: that they took.
        beyond: images that the folder holds of numbers from ``num`` on.
    """

    images: int
    seconds: float
    beyond: int


def draw_folder(
    artist: Artist,
    out: Path,
    num: int,
    *,
    batch_size: int = 64,
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> Drawn:
    """Images 0 … num − 1 as out/000000.png …, and out/grid.png of the first hundred.

    Batch k, the images k · batch_size …, is drawn by process k mod world_size, unless all its files
    are there. Each file is written whole or not at all and says in itself what it was drawn with.
    The processes need not know of each other: whichever sees all of the grid's images writes it.
    While a batch is drawn, the one before is written: no more than the two are in memory.

    Raises:
        ValueError: a number out of range.
        FileExistsError: ``out`` holds an image drawn with other settings, unless ``overwrite``.
        OSError: ``out`` cannot be written.
        FloatingPointError: the model gave NaN.
    """
    share = Share(num, batch_size, rank, world_size)
    folder = DrawnFolder(out, share, artist.fingerprint(), overwrite)
    shared = world_size > 1
    what, count = f"process {rank} draws" if shared else "drawing", 0
    began, there = time.monotonic(), folder.there
    written: list[Future[None]] = []
    pool = ThreadPoolExecutor(_WRITERS)
    try:
        with job(progress, share.images, there, what, lines=shared) as progress_shown:
            for ids in folder.to_draw():
                images = artist.images(ids)
                _wait(written)
                written = [
                    pool.submit(folder.write, i, image)
                    for i, image in zip(ids, images, strict=True)
                ]
                count += len(ids)
                progress_shown.update(len(ids), folder.there - there)
                there = folder.there
            _wait(written)
    finally:  # whatever stops it, the files that are being written are finished
        pool.shutdown(cancel_futures=True)
    seconds = time.monotonic() - began
    folder.write_grid()
    return Drawn(count, seconds, folder.beyond)


def _wait(written: list[Future[None]]) -> None:
    """Until the files are written; what went wrong with one is raised."""
    for future in written:
        future.result()
