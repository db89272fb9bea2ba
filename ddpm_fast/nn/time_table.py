"""What the residual blocks of a UNet are given about timesteps and classes, as rows: one a block.

Row i is of residual block i in the order of the forward pass, [1 or N, channels]: the projected
embedding, to which the bias of the block's first convolution is added (with ``scale_shift`` it is
not, and the row is (scale | shift)). A trajectory shares its timesteps between all samples, so that
the rows of many of its steps are made at once: a step then reads one. They lie side by side, as a
line [1 or N, all channels] of which the blocks' are ranges.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import ResBlock, timestep_embedding

if TYPE_CHECKING:
    from .unet import UNet

STEPS = 64  # of a trajectory, whose rows are made together; fewer where each class has its own
STEPS_OF_A_CLASS = 8
# Bytes of parts of tables that the latest call of samples at several steps did not read: of the
# CIFAR-10 network (0.16 MB for 8 steps of a class) some 400, so that whoever draws the same class a
# little later finds them, for less memory than the images of one batch take.
KEPT = 64 * 2**20
_CHUNK = 2**22  # elements of a weight that are made float32 at a time


def residual_blocks(unet: UNet) -> list[ResBlock]:
    """In the order of the forward pass, those that change the resolution among them."""
    blocks: list[ResBlock] = []
    for level in unet.down:
        blocks += [*level.res, level.resample]  # type: ignore[list-item,misc]
    blocks += [unet.mid_res1, unet.mid_res2]  # type: ignore[list-item]
    for level in unet.up:
        blocks += [*level.res, level.resample]  # type: ignore[list-item,misc]
    return [block for block in blocks if isinstance(block, ResBlock)]


class TimeRows:
    """Makes the rows of a UNet.

    Args:
        unet: its weights are shared, but for those of the projections, which become one.
        dtype: of the rows.
        joined: one product for all projections, and one row where all timesteps are one; otherwise
            each on its own, as the UNet has it.
    """

    def __init__(self, unet: UNet, dtype: torch.dtype, joined: bool) -> None:
        self.config, self.dtype, self.joined = unet.config, dtype, joined
        self.first, self.second = (_linear(unet.time_mlp[i]) for i in (0, 2))
        classes = unet.class_embedding
        self.classes = None if classes is None else classes.weight.detach()
        blocks = residual_blocks(unet)
        self.weights = [block.emb_proj.weight.detach() for block in blocks]
        self.biases = [_bias(block) for block in blocks]
        self.widths = [weight.shape[0] for weight in self.weights]
        if joined:
            self.weights, self.biases = [torch.cat(self.weights)], [torch.cat(self.biases)]
        self._tables: weakref.WeakSet[TimeTable] = weakref.WeakSet()  # that keep parts
        self._turn, self._reads = threading.Lock(), 0

    def __call__(self, t: Tensor, labels: Tensor | int | None) -> Sequence[Tensor]:
        """The rows of timesteps [N] or [1], and, where there are classes, of labels: [N], [1], or
        one for all samples."""
        if self.joined and not isinstance(labels, Tensor) and _shared(t):
            t = t[:1]
        emb = self._timesteps(t, self.first[0].dtype)
        if labels is not None:
            emb = emb + self._class(labels, emb)
        rows = self._projected(emb)
        return self.split(rows[0]) if self.joined else rows

    def split(self, line: Tensor) -> Sequence[Tensor]:
        """The rows of a line [N, all channels]."""
        return line.split(self.widths, 1)

    def line(self, emb: Tensor, labels: Tensor | int | None) -> Tensor:
        """[N, all channels] of a float32 embedding of timesteps [N, width] and of labels."""
        if labels is not None:
            emb = emb + self._class(labels, emb)
        if isinstance(labels, Tensor):
            # In the weights' dtype, so that they are not made float32 again at each step
            emb = emb.to(self.first[0].dtype)
        return self._projected(emb)[0]

    def table(self, t: Tensor) -> TimeTable:
        """Of the timesteps [S] of a trajectory."""
        return TimeTable(self, self._timesteps(t, torch.float32))

    def mixed(
        self, places: Sequence[tuple[TimeTable, int]], labels: Tensor | int | None
    ) -> Sequence[Tensor]:
        """The rows of samples each of which is at a step of its own, of one of several tables.

        On a CPU each has the bits that :meth:`TimeTable.step` gives it.

        Args:
            places: a sample's table and its step there.
            labels: [N] or [1], one for all samples, or None without classes.
        """
        together = places.count(places[0]) == len(places)
        if isinstance(labels, Tensor) and not on_host(labels):
            lines = [table.embedding(index) for table, index in places[: 1 if together else None]]
            return self.split(self.line(torch.cat(lines), labels))
        told = labels.tolist() if isinstance(labels, Tensor) else [labels]
        if len(told) == 1:  # all of one label share a line, as without a mixture
            places = places[:1] if together else places
            told *= len(places)
        lines = self._lines(places, told)
        return self.split(lines[0] if len(lines) == 1 else torch.cat(lines))

    def _lines(
        self, places: Sequence[tuple[TimeTable, int]], labels: Sequence[int | None]
    ) -> list[Tensor]:
        """[1, all channels] of each table's step and label, from parts that are kept."""
        with self._turn:
            self._reads += 1
            lines, made = [], False
            for (table, index), label in zip(places, labels, strict=True):
                place = index % table.steps
                part = table.kept.get((label, index - place))
                if part is None:
                    self._tables.add(table)
                    part = _Part(table.part(label, index - place))
                    table.kept[label, index - place] = part
                    made = True
                part.read = self._reads
                lines.append(part.lines[place : place + 1])
            if made:
                self._forget()
            return lines

    def _forget(self) -> None:
        """All but the parts that were just read and KEPT bytes of those read before them."""
        old = [
            (part.read, table, key, part.lines.nbytes)
            for table in self._tables
            for key, part in table.kept.items()
            if part.read < self._reads
        ]
        room = KEPT
        for _, table, key, size in sorted(old, key=lambda each: -each[0]):
            room -= size
            if room < 0:
                del table.kept[key]

    def _timesteps(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The embedding [N, width], in the weights' dtype or in float32 throughout."""
        config = self.config
        emb = timestep_embedding(
            t, config.time_width, cosine_first=config.cosine_first, freq_shift=config.freq_shift
        ).to(dtype)
        for i, (weight, bias) in enumerate((self.first, self.second)):
            emb = F.linear(F.silu(emb) if i else emb, weight.to(dtype), bias.to(dtype))
        return emb

    def _class(self, labels: Tensor | int, emb: Tensor) -> Tensor:
        """The embedding of labels, in the dtype of what it is added to."""
        assert self.classes is not None
        if isinstance(labels, int):
            # Filled there, as a copy from the host would wait
            labels = torch.full((1,), labels, dtype=torch.int64, device=emb.device)
        return F.embedding(labels, self.classes).to(emb.dtype)

    def _projected(self, emb: Tensor) -> list[Tensor]:
        """The rows of an embedding [N, width], in whose dtype they are accumulated; joined: one
        line."""
        silu, dtype = F.silu(emb), emb.dtype
        rows = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            if dtype == weight.dtype == torch.float32:
                rows.append(F.linear(silu, weight, bias).to(self.dtype))
                continue
            # The weight in parts, where each has to be made float32 first
            size = max(_CHUNK // weight.shape[1], 1)
            parts = [weight] if dtype == weight.dtype else weight.split(size)
            product = torch.cat([F.linear(silu, part.to(dtype)).float() for part in parts], 1)
            rows.append((product + bias).to(self.dtype))
        return rows


@dataclass(slots=True)
class _Part:
    """Some steps' lines, and at which call they were last read."""

    lines: Tensor
    read: int = 0


class TimeTable:
    """The rows of each step of a trajectory, some steps at a time.

    With classes there are tables of their own for each. On a CPU a sample's row is read from its
    class's, so that its bits are the same in every batch; elsewhere, where looking at the labels
    would wait for the device, rows are made of them at each step.
    """

    def __init__(self, rows: TimeRows, emb: Tensor) -> None:
        _check_not_captured(emb)
        self._rows, self._emb = rows, emb  # [S, width]
        self.steps = STEPS if rows.classes is None else STEPS_OF_A_CLASS  # of a part
        self.kept: dict[tuple[int | None, int], _Part] = {}  # by the class and the first step
        # Where all samples go through the steps together one part of each class is enough
        self._latest: dict[int | None, tuple[int, Tensor]] = {}
        self._whole: dict[int | None, Tensor] = {}

    def step(self, index: int, labels: Tensor | int | None) -> Sequence[Tensor]:
        """The rows of a step; labels [N] or [1], one for all samples, or None without classes."""
        if not isinstance(labels, Tensor):
            return self._rows.split(self._read(index, labels))
        if not on_host(labels):
            return self._rows.split(self._rows.line(self.embedding(index), labels))
        distinct, place = labels.unique(return_inverse=True)
        lines = [self._read(index, label) for label in distinct.tolist()]
        return self._rows.split(torch.cat(lines).index_select(0, place))

    def select(self, index: Tensor, labels: Tensor | int | None) -> Sequence[Tensor]:
        """The rows of steps whose numbers [N] or [1] lie on the device, where nothing waits for
        it; of those outside of the trajectory, its first's or last's.

        Raises:
            RuntimeError: no call made the table before a CUDA graph is captured.
        """
        index = index.clamp(0, self._emb.shape[0] - 1)
        if isinstance(labels, Tensor):
            emb = self._emb.index_select(0, index)
            return self._rows.split(self._rows.line(emb, labels))
        whole = self._whole.get(labels)
        if whole is None:
            starts = range(0, self._emb.shape[0], self.steps)
            whole = torch.cat([self.part(labels, start) for start in starts])
            self._whole[labels] = whole
        return self._rows.split(whole.index_select(0, index))

    def embedding(self, index: int) -> Tensor:
        """[1, width] of a step's timestep."""
        return self._emb[index : index + 1]

    def part(self, label: int | None, start: int) -> Tensor:
        """The lines of a class from one step on, always of as many steps: by their number the
        product rounds."""
        whole, steps = self._whole.get(label), slice(start, start + self.steps)
        if whole is not None:
            return whole[steps]
        _check_not_captured(self._emb)
        return self._rows.line(self._emb[steps], label)

    def _read(self, index: int, label: int | None) -> Tensor:
        """The line [1, all channels] of a step and a class."""
        start = index - index % self.steps
        found = self._latest.get(label)
        if found is None or found[0] != start:
            found = self._latest[label] = start, self.part(label, start)
        return found[1][index - start : index - start + 1]


def _shared(t: Tensor) -> bool:
    """Whether all timesteps are one, as far as that can be seen without waiting for a device."""
    if t.shape[0] <= 1 or t.stride(0) == 0:
        return True
    return on_host(t) and bool((t == t[0]).all())


def on_host(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return tensor.device.type == "cpu"


def _check_not_captured(emb: Tensor) -> None:
    """Whether a table can be made, to be kept: in a CUDA graph it would be one of the graph's.

    Raises:
        RuntimeError: it cannot.
    """
    if emb.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a trajectory's step cannot be captured in a CUDA graph before the table that it reads "
            "is made: call it once, with row a tensor on the device and labels of the same kind"
        )


def _linear(module: torch.nn.Module) -> tuple[Tensor, Tensor]:
    return module.weight.detach(), module.bias.detach()  # type: ignore[operator]


def _bias(block: ResBlock) -> Tensor:
    """Float32, as the sum of two is rounded once."""
    bias = block.emb_proj.bias.detach().float()
    if block.scale_shift:
        return bias
    assert block.conv1.bias is not None
    return bias + block.conv1.bias.detach().float()
