"""What the ops have in common: arguments checked once, memory layouts, noise addresses.

Shapes, dtypes and devices are checked when an op is called (under ``torch.compile`` while it is
traced); values are checked where they lie on the host, when it runs.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import native, torch_problem
from ..schedule import integer

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_INDEX = 1 << 24
MAX_ELEMENTS = 1 << 34

library = torch.library.Library("ddpm_fast", "DEF")


def check_tensor(
    name: str, tensor: object, device: torch.device | None, dtypes: Sequence[torch.dtype]
) -> None:
    """Raises TypeError or ValueError unless it is a tensor of one of ``dtypes`` on ``device``."""
    if isinstance(tensor, Tensor) and tensor.dtype in dtypes and tensor.device == device:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {accepted}; got {tensor.dtype}")
    raise ValueError(f"{name} must be on {device}, as the others are; got {tensor.device}")


def check_same_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name} must have shape {list(expected)}; got {list(tensor.shape)}")


def indexed(device: torch.device | str) -> torch.device:
    """The device as tensors name theirs: "cuda" is the current one.

    Raises:
        RuntimeError: torch has no CUDA device, and nothing is being traced for another machine.
    """
    device = torch.device(device)
    if device.type == "cuda" and runs_now(None):
        problem = torch_problem()
        if problem:
            raise RuntimeError(f"there is no device {device}: {problem}")
        if device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
    return device


def check_batch(name: str, shape: torch.Size) -> None:
    """A batch of samples whose elements a noise address can reach."""
    if len(shape) == 0:
        raise ValueError(f"{name} must have a first dimension of samples; got a 0-d tensor")
    if shape.numel() > MAX_ELEMENTS and math.prod(shape[1:]) > MAX_ELEMENTS:
        raise ValueError(f"{name} must have at most 2^34 elements a sample; got {list(shape)}")


def as_int(name: str, value: object, stop: int) -> int:
    """An integer in 0 … stop - 1; numpy's and traced ones count.

    Raises:
        TypeError, ValueError: anything else.
    """
    number = value if type(value) in (int, torch.SymInt) else integer(name, value)
    if not 0 <= number < stop:  # type: ignore[operator]
        shown = f"2^{stop.bit_length() - 1} - 1" if stop in (MAX_INDEX, 1 << 64) else stop - 1
        raise ValueError(f"{name} must lie in 0 … {shown}; got {number}")
    return number  # type: ignore[return-value]


def finite(name: str, value: object, accepted: str = "a number") -> float:
    """A finite number; numpy's count.

    Raises:
        TypeError, ValueError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {accepted}; got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite; got {number}")
    return number


def per_sample_int(name: str, tensor: Tensor, samples: int, device: torch.device) -> None:
    check_tensor(name, tensor, device, (torch.int64,))
    check_same_shape(name, tensor, (samples,))


def noise_address(
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int] | None,
    samples: int,
    device: torch.device,
) -> tuple[int, Tensor | None, Tensor | None]:
    """seed and sample_ids as the ops take them: one int64 seed or [N] of them, and [N] ids or None.

    Raises:
        TypeError, ValueError: a seed outside [0, 2^64), ids that are negative or not one a sample.
    """
    seeds = None
    if isinstance(seed, Tensor):
        per_sample_int("seed", seed, samples, device)
        seeds, seed = seed.contiguous(), 0
    else:
        seed = as_int("seed", seed, 1 << 64)
        if seed >= 1 << 63:
            seed -= 1 << 64
    if sample_ids is not None:
        if not isinstance(sample_ids, Tensor):
            sample_ids = _ids_tensor(sample_ids, device)
        per_sample_int("sample_ids", sample_ids, samples, device)
        sample_ids = sample_ids.contiguous()
    return seed, seeds, sample_ids


def noise_draw(
    stream: int, index: int | Tensor, samples: int, device: torch.device
) -> tuple[int, int, Tensor | None]:
    """A draw's stream and index as the ops take them: one index for all, or int64 [N] of them.

    Raises:
        TypeError, ValueError: a stream or an index out of its range, indices not one a sample.
    """
    stream = as_int("stream", stream, 256)
    if isinstance(index, Tensor):
        per_sample_int("index", index, samples, device)
        return stream, 0, index.contiguous()
    return stream, as_int("index", index, MAX_INDEX), None


def _ids_tensor(ids: Sequence[int], device: torch.device) -> Tensor:
    ids = [integer("sample_ids", i) for i in ids]
    if any(not 0 <= i < 1 << 63 for i in ids):
        raise ValueError(f"sample_ids must lie in 0 … 2^63 - 1; got {min(ids)} … {max(ids)}")
    return torch.tensor(ids, dtype=torch.int64, device=device)


def check_ids_on_host(sample_ids: Tensor | None) -> None:
    """Raises ValueError for a negative id, where the ids lie on the host."""
    if sample_ids is not None and sample_ids.device.type == "cpu" and sample_ids.numel():
        lowest, _ = _range(sample_ids)
        if lowest < 0:
            raise ValueError(f"sample_ids must not be negative; got {lowest}")


def check_range_on_host(name: str, values: Tensor, count: int) -> None:
    """Raises ValueError unless every value lies in 0 … count - 1, where they lie on the host."""
    if values.device.type == "cpu" and values.numel():
        lowest, highest = _range(values)
        if lowest < 0 or highest >= count:
            raise ValueError(f"{name} must lie in 0 … {count - 1}; got {lowest} … {highest}")


def _range(values: Tensor) -> tuple[int, int]:
    """Least and greatest of a contiguous int64 tensor on the host that is not empty."""
    if native is not None:
        lowest, highest = native.range(values.data_ptr(), values.numel())
    else:
        lowest, highest = (int(bound) for bound in values.aminmax())
    return lowest, highest


def check_overlap(name: str, out: Tensor, other_name: str, other: Tensor | None) -> None:
    """The same memory, element for element, is written after it is read; a part of it is not."""
    if other is None:
        return
    if other.data_ptr() == out.data_ptr() and other.nbytes == out.nbytes:
        return
    begin, other_begin = out.data_ptr(), other.data_ptr()
    extent = sum(
        (size - 1) * stride for size, stride in zip(other.shape, other.stride(), strict=True)
    )
    if (
        out.numel() > 0
        and other.numel() > 0
        and begin < other_begin + (extent + 1) * other.itemsize
        and other_begin < begin + out.numel() * out.itemsize
    ):
        raise ValueError(f"{name} must not overlap {other_name} in part")


Layout = tuple[int, int, int, bool]  # samples, channels, pixels, channels_last


def layout_of(tensor: Tensor) -> Layout | None:
    """How a dense tensor lies in memory, or None: then it must be copied."""
    if tensor.is_contiguous():
        channels_last = False
    elif is_channels_last(tensor):
        channels_last = True
    else:
        return None
    return _layout(tensor.shape, channels_last)


def _layout(shape: torch.Size, channels_last: bool) -> Layout:
    if len(shape) == 4:
        samples, channels, height, width = shape
        return samples, channels, height * width, channels_last
    channels = shape[1] if len(shape) > 1 else 1
    return shape[0], channels, math.prod(shape[2:]), channels_last


def is_channels_last(tensor: Tensor) -> bool:
    return (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)) or (
        tensor.ndim == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d)
    )


def memory_format(ndim: int, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if ndim == 4 else torch.channels_last_3d


def dense(tensor: Tensor) -> tuple[Tensor, Layout]:
    """The tensor itself and its layout, or a contiguous copy where its strides have gaps."""
    layout = layout_of(tensor)
    if layout is None:
        return tensor.contiguous(), _layout(tensor.shape, False)
    return tensor, layout


def laid_out(tensor: Tensor, channels_last: bool) -> Tensor:
    """The tensor itself where it lies as said, else a copy that does."""
    if not channels_last and tensor.is_contiguous():
        return tensor
    return tensor.contiguous(memory_format=memory_format(tensor.ndim, channels_last))


def empty_laid_out(
    shape: Sequence[int], channels_last: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.empty(
        shape, dtype=dtype, device=device, memory_format=memory_format(len(shape), channels_last)
    )


def runs_now(*tensors: Tensor | None) -> bool:
    """Whether an op may run without torch's dispatcher: nothing traces, records or differentiates.

    The dispatcher costs 0.2 µs an argument, more than half of a small step's time.
    """
    return is_eager(*tensors) and not (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    )


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing traces or transforms: plain tensors, and at most reverse-mode derivatives."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or (tensors[0] is not None and tensors[0].is_meta)
    ):
        if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
            _refuse_tangents(tensors)
        return False
    for tensor in tensors:
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    if forward_ad._current_level >= 0:
        _refuse_tangents(tensors)
    return True


def is_eager_upstream(*upstream: Tensor | None) -> bool:
    """The same of what a backward pass is given, which may be a batch of such gradients in disguise
    (``is_grads_batched=True``)."""
    return is_eager(*upstream) and not any(
        t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in upstream
    )


def is_functional() -> bool:
    """Whether derivatives are taken forward, or a transform of torch.func is at work."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether derivatives are asked for, or a transform of torch.func is at work."""
    return (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    ) or is_functional()


_PLAIN = (Tensor, torch.nn.Parameter)


def _refuse_tangents(tensors: Sequence[Tensor | None]) -> None:
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                "ddpm_fast's ops have no forward-mode derivatives; use reverse mode, or "
                "ddpm_fast.reference"
            )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward pass that has no derivative of its own. torch's decorator of this name lets a
    second derivative pass where the gradient that comes in is a constant, as after a mean: wrong,
    and in silence."""

    @functools.wraps(backward)
    def run(ctx: Any, *upstream: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "ddpm_fast's ops are differentiable once, and this backward pass is asked for a "
                "graph of its own (create_graph=True); ddpm_fast.reference has the formulas in "
                "PyTorch"
            )
        return backward(ctx, *upstream)

    return run


def empty_like_dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor laid out as dense() would make ``tensor``."""
    if tensor.is_contiguous() or is_channels_last(tensor):
        return torch.empty_like(tensor, dtype=dtype)
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def reference_address(
    seed: int, seeds: Tensor | None, sample_ids: Tensor | None, samples: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Seeds and sample ids as int64 [N], as reference.randn takes them."""
    if seeds is None:
        seeds = torch.full((samples,), seed, dtype=torch.int64, device=device)
    if sample_ids is None:
        sample_ids = torch.arange(samples, device=device)
    return seeds, sample_ids
