"""A UNet's weights as a plan has them, and how it is called with them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..backends import native, select
from .diffusers_weights import load
from .inputs import check_images, check_labels
from .inspection import is_ours
from .memory import within_memory
from .native_plan import NativePlan
from .time_table import TimeRows
from .torch_plan import TorchPlan
from .unet import UNet

_T = TypeVar("_T")
Labels = Tensor | int | None  # [N] or [1]; one of all samples; none


class Executor(Protocol):
    """Computes a UNet's output from an image and the residual blocks' rows (nn/time_table.py).

    Attributes:
        REWRITES: the names that it knows.
        owns_buffers: only one thread may be in it at a time.
    """

    REWRITES: ClassVar[tuple[str, ...]]
    owns_buffers: ClassVar[bool]

    def __init__(self, unet: UNet, rewrites: frozenset[str], dtype: torch.dtype) -> None: ...

    def __call__(self, x: Tensor, rows: Sequence[Tensor]) -> Tensor: ...

    def reserve(self, shape: Sequence[int]) -> None:
        """Takes what memory it will keep for images of a shape."""


def native_executor() -> type[Executor] | None:
    """The CPU's own, where its kernels are there and no other backend was asked for."""
    return NativePlan if native is not None and select(torch.device("cpu")) == "cpu" else None


class Prepared:
    """A UNet as it was at one time, ready to be computed.

    Args:
        model: one that nn/inspection.py let pass.
        asked: names of rewrites; those that mean nothing here are left out.
        dtype: of weights, images and output; the model's if None.
    """

    def __init__(self, model: nn.Module, asked: frozenset[str], dtype: torch.dtype | None) -> None:
        with torch.inference_mode(False), torch.no_grad():
            unet = model if isinstance(model, UNet) else _shared(model)
            weight = unet.conv_in.weight
            self.config, self.device = unet.config, weight.device
            self.takes_return_dict = not is_ours(model)
            self.dtype = dtype or weight.dtype
            kind: type[Executor] = TorchPlan
            on_cpu = (self.device.type, self.dtype) == _NATIVE
            if on_cpu and {"native_conv", "channels_last"} <= asked:  # it knows one layout
                kind = native_executor() or kind
            self.rewrites = asked & frozenset(kind.REWRITES)
            if not _has_kernels(self.device):
                self.rewrites -= {"group_norm_silu"}
            if kind is TorchPlan and on_cpu:
                # oneDNN's convolutions sum in longer chains in this layout: on the CIFAR-10 network
                # of Ho et al. 2.0 to 2.2 times the error, more than a plan may make.
                self.rewrites -= {"channels_last"}
            with self.context():
                self.time = TimeRows(unet, self.dtype, "time_table" in self.rewrites)
                self.executor = kind(unet, self.rewrites, self.dtype)
        self._turn = threading.Lock() if kind.owns_buffers else contextlib.nullcontext()

    def inputs(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Labels]:
        """Both as they are needed.

        Raises:
            TypeError, ValueError: what the UNet cannot take, or of another device.
        """
        check_tensor("x", x, self.device)
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point; got {x.dtype}")
        check_images(self.config, x)
        if labels is not None and self.config.num_classes is not None:
            check_tensor("class_labels", labels, self.device)
            if labels.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"class_labels must be int64; got {labels.dtype}")
            if labels.ndim != 1 or labels.shape[0] not in (1, x.shape[0]):
                raise ValueError(
                    f"class_labels must have shape [{x.shape[0]}]; got {list(labels.shape)}"
                )
        check_labels(self.config, labels)
        return x.to(self.dtype), self.config.num_classes if labels is None else labels

    def check_keywords(self, kwargs: dict[str, Any]) -> None:
        """Of a call, beside the arguments that a plan knows.

        Raises:
            TypeError: one that its model does not take.
        """
        for name in kwargs:
            if name != "return_dict" or not self.takes_return_dict:
                raise TypeError(f"the plan got an unexpected keyword argument {name!r}")

    def timesteps(self, t: Tensor | float, count: int) -> Tensor:
        """[N] or [1], on the plan's device."""
        t = torch.as_tensor(t, device=self.device)
        if t.dtype == torch.bool or t.is_complex():
            raise TypeError(f"t must be integers or floats; got {t.dtype}")
        t = t[None] if t.ndim == 0 else t
        if t.ndim != 1 or t.shape[0] not in (1, count):
            raise ValueError(f"t must have shape [{count}]; got {list(t.shape)}")
        return t

    def __call__(self, x: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """The output for checked images; rows of nn/time_table.py."""
        if not x.shape[0]:
            channels = self.config.out_channels or self.config.in_channels
            return x.new_empty((0, channels, *x.shape[2:]))
        return self._guarded(self.executor, x.shape, x, rows)

    def reserve(self, shape: Sequence[int]) -> None:
        """Takes what memory is kept for images of a shape.

        Raises:
            ValueError: the UNet cannot take it.
            MemoryError: there is not enough.
        """
        check_images(self.config, torch.empty(list(shape), device="meta"))
        if shape[0]:
            self._guarded(self.executor.reserve, shape, shape)

    def _guarded(self, function: Callable[..., _T], shape: Sequence[int], *args: object) -> _T:
        """What the executor returns for images of a shape, one thread at a time where it must."""
        what = f"images of {list(shape)} in a plan"
        if not torch.is_inference_mode_enabled():
            with self._turn:
                return within_memory(what, function, *args)
        # Memory that it keeps must not be of this mode, since other calls are not
        with self._turn, torch.inference_mode(False), torch.no_grad():
            return within_memory(what, function, *args)

    def context(self) -> contextlib.AbstractContextManager[object]:
        """The plan's dtype is what it computes in, and its device is where, whatever the caller's
        autocast and default device say."""
        kind = self.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        elsewhere = torch.get_default_device().type != kind
        if not autocast and not elsewhere:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        if autocast:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if elsewhere:
            stack.enter_context(self.device)
        return stack


_NATIVE = ("cpu", torch.float32)


def _shared(model: Any) -> UNet:
    """A UNet on the weights of a UNet2DModel themselves, but for those of q, k and v."""
    halvings = len(model.config.block_out_channels) - 1
    # Any side that can be halved so often: the weights do not depend on it
    return load(UNet, model, 2**halvings, null_class=False, variant=None, share=True)


def _has_kernels(device: torch.device) -> bool:
    """Whether the package's ops are faster there than PyTorch's."""
    if device.type == "cpu":
        return native is not None
    try:
        return select(device) != "reference"
    except RuntimeError:
        return False


def check_tensor(name: str, tensor: object, device: torch.device) -> None:
    """An argument of a plan that lies where it does.

    Raises:
        TypeError, ValueError: it is no tensor, or lies elsewhere.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, and the plan on {device}")
