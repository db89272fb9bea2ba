"""What the residual blocks of a UNet are given about timesteps and classes, as rows: one a block.

Row i is of residual block i in the order of the forward pass, [1 or N, channels]: the projected
embedding, to which the bias of the block's first convolution is added (with ``scale_shift`` it is
not, and the row is (scale | shift)). A trajectory shares its timesteps between all samples, so that
the rows of all its steps are made at once: a step then reads one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import ResBlock, timestep_embedding

if TYPE_CHECKING:
    from .unet import UNet

STEPS = 64  # of a trajectory, whose rows are made together; fewer where each class has its own
STEPS_OF_A_CLASS = 8
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
        if joined and blocks:
            self.weights, self.biases = [torch.cat(self.weights)], [torch.cat(self.biases)]

    def __call__(self, t: Tensor, labels: Tensor | int | None) -> list[Tensor]:
        """The rows of timesteps [N] or [1], and, where there are classes, of labels: [N], [1], or
        one for all samples."""
        if self.joined and not isinstance(labels, Tensor) and _shared(t):
            t = t[:1]
        emb = self._timesteps(t, self.first[0].dtype)
        if labels is not None:
            emb = emb + self._class(labels, emb)
        return self._projected(emb)

    def table(self, t: Tensor) -> TimeTable:
        """Of the timesteps [S] of a trajectory."""
        return TimeTable(self, self._timesteps(t, torch.float32))

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
            labels = torch.tensor([labels], device=emb.device)
        return F.embedding(labels, self.classes).to(emb.dtype)

    def _projected(self, emb: Tensor) -> list[Tensor]:
        """The rows of an embedding [N, width], in whose dtype they are accumulated."""
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
        if self.joined and rows:
            return list(rows[0].split(self.widths, 1))
        return rows


class TimeTable:
    """The rows of each step of a trajectory, some steps at a time.

    With classes there are tables of their own for each. On a CPU a sample's row is read from its
    class's, so that its bits are the same in every batch; elsewhere, where looking at the labels
    would wait for the device, rows are made of them at each step.
    """

    def __init__(self, rows: TimeRows, emb: Tensor) -> None:
        self._rows, self._emb = rows, emb  # [S, width]
        self._steps = STEPS if rows.classes is None else STEPS_OF_A_CLASS
        # Of some steps from one on, by the class
        self._parts: dict[int | None, tuple[int, list[tuple[Tensor, ...]]]] = {}

    def step(self, index: int, labels: Tensor | int | None) -> Sequence[Tensor]:
        """The rows of a step; labels [N] or [1], one for all samples, or None without classes."""
        if not isinstance(labels, Tensor):
            return self._read(index, labels)
        if labels.device.type != "cpu":
            emb = self._emb[index : index + 1]
            emb = emb + self._rows._class(labels, emb)
            # In the weights' dtype, so that they are not made float32 again at each step
            return self._rows._projected(emb.to(self._rows.first[0].dtype))
        distinct, place = labels.unique(return_inverse=True)
        tables = [self._read(index, label) for label in distinct.tolist()]
        return [torch.cat(rows).index_select(0, place) for rows in zip(*tables, strict=True)]

    def _read(self, index: int, label: int | None) -> tuple[Tensor, ...]:
        """Rows [1, channels] of a step and a class."""
        start = index - index % self._steps
        part = self._parts.get(label)
        if part is None or part[0] != start:
            emb = self._emb[start : start + self._steps]
            if label is not None:
                emb = emb + self._rows._class(label, emb)
            blocks = [rows.split(1) for rows in self._rows._projected(emb)]
            part = self._parts[label] = start, list(zip(*blocks, strict=True))
        return part[1][index - start]


def _shared(t: Tensor) -> bool:
    """Whether all timesteps are one, as far as that can be seen without waiting for a device."""
    if t.shape[0] <= 1 or t.stride(0) == 0:
        return True
    return t.device.type == "cpu" and bool((t == t[0]).all())


def _linear(module: torch.nn.Module) -> tuple[Tensor, Tensor]:
    return module.weight.detach(), module.bias.detach()  # type: ignore[operator]


def _bias(block: ResBlock) -> Tensor:
    """Float32, as the sum of two is rounded once."""
    bias = block.emb_proj.bias.detach().float()
    if block.scale_shift:
        return bias
    assert block.conv1.bias is not None
    return bias + block.conv1.bias.detach().float()
