"""A UNet's forward pass on a CPU: a list of calls of native kernels, made once a shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from .native_layers import Call, Workspace, copy_call, inside
from .native_stages import Res, Stage, make_conv, make_norm, make_stage, record_norm

if TYPE_CHECKING:
    from .unet import UNet

# Images that go through the network together: their activations stay in a shared cache, and the
# weights are read often enough. A sample's bits do not depend on it.
_IMAGES = 8
# Sizes of images whose memory is kept. The programs for any number of images of a size share one,
# so that batches may come in all sizes: those of the CIFAR-10 network for 1 to 8 images hold 168 MB
# (104 of it shared), and 533 if each had its own. Recording one takes 1 to 3 ms.
_PROGRAMS = 4


class NativePlan:
    """The plan's executor for float32 on a CPU.

    It keeps packed copies of the convolutions' weights, and the norms' own. For given rows, the
    bits of a sample's output depend on neither its batch nor the number of threads.

    Args:
        unet: in eval mode, float32, on the CPU.
        rewrites: names; those in REWRITES mean something here.
        dtype: float32.
    """

    REWRITES: ClassVar[tuple[str, ...]] = (
        "time_table",
        "group_norm_silu",
        "phase_upsample",
        "fused_qkv",
        "channels_last",
        "native_conv",
        "winograd",
        "native_attention",
        "joined_skips",
    )
    owns_buffers: ClassVar[bool] = True  # one thread at a time

    def __init__(self, unet: UNet, rewrites: frozenset[str], dtype: torch.dtype) -> None:
        self.rewrites = rewrites
        self.conv_in = make_conv(unet.conv_in, rewrites)
        self.down = [_Level(level, rewrites) for level in unet.down]
        self.middle = [
            make_stage(module, rewrites)
            for module in (unet.mid_res1, unet.mid_attention, unet.mid_res2)
            if module is not None and not isinstance(module, nn.Identity)
        ]
        self.up = [_Level(level, rewrites) for level in unet.up]
        self.norm_out = make_norm(unet.norm_out, rewrites, silu=True)
        self.conv_out = make_conv(unet.conv_out, rewrites)
        self._programs: dict[tuple[int, int], _Programs] = {}

    def __call__(self, x: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """The output [N, out_channels, H, W], contiguous.

        Args:
            x: float32 [N, C, H, W].
            rows: one a residual block, as nn/time_table.py makes them.
        """
        n, _, h, w = x.shape
        out = x.new_empty((n, self.conv_out.c_out, h, w))
        for begin in range(0, n, _IMAGES):
            part = slice(begin, min(begin + _IMAGES, n))
            own = [row if row.shape[0] == 1 else row[part] for row in rows]
            self._program(part.stop - begin, h, w).run(x[part], own, out[part])
        return out

    def reserve(self, shape: Sequence[int]) -> None:
        """Makes what calls for images [N, C, H, W] work on, for each size of their parts."""
        n, _, h, w = shape
        for count in sorted({min(n - begin, _IMAGES) for begin in range(0, n, _IMAGES)})[::-1]:
            self._program(count, h, w)

    def _program(self, n: int, h: int, w: int) -> _Program:
        kept = self._programs.pop((h, w), None)
        if kept is None or kept.images < n:
            kept = None  # first: two need more memory than one
            if len(self._programs) >= _PROGRAMS:
                del self._programs[next(iter(self._programs))]  # the one used longest ago
            kept = _Programs(n)
        program = kept.program(self, n, h, w)
        self._programs[h, w] = kept
        return program


class _Level:
    def __init__(self, level: nn.Module, rewrites: frozenset[str]) -> None:
        self.blocks = [
            [make_stage(part, rewrites) for part in pair if not isinstance(part, nn.Identity)]
            for pair in zip(level.res, level.attention, strict=True)  # type: ignore[arg-type]
        ]
        resample = level.resample
        self.resample = None if resample is None else make_stage(resample, rewrites)  # type: ignore[arg-type]


class _Memory(Workspace):
    """Of so many images, of which each program takes the first as it has images itself."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images

    def take(self, n: int, h: int, w: int, c: int) -> Tensor:
        return super().take(self.images, h, w, c)[:n]

    def take_padded(self, n: int, h: int, w: int, c: int) -> Tensor:
        return super().take_padded(self.images, h, w, c)[:n]

    def begin_again(self) -> None:
        """All of it is there for the next program, which takes it in the same order."""
        for key, tensor in self._taken.values():
            self._free[key].append(tensor)
        self._taken.clear()


class _Programs:
    """Those for up to ``images`` images of one size. They share their memory, since only one thread
    at a time runs one."""

    def __init__(self, images: int) -> None:
        self.images, self._memory = images, _Memory(images)
        self._made: dict[int, _Program] = {}

    def program(self, plan: NativePlan, n: int, h: int, w: int) -> _Program:
        if n not in self._made:
            self._memory.begin_again()
            self._made[n] = _Program(plan, self._memory, n, h, w)
        return self._made[n]


class _Program:
    """The calls for one shape, and the memory that they work on."""

    def __init__(self, plan: NativePlan, space: Workspace, n: int, h: int, w: int) -> None:
        self.space = space
        self._calls: list[Call] = []
        self._rows = 0
        self._record(plan, n, h, w)

    def run(self, x: Tensor, rows: Sequence[Tensor], out: Tensor) -> None:
        threads = torch.get_num_threads()
        self._input.copy_(x.movedim(1, 3))
        for call in self._calls:
            call(rows, threads)
        out.copy_(self._output.movedim(3, 1))

    def add(self, call: Call) -> None:
        self._calls.append(call)

    def next_row(self) -> int:
        self._rows += 1
        return self._rows - 1

    def _record(self, plan: NativePlan, n: int, h: int, w: int) -> None:
        padded = self.space.take_padded(n, h, w, plan.conv_in.c_in)
        self._input = inside(padded, h, w)
        down: list[list[Stage]] = []
        up: list[list[Stage]] = []
        for level in plan.down:
            down += level.blocks
            if level.resample is not None:
                down.append([level.resample])
        for level in plan.up:
            up += level.blocks
            if level.resample is not None:
                up[-1] = [*up[-1], level.resample]

        # Each block on the way up reads what came before it beside a skip, the latest first.
        joins = [_Join(self, stages[0], plan) for stages in up]
        waiting = list(joins)
        x = waiting.pop().skip(n, h, w, plan.conv_in.c_out)
        self.add(plan.conv_in.call(padded, x))
        for stages in down:
            x = self._through(stages, x, lambda *shape: waiting.pop().skip(*shape))
        x = self._through(plan.middle, x, joins[0].rest)
        for join, after, stages in zip(joins, [*joins[1:], None], up, strict=True):
            x = join.joined()
            y = self._through(stages, x, self.space.take if after is None else after.rest)
            self.space.give(x)
            x = y
        padded = record_norm(self, plan.norm_out, x)
        self._output = self.space.take(n, h, w, plan.conv_out.c_out)
        self.add(plan.conv_out.call(padded, self._output))

    def _through(self, stages: Sequence[Stage], x: Tensor, last: Callable[..., Tensor]) -> Tensor:
        """What comes out of the stages, in memory that ``last`` gives for its shape."""
        if not stages:
            y = last(*x.shape)
            self.add(copy_call(x, y))
            return y
        held = None
        for stage in stages:
            n, h, w, c = x.shape
            take = last if stage is stages[-1] else self.space.take
            y = take(n, *stage.sides(h, w), stage.c_out or c)
            stage.record(self, x, y)
            if held is not None:
                self.space.give(held)
            x = held = y
        return x


class _Join:
    """The input of a block on the way up: the rest of its channels, then a skip's."""

    def __init__(self, program: _Program, block: Stage, plan: NativePlan) -> None:
        assert isinstance(block, Res)
        self._space, self._add = program.space, program.add
        self._in_place = "joined_skips" in plan.rewrites
        self._channels = block.conv1.c_in

    def skip(self, n: int, h: int, w: int, c: int) -> Tensor:
        """Memory of the skip, for whoever computes it."""
        self._whole = self._space.take(n, h, w, self._channels)
        self._skip = self._whole[..., -c:] if self._in_place else self._space.take(n, h, w, c)
        return self._skip

    def rest(self, n: int, h: int, w: int, c: int) -> Tensor:
        """Memory of the rest."""
        self._rest = self._whole[..., :c] if self._in_place else self._space.take(n, h, w, c)
        return self._rest

    def joined(self) -> Tensor:
        """All of it; to be given back."""
        if not self._in_place:
            self._add(copy_call(self._rest, self._whole[..., : self._rest.shape[3]]))
            self._add(copy_call(self._skip, self._whole[..., self._rest.shape[3] :]))
            self._space.give(self._rest)
            self._space.give(self._skip)
        return self._whole
