"""The plan of a UNet: the same function, prepared once for being computed often.

A plan computes what the model computes, up to rounding, by other operations and from weights laid
out for them. docs/plan.md tells what it does and when it is made again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .nn import inspection
from .nn.prepared import Labels, Prepared
from .nn.time_table import TimeTable
from .ops.checks import FLOAT_DTYPES

REWRITES: tuple[str, ...] = (
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
"""The rewrites by name; the last four are of the CPU in float32.

time_table: the timesteps' embedding and its projections of all residual blocks are computed at once
    for a trajectory, of which a step reads a row; otherwise at each step as the model does.
group_norm_silu: GroupNorm, what a residual block adds before or applies between, and SiLU are one
    operation.
phase_upsample: the convolution of an image of doubled sides is one of the image itself, by sums of
    its weights: 4 products in place of 9.
fused_qkv: one product gives an attention's queries, keys and values.
channels_last: images and weights lie in this layout.
native_conv: convolutions by the package's own kernels, from packed weights; needs channels_last.
winograd: 3×3 convolutions by F(2×2, 3×3), 16 products in place of 36; with phase_upsample 9 for
    those of doubled images.
native_attention: scores, softmax and weighted values by one kernel of the package's own; otherwise
    PyTorch's scaled_dot_product_attention.
joined_skips: what a residual block gives is written where the concatenation will be read.
"""


def prepare(
    model: nn.Module,
    *,
    rewrites: Literal["all"] | Iterable[str] = "all",
    without: Iterable[str] = (),
    dtype: torch.dtype | None = None,
) -> Plan:
    """The plan of a UNet, for inference: no gradients flow through it.

    The model stays as it is, and its weights are shared where their layout allows. The plan does
    not keep it alive, and outlives it.

    Args:
        model: a :class:`UNet`, or a UNet2DModel of diffusers', in eval mode, float32, bfloat16 or
            float16, on any device.
        rewrites: names among REWRITES. What means nothing on the model's device is passed over;
            ``Plan.rewrites`` tells which are in effect.
        without: names to leave out.
        dtype: of weights, images and output; the model's if None.

    Raises:
        TypeError: a model of another class, a subclass, say.
        ValueError: a name that is none; a model in training mode, or with anything that the plan
            would leave out (hooks, parametrisations, modules of other classes, options without an
            equivalent), by name; weights offloaded, quantised, of several dtypes or devices.
        MemoryError: there was not enough; the model is untouched and nothing is kept.

    >>> config = UNetConfig(image_size=8, channels=(32,), attention_resolutions=())
    >>> plan = prepare(UNet(config).eval())
    >>> plan(torch.zeros(2, 3, 8, 8), torch.tensor([7, 7])).shape
    torch.Size([2, 3, 8, 8])
    """
    if dtype is not None:
        check_dtype(dtype)
    return Plan(model, names(rewrites) - names(without), dtype)


class Plan:
    """A UNet prepared for sampling by :func:`prepare`; called like the model, from any thread.

    Each call, and each :meth:`trajectory`, first compares the model's parameters with what was
    prepared, by identity, address and version: if one was changed, all is prepared again.

    Raises:
        TypeError, ValueError: what the model cannot take; and, when it was changed, whatever
            ``prepare`` raises.
    """

    def __init__(
        self, model: nn.Module, rewrites: frozenset[str], dtype: torch.dtype | None
    ) -> None:
        self._asked, self._asked_dtype = rewrites, dtype
        self._lock = threading.RLock()
        self._prepared: Prepared | None = None
        self._snapshot: inspection.Snapshot | None = None
        self._prepare(model)
        self._model = weakref.ref(model, self._forget)

    def __call__(
        self, x: Tensor, t: Tensor | float, class_labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The model's output for a batch, [N, out_channels, H, W] in the plan's dtype.

        Args:
            x: [N, in_channels, H, W], float, on the plan's device.
            t: int64 or float, [N], [1] or a number.
            class_labels: int64 [N], as the model takes them.
            kwargs: ``return_dict`` of a UNet2DModel, without a meaning here.
        """
        prepared = self._current()
        _check_keywords(kwargs, prepared)
        with torch.no_grad(), prepared.context():
            x, labels = prepared.inputs(x, class_labels)
            return prepared(x, prepared.time(prepared.timesteps(t, x.shape[0]), labels))

    def trajectory(self, timesteps: Tensor | Sequence[float]) -> Trajectory:
        """The plan at given timesteps, which all samples share; of the weights as they are now.

        Args:
            timesteps: [S], integers or floats.
        """
        return Trajectory(self._current(), timesteps)

    def refresh(self) -> None:
        """Prepares again from the model's current weights, after a change that cannot be seen: one
        through ``.data``, or by another process.

        Raises:
            ReferenceError: the model is gone.
            ValueError, MemoryError: as ``prepare``.
        """
        with self._lock:
            model = self._model()
            if model is None:
                raise ReferenceError("the model that the plan was prepared from is gone")
            self._prepare(model)

    @property
    def stale(self) -> bool:
        """Whether the model was changed, so that the next call will prepare it again or refuse."""
        model, snapshot = self._model(), self._snapshot
        return model is not None and (snapshot is None or not snapshot.is_of(model))

    @property
    def rewrites(self) -> tuple[str, ...]:
        """The names in effect, in the order of REWRITES."""
        return tuple(name for name in REWRITES if name in self._current().rewrites)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, images and output."""
        return self._current().dtype

    @property
    def device(self) -> torch.device:
        """Where weights and images lie."""
        return self._current().device

    def is_of(self, model: object) -> bool:
        """Whether it was prepared from this object."""
        return self._model() is model

    def _current(self) -> Prepared:
        with self._lock:
            if self.stale:
                self.refresh()
            assert self._prepared is not None
            return self._prepared

    def _prepare(self, model: nn.Module) -> None:
        inspection.inspect(model)
        self._prepared = self._snapshot = None  # first: two need more memory than one
        snapshot = inspection.Snapshot(model)
        reason = ""
        try:
            self._prepared = Prepared(model, self._asked, self._asked_dtype)
        except (MemoryError, RuntimeError) as error:
            reason = _out_of_memory(error)
            if not reason:
                raise
        if reason:  # outside, where no traceback keeps what was half made
            raise MemoryError(
                f"not enough memory for a plan of the model, which is untouched: {reason}"
            )
        self._snapshot = snapshot

    def _forget(self, _: object) -> None:
        """What the model alone kept alive is not kept by its plan."""
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is not None:
            snapshot.forget()


class Trajectory:
    """A plan at given timesteps, made by :meth:`Plan.trajectory`: changes of the model that come
    later do not reach it. The table of their embeddings is made when it is first needed."""

    def __init__(self, prepared: Prepared, timesteps: Tensor | Sequence[float]) -> None:
        told = torch.as_tensor(timesteps, device=prepared.device)
        if told.ndim != 1:
            raise ValueError(f"timesteps must have shape [S]; got {list(told.shape)}")
        self._prepared = prepared
        self._timesteps = told
        self._table: TimeTable | None = None

    def __len__(self) -> int:
        return len(self._timesteps)

    @property
    def dtype(self) -> torch.dtype:
        """Of images and output."""
        return self._prepared.dtype

    @property
    def device(self) -> torch.device:
        """Where images lie."""
        return self._prepared.device

    def step(
        self, row: int, x: Tensor, class_labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The model's output at the ``row``-th timestep, for arguments as of the plan's call.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row must lie in 0 … {len(self) - 1}; got {row}")
        prepared = self._prepared
        _check_keywords(kwargs, prepared)
        with torch.no_grad(), prepared.context():
            x, labels = prepared.inputs(x, class_labels)
            return prepared(x, self._rows(row, labels, x.shape[0]))

    def of_row(self, x: Tensor, row: int, **kwargs: Any) -> Tensor:
        """:meth:`step` in the order of a model's arguments, the row in place of the timestep."""
        return self.step(row, x, **kwargs)

    def _rows(self, row: int, labels: Labels, count: int) -> Sequence[Tensor]:
        time = self._prepared.time
        if not time.joined:
            return time(self._timesteps[row].expand(count), labels)
        if self._table is None:
            self._table = time.table(self._timesteps)
        return self._table.step(row, labels)


def names(rewrites: str | Iterable[str]) -> frozenset[str]:
    """Names of rewrites, or "all" of them.

    Raises:
        TypeError, ValueError: not names, or others.
    """
    if rewrites == "all":
        return frozenset(REWRITES)
    if not isinstance(rewrites, Iterable):
        raise TypeError(f"rewrites must be names; got {type(rewrites).__name__}")
    found = [rewrites] if isinstance(rewrites, str) else list(rewrites)
    if unknown := [name for name in found if name not in REWRITES]:
        raise ValueError(f"rewrites must be among {', '.join(REWRITES)}; got {unknown}")
    return frozenset(found)


def check_dtype(dtype: torch.dtype) -> None:
    """Raises ValueError unless a plan can be of it."""
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"a plan's dtype must be float32, bfloat16 or float16; got {dtype}")


def _check_keywords(kwargs: dict[str, Any], prepared: Prepared) -> None:
    for name in kwargs:
        if name != "return_dict" or not prepared.takes_return_dict:
            raise TypeError(f"the plan got an unexpected keyword argument {name!r}")


def _out_of_memory(error: MemoryError | RuntimeError) -> str:
    """In its own words, if memory is what is missing; PyTorch has no class for a CPU's."""
    said = str(error).split("\n")[0]
    known = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
    cpu = "can't allocate memory" in said or "not enough memory" in said
    return said or type(error).__name__ if known or cpu else ""
