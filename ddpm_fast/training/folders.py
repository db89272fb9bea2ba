"""Folders of images: which files there are, what classes they have, and reading them by number."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .dataset import ImageData
from .images import EXTENSIONS, NoReadableImageError, UnreadableImage, read_image, read_size, shown

OnBadImage = Literal["raise", "skip"]
SPLITS = ("train", "test")


class FolderImages(ImageData):
    """The images of a folder, in the order of their paths, read when they are asked for.

    An image that cannot be read is replaced by the next one that can (the first follows the last),
    where ``on_bad_image`` is "skip": what stands for it depends on the files alone, not on when or
    by which process it is read.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: Tensor | None,
        class_names: list[str] | None,
        image_size: int | None,
        channels: int,
        on_bad_image: OnBadImage,
    ) -> None:
        super().__init__((channels, 0, 0), class_names)
        self.root, self.labels, self.on_bad_image = root, labels, on_bad_image
        # One buffer: a list's reference counts would make each worker copy all of its pages.
        self._names = np.array([os.fsencode(name) for name in names])
        self.files_sha256 = hashlib.sha256(b"\0".join(map(os.fsencode, names))).hexdigest()
        self._size: int | tuple[int, int]
        self._size = self._common_size() if image_size is None else image_size
        height, width = (self._size,) * 2 if isinstance(self._size, int) else self._size
        self.image_shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self._names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self._names[index])))

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """As ImageData's.

        Raises:
            UnreadableImage: one that cannot be read, where that is not to be skipped.
            NoReadableImageError: none can.
        """
        images = torch.empty((len(indices), *self.image_shape), dtype=torch.uint8)
        pixels, taken = images.numpy(), []
        for row, index in enumerate(indices):
            for candidate in self._candidates(int(index)):
                try:
                    path = self.path(candidate)
                    pixels[row] = read_image(path, self._size, self.image_shape[0])
                except UnreadableImage as error:
                    self._note(candidate, error)
                    continue
                taken.append(candidate)
                break
            else:
                raise NoReadableImageError(
                    f"none of the {len(self)} images of {shown(self.root)} is readable"
                )
        return images, None if self.labels is None else self.labels[taken]

    def _candidates(self, index: int) -> Iterator[int]:
        for distance in range(len(self)):
            candidate = (index + distance) % len(self)
            if candidate not in self.bad_images:
                yield candidate

    def _note(self, index: int, error: UnreadableImage) -> None:
        if self.on_bad_image == "raise":
            raise error
        self.note_bad(index, error)

    def _common_size(self) -> tuple[int, int]:
        """The size of all images, by their headers."""
        first: tuple[int, tuple[int, int]] | None = None
        with ThreadPoolExecutor(8) as pool:
            for index, size in enumerate(pool.map(self._size_of, range(len(self)))):
                if isinstance(size, UnreadableImage):
                    self._note(index, size)
                elif first is None:
                    first = index, size
                elif size != first[1]:
                    (h, w), (other_h, other_w) = first[1], size
                    raise ValueError(
                        f"the images differ in size: {shown(self.path(first[0]))} is {h}×{w}, "
                        f"{shown(self.path(index))} is {other_h}×{other_w}; name an image_size to "
                        "bring them to"
                    )
        if first is None:
            raise NoReadableImageError(
                f"none of the {len(self)} images of {shown(self.root)} is readable"
            )
        return first[1]

    def _size_of(self, index: int) -> tuple[int, int] | UnreadableImage:
        try:
            return read_size(self.path(index))
        except UnreadableImage as error:
            return error


def list_images(root: Path) -> tuple[list[str], int]:
    """The image files below ``root``, relative to it and sorted, and the count of other files.

    By their extensions; names that begin with a dot are passed over, links followed.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: no such folder, or one that cannot
            be read.
    """
    if not root.exists():
        raise FileNotFoundError(f"no folder of images at {shown(root)}: there is nothing there")
    if not root.is_dir():
        raise NotADirectoryError(f"no folder of images at {shown(root)}: it is a file")
    found: list[tuple[str, ...]] = []
    others, seen = 0, set()

    def refuse(error: OSError) -> None:
        raise PermissionError(f"cannot look into {shown(error.filename)}: {error.strerror}")

    for folder, below, files in os.walk(root, followlinks=True, onerror=refuse):
        place = os.path.realpath(folder)
        below[:] = [] if place in seen else [name for name in below if not name.startswith(".")]
        if place in seen:  # a link that leads back
            continue
        seen.add(place)
        parts = Path(folder).relative_to(root).parts
        for name in files:
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() in EXTENSIONS:
                found.append((*parts, name))
            else:
                others += 1
    return [os.path.join(*parts) for parts in sorted(found)], others


def open_folder(
    root: Path,
    *,
    image_size: int | None,
    channels: int,
    split: str,
    on_bad_image: OnBadImage,
    class_names: Sequence[str] | None = None,
) -> FolderImages:
    """The images of ``root``, or of root/train or root/test where both are there.

    Images that all lie in folders of their own, root/<class>/…, have the class's place among the
    sorted names (of both splits together, or in ``class_names``) for a label.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        NotADirectoryError, PermissionError: one that cannot be read.
        ValueError: a class that ``class_names`` lacks; images of different sizes, where
            ``image_size`` is None.
    """
    folder, found = root, set()
    if all((root / name).is_dir() for name in SPLITS):
        folder = root / split
        for name in SPLITS:
            found |= _classes(list_images(root / name)[0]) or set()
    names, others = list_images(folder)
    if not names:
        there = "the files there have other extensions" if others else "there are no files"
        raise FileNotFoundError(
            f"no images in {shown(folder)}: {there}; looked for {' '.join(sorted(EXTENSIONS))}"
        )
    classes, labels = _classes(names), None
    if classes is not None:
        known = sorted(classes | found) if class_names is None else list(class_names)
        unknown = sorted(classes - set(known))
        if unknown:
            raise ValueError(
                f"{shown(folder)} has a class {shown(unknown[0])!r}, which is none of {known}"
            )
        number = {name: label for label, name in enumerate(known)}
        labels = torch.tensor([number[Path(name).parts[0]] for name in names])
    return FolderImages(
        folder,
        names,
        labels,
        None if classes is None else known,
        image_size,
        channels,
        on_bad_image,
    )


def _classes(names: Sequence[str]) -> set[str] | None:
    """The first-level folders, if every image lies in one."""
    parts = [name.split(os.sep, 1) for name in names]
    return {first for first, *_ in parts} if all(len(part) == 2 for part in parts) else None
