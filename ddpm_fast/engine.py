"""The plan of a UNet: the same function, prepared once for being computed often.

A plan computes what the model computes, up to rounding, by other operations and from weights laid
out for them. Each rewrite has a name, by which it can be left out.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from .nn.inputs import check_images, check_labels
from .nn.time_table import TimeRows, TimeTable
from .nn.torch_plan import TorchPlan
from .nn.unet import UNet

REWRITES: tuple[str, ...] = (
    "time_table",
    "group_norm_silu",
    "phase_upsample",
    "fused_qkv",
    "channels_last",
    "native_conv",
    "winograd",
    "joined_skips",
)
"""The rewrites by name.

time_table: the timesteps' embedding and its projections of all residual blocks are computed once
    for a trajectory; a step reads a row.
group_norm_silu: GroupNorm, what a residual block adds or scales, and SiLU are one operation.
phase_upsample: the convolution of an image of doubled sides is one of the image itself, with sums
    of its weights: 4 products in place of 9.
fused_qkv: one product gives an attention's queries, keys and values.
channels_last: weights and images lie in this layout.
native_conv, winograd, joined_skips: of the CPU's float32 executor.
"""


class Executor(Protocol):
    """Computes a UNet's output from an image and the residual blocks' rows (nn/time_table.py)."""

    REWRITES: ClassVar[tuple[str, ...]]  # that it knows
    owns_buffers: ClassVar[bool]  # one thread at a time

    def __init__(self, unet: UNet, rewrites: frozenset[str], dtype: torch.dtype) -> None: ...

    def __call__(self, x: Tensor, rows: Sequence[Tensor]) -> Tensor: ...


def native_executor() -> type[Executor] | None:
    """The CPU's, where it is there."""
    return None


def prepare(
    model: nn.Module,
    *,
    rewrites: Literal["all"] | Iterable[str] = "all",
    without: str | Iterable[str] = (),
    dtype: torch.dtype | None = None,
) -> Plan:
    return Plan(model, _names(rewrites) - _names(without), dtype)


class Plan:
    """A UNet prepared for sampling, made by :func:`prepare`: called like the model."""

    def __init__(
        self, model: nn.Module, rewrites: frozenset[str], dtype: torch.dtype | None
    ) -> None:
        self._source = weakref.ref(model)
        self._asked, self._asked_dtype = rewrites, dtype
        self._lock = threading.RLock()
        self._prepared = _Prepared(model, rewrites, dtype)

    def __call__(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        return self._prepared(x, t, class_labels)

    def trajectory(self, timesteps: Tensor | Sequence[float]) -> Trajectory:
        return Trajectory(self._prepared, timesteps)

    @property
    def rewrites(self) -> tuple[str, ...]:
        """Those in effect, in the order of REWRITES."""
        return self._prepared.rewrites

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and the output."""
        return self._prepared.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._prepared.device


class _Prepared:
    """A plan of weights as they were."""

    def __init__(self, model: nn.Module, asked: frozenset[str], dtype: torch.dtype | None) -> None:
        unet = model if isinstance(model, UNet) else UNet.from_diffusers(model)
        weight = unet.conv_in.weight
        self.config, self.device = unet.config, weight.device
        self.dtype = dtype or weight.dtype
        kind: type[Executor] = TorchPlan
        native = native_executor()
        if (
            native is not None
            and "native_conv" in asked
            and (self.device.type, self.dtype) == ("cpu", torch.float32)
        ):
            kind = native
        known = asked & set(kind.REWRITES)
        self.rewrites = tuple(name for name in REWRITES if name in known)
        with torch.inference_mode(False), torch.no_grad():
            self.time = TimeRows(unet, self.dtype, "time_table" in known)
            self.executor = kind(unet, known, self.dtype)
        self.lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        check_images(self.config, x)
        check_labels(self.config, labels)
        if self.config.embedded_classes is not None and labels is None:
            null = self.config.num_classes
            assert null is not None
            labels = torch.full(t.shape, null, device=t.device)
        return self.executor(x.to(self.dtype), self.time(t, labels))


class Trajectory:
    """A plan at given timesteps."""

    def __init__(self, prepared: _Prepared, timesteps: Tensor | Sequence[float]) -> None:
        self._prepared = prepared
        self._timesteps = torch.as_tensor(timesteps, device=prepared.device)
        self._table: TimeTable | None = None

    @torch.no_grad()
    def step(self, row: int, x: Tensor, class_labels: Tensor | None = None) -> Tensor:
        prepared = self._prepared
        check_images(prepared.config, x)
        check_labels(prepared.config, class_labels)
        if self._table is None:
            self._table = prepared.time.table(self._timesteps)
        classes = prepared.config.num_classes
        rows = self._table.step(row, classes if class_labels is None else class_labels)
        return prepared.executor(x.to(prepared.dtype), rows)


def _names(rewrites: str | Iterable[str]) -> frozenset[str]:
    names = (
        frozenset(REWRITES)
        if rewrites == "all"
        else frozenset([rewrites] if isinstance(rewrites, str) else rewrites)
    )
    if unknown := names - set(REWRITES):
        raise ValueError(
            f"rewrites must be among {', '.join(REWRITES)}; got {sorted(map(repr, unknown))}"
        )
    return names
