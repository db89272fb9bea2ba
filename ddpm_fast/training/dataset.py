"""What a data set is to a training run: images by number."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .images import UnreadableImage

log = logging.getLogger(__name__)


class ImageData(ABC):
    """Images by number, the same whenever and in whichever process they are asked for.

    Attributes:
        image_shape: (C, H, W).
        class_names: of the labels 0, 1, …; None where there are no labels.
        workers: how many processes read ahead, unless the Loader is told.
        bad_images: what could not be read so far, by number.
        files_sha256: of the sorted list of a folder's files; None where there is no folder.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], class_names: Sequence[str] | None, workers: int = 0
    ) -> None:
        self.image_shape = image_shape
        self.class_names = None if class_names is None else list(class_names)
        self.workers = workers
        self.bad_images: dict[int, UnreadableImage] = {}
        self.files_sha256: str | None = None

    @property
    def num_classes(self) -> int | None:
        """Labels lie in 0 … num_classes − 1."""
        return None if self.class_names is None else len(self.class_names)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The images of these numbers, uint8 [N, C, H, W], and their labels, int64 [N] or None."""

    def note_bad(self, index: int, error: UnreadableImage) -> None:
        """Counts an image that is to be skipped, and names it once, in the process that loads."""
        if index not in self.bad_images:
            self.bad_images[index] = error
            if get_worker_info() is None:
                log.warning("skipped: %s", error)


class TensorImages(ImageData):
    """Images that are in memory.

    Args:
        images: uint8 [N, C, H, W], N at least 1.
        labels: int64 [N] in 0 … len(class_names) − 1, or None.
        class_names: of the labels; by default their numbers.

    Raises:
        TypeError, ValueError: tensors of another dtype or shape, or a label out of range.

    >>> data = TensorImages(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.arange(5))
    >>> data.image_shape, data.num_classes, data.batch([3, 1])[1]
    ((1, 8, 8), 5, tensor([3, 1]))
    """

    def __init__(
        self, images: Tensor, labels: Tensor | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise TypeError(
                f"images must be uint8 [N, C, H, W]; got {images.dtype} {list(images.shape)}"
            )
        if labels is None:
            class_names = None
        else:
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise TypeError(
                    f"labels must be int64 [{len(images)}]; got {labels.dtype} {list(labels.shape)}"
                )
            low, high = int(labels.min()), int(labels.max())
            names = range(high + 1) if class_names is None else class_names
            class_names = [str(name) for name in names]
            if low < 0 or high >= len(class_names):
                raise ValueError(
                    f"labels must lie in 0 … {len(class_names) - 1}; got {low} … {high}"
                )
        channels, height, width = images.shape[1:]
        super().__init__((channels, height, width), class_names)
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return self.images[chosen], None if self.labels is None else self.labels[chosen]
