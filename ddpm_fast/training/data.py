"""Data sets of images: the bundled digits, or a folder.

Needs pillow for folders and scikit-learn for the digits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..progress import bar
from ..schedule import integer
from .dataset import ImageData, TensorImages
from .folders import SPLITS, OnBadImage, open_folder
from .images import MODES, UnreadableImage, fit, shown, to_mode
from .loader import Batch, Loader
from .order import data_order, flips

__all__ = [
    "Batch",
    "ImageData",
    "Loader",
    "OnBadImage",
    "TensorImages",
    "UnreadableImage",
    "data_order",
    "flips",
    "open_data",
]

IN_MEMORY_BYTES = 256 << 20
_READ_AT_ONCE = 256


def open_data(
    spec: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    channels: int = 3,
    split: str = "train",
    workers: int = 0,
    on_bad_image: OnBadImage = "raise",
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    in_memory: bool | None = None,
    progress: bool = False,
) -> ImageData:
    """The images of ``spec``, one size and number of channels.

    Args:
        spec: "digits", scikit-learn's 1,797 handwritten digits of 8×8 pixels, a fifth of each class
            held out as "test"; or a folder of images of any format that pillow reads, in folders of
            any depth. Where all lie in root/<class>/…, they have labels, by the classes' sorted
            names. Where there are root/train and root/test, each is a split; otherwise the whole
            folder is either. ("./digits" is a folder.)
        image_size: the side that images are brought to: the middle square, halved by averaging,
            then resampled by a cubic. None: the size that all images have.
        channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; what is transparent lies on white
            where there is no alpha.
        split: "train" or "test".
        workers: processes that read images.
        on_bad_image: "raise", or "skip" an image that cannot be read: the next one in order stands
            for it. Each is named once in the log and counted in ``bad_images``.
        num_classes: what the labels must be below; images without labels are then refused.
        class_names: the classes' names in the order of their labels, if other than sorted.
        in_memory: read all images now; by default if they then take at most 256 MiB.
        progress: show a bar while they are read (needs tqdm).

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: no such folder, or no images in it.
        UnreadableImage: an image that cannot be read, unless skipped. Of a set that is not held in
            memory it is found when it is its turn.
        TypeError, ValueError: an argument out of its range; images of different sizes and no
            ``image_size``; labels that are missing or not below ``num_classes``.

    >>> data = open_data("digits", channels=1, split="test")
    >>> len(data), data.image_shape, data.num_classes
    (360, (1, 8, 8), 10)
    """
    if image_size is not None and integer("image_size", image_size) < 1:
        raise ValueError(f"image_size must be at least 1, or None; got {image_size}")
    if channels not in MODES:
        raise ValueError(f"channels must be 1, 2, 3 or 4; got {channels!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test'; got {split!r}")
    if integer("workers", workers) < 0:
        raise ValueError(f"workers must be at least 0; got {workers}")
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(f"on_bad_image must be 'raise' or 'skip'; got {on_bad_image!r}")
    data: ImageData
    if spec == "digits":
        data = _digits(image_size, channels, split)
    else:
        data = open_folder(
            Path(spec),
            image_size=image_size,
            channels=channels,
            split=split,
            on_bad_image=on_bad_image,
            class_names=class_names,
        )
        data.workers = workers
    _check_labels(data, num_classes, shown(spec))
    if isinstance(data, TensorImages):
        return data
    if in_memory is None:
        in_memory = len(data) * math.prod(data.image_shape) <= IN_MEMORY_BYTES
    return _read_all(data, progress) if in_memory else data


def _digits(image_size: int | None, channels: int, split: str) -> TensorImages:
    from PIL import Image

    from .digits import load_digits

    digits = load_digits()
    train = split == "train"
    images = digits.train_images if train else digits.held_out_images
    labels = digits.train_labels if train else digits.held_out_labels
    if channels != 1 or image_size not in (None, images.shape[-1]):
        side = image_size or images.shape[-1]
        pictures = (
            to_mode(fit(Image.fromarray(image), side), MODES[channels])
            for image in images[:, 0].numpy()
        )
        pixels = np.stack([np.asarray(picture).reshape(side, side, -1) for picture in pictures])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return TensorImages(images, labels)


def _check_labels(data: ImageData, num_classes: int | None, where: str) -> None:
    if num_classes is None:
        return
    if data.class_names is None:
        raise ValueError(
            f"{where} has no labels, and {num_classes} classes are asked for: for labels, each "
            "image must lie in its class's folder, FOLDER/<class>/…"
        )
    if len(data.class_names) > num_classes:
        raise ValueError(
            f"{where} has {len(data.class_names)} classes, labels must be below {num_classes}: "
            f"{data.class_names[num_classes]!r} is label {num_classes}"
        )


def _read_all(data: ImageData, progress: bool) -> TensorImages:
    """``data`` in memory; what could not be read is replaced as it would be later."""
    starts = range(0, len(data), _READ_AT_ONCE)
    positions = [range(start, min(start + _READ_AT_ONCE, len(data))) for start in starts]
    images = torch.empty((len(data), *data.image_shape), dtype=torch.uint8)
    labels = torch.empty(len(data), dtype=torch.int64)
    with (
        Loader(data, positions, shuffle=False) as loader,
        bar(progress, len(data), "reading images") as shown_bar,
    ):
        for batch in loader:
            images[batch.sample_ids] = batch.images
            if batch.labels is not None:
                labels[batch.sample_ids] = batch.labels
            shown_bar.update(len(batch.images))
    names = data.class_names
    read = TensorImages(images, None if names is None else labels, names)
    read.bad_images.update(data.bad_images)
    read.files_sha256 = data.files_sha256
    return read
