"""A folder of drawn images, a PNG file each by number, that processes fill over several runs.

Which are there is seen by one pass over the folder's names and kept in a byte an image; none of it
grows with the number of images that are asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..nn.checkpoint import remove_leftover, write_bytes
from .images import shown
from .pictures import TEXT_KEY, grid, png, png_text, read_png

GRID, GRID_IMAGES = "grid.png", 100
# Reading what a file was drawn with takes 10 µs and more. Up to so many of a process are all read
# before anything is drawn.
READ_FIRST = 200_000
_LEFTOVER = re.compile(r"\.(\d+|grid)\.png\.[0-9a-f]+\.partial")
_IMAGE = re.compile(r"(\d{6,})\.png", re.ASCII)
_TEXT_AT = 41  # in a file of ours: after the signature, IHDR, and the length and name of tEXt
_END = b"\0\0\0\0IEND\xaeB\x60\x82"


def name_of(sample_id: int) -> str:
    """Of an image's file: six digits, and more where the number has more. The names of more than a
    million images have the order of their numbers for ``sort -n``, not for a plain sort.

    >>> name_of(4711), name_of(1_000_000)
    ('004711.png', '1000000.png')
    """
    return f"{sample_id:06d}.png"


def id_of(name: str) -> int | None:
    """The number of the image whose file has this name; None for any other file.

    >>> id_of("004711.png"), id_of("4711.png"), id_of("grid.png")
    (4711, None, None)
    """
    match = _IMAGE.fullmatch(name)
    return int(match[1]) if match and name_of(int(match[1])) == name else None


@dataclass(frozen=True)
class Share:
    """The images 0 … num − 1 of one process: of all batches, the images k · batch_size …, those
    with k mod world_size = rank.

    Raises:
        ValueError: a number out of range.
    """

    num: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.num < 1 << 63:
            raise ValueError(f"num must lie in 1 … 2^63 - 1; got {self.num}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank must lie in 0 … {self.world_size - 1}, for {self.world_size} processes; "
                f"got {self.rank}"
            )

    def batches(self, below: int | None = None) -> Iterator[range]:
        """The ids of each; those that begin below an id."""
        for first in self._firsts(self.num if below is None else min(below, self.num)):
            yield range(first, min(first + self.batch_size, self.num))

    @property
    def images(self) -> int:
        """How many they are."""
        firsts = self._firsts(self.num)
        if not firsts:
            return 0
        return len(firsts) * self.batch_size - max(0, firsts[-1] + self.batch_size - self.num)

    def has(self, sample_id: int) -> bool:
        return sample_id // self.batch_size % self.world_size == self.rank

    def _firsts(self, end: int) -> range:
        return range(self.rank * self.batch_size, end, self.world_size * self.batch_size)


class DrawnFolder:
    """The images of one process there: which of them are to be drawn, and how they are written.

    Args:
        path: of the folder, which is made.
        share: the process's.
        fingerprint: of the model and the settings.
        overwrite: images drawn with another are drawn again, not refused.

    Attributes:
        there: how many of the share need not be drawn.
        beyond: how many images the folder holds that nobody has asked for.

    Raises:
        FileExistsError: an image drawn with another model or other settings.
        OSError: the folder cannot be used.
    """

    def __init__(self, path: Path, share: Share, fingerprint: str, overwrite: bool = False) -> None:
        self.path, self.share, self.overwrite = path, share, overwrite
        self.there = self.beyond = 0
        self._fingerprint = fingerprint
        self._marks = bytearray()  # [image]: 1, there and as far as it was read ours
        path.mkdir(parents=True, exist_ok=True)
        files = self._look_at_names()
        self._all_read = files <= READ_FIRST
        for ids in share.batches(len(self._marks)):
            marked = [i for i in ids if i < len(self._marks) and self._marks[i]]
            for i in marked if self._all_read else marked[:1]:
                self._marks[i] = self._is_drawn(i)
            self.there += len(ids) * self._marked(ids)

    def to_draw(self) -> Iterator[range]:
        """The batches of which a file is missing, each looked at once more when its turn comes.

        Of very many files the most are read only after that, so that drawing begins soon.
        """
        for ids in self.share.batches():
            if not self._marked(ids):
                if not self._all_drawn(ids):
                    yield ids
                else:  # since the first look, by a process that does the same
                    self.there += len(ids)
        if not self._all_read:
            for ids in self.share.batches(len(self._marks)):
                if self._marked(ids) and not self._all_drawn(ids):
                    self.there -= len(ids)
                    yield ids

    def write(self, sample_id: int, image: Tensor) -> None:
        """A file, whole or not at all."""
        write_bytes(self.path / name_of(sample_id), png(image, self._text(sample_id)))

    def write_grid(self) -> None:
        """The first images side by side, once all of them are there, whoever has drawn them."""
        ids = range(min(self.share.num, GRID_IMAGES))
        if not all([self._is_drawn(i) for i in ids]):
            return
        data = grid(torch.stack([self._pixels(i) for i in ids]))
        path = self.path / GRID
        if not path.exists() or path.read_bytes() != data:
            write_bytes(path, data)

    def _pixels(self, sample_id: int) -> Tensor:
        path = self.path / name_of(sample_id)
        try:
            return read_png(path)
        except MemoryError:
            raise
        except Exception as error:  # pillow's readers raise any kind
            raise RuntimeError(
                f"{shown(path)} is damaged ({error}): remove it, and the same command draws it "
                "again"
            ) from None

    def _look_at_names(self) -> int:
        """Marks what is there; how many files of the share that is."""
        files, leftovers = 0, []
        with os.scandir(self.path) as entries:
            for entry in entries:
                i = id_of(entry.name)
                if i is None:
                    if _LEFTOVER.fullmatch(entry.name):
                        leftovers.append(self.path / entry.name)
                elif i >= self.share.num:
                    self.beyond += 1
                elif self.share.has(i):
                    if i >= len(self._marks):
                        self._marks.extend(bytes(i + 1 - len(self._marks)))
                    self._marks[i] = 1
                    files += 1
        for path in leftovers:
            remove_leftover(path)
        return files

    def _marked(self, ids: range) -> bool:
        return ids.stop <= len(self._marks) and self._marks.find(0, ids.start, ids.stop) < 0

    def _all_drawn(self, ids: range) -> bool:
        """Whether no file of a batch is missing; all of them are looked at."""
        drawn = all([self._is_drawn(i) for i in ids])
        if not drawn and self.overwrite and ids.start < GRID_IMAGES:
            (self.path / GRID).unlink(missing_ok=True)  # it shows what is about to go
        return drawn

    def _is_drawn(self, sample_id: int) -> bool:
        """Whether an image is there, whole and drawn with this model and these settings."""
        path, text = self.path / name_of(sample_id), self._text(sample_id)
        try:
            head, tail = _ends(path, _TEXT_AT + len(TEXT_KEY) + 1 + len(text))
            if not head:
                return False
            if head[_TEXT_AT:] == f"{TEXT_KEY}\0{text}".encode():
                return tail == _END  # a copy that was cut short is drawn again
            if png_text(path) == text:
                return True
        except FileNotFoundError:
            return False
        except IsADirectoryError:
            pass
        if self.overwrite:
            return False
        raise FileExistsError(
            f"{shown(path)} is there, and was not drawn with this model and these settings"
        )

    def _text(self, sample_id: int) -> str:
        return json.dumps({"id": sample_id, "drawn_with": self._fingerprint})


def _ends(path: Path, count: int) -> tuple[bytes, bytes]:
    """The first bytes of a file, and as many of its last as a PNG file's end has."""
    with open(path, "rb", buffering=0) as file:
        head = file.read(count)
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(_END)))
        return head, file.read()
