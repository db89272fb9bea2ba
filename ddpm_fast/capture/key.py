"""What a captured step is made for: all that is baked into it, to be compared before it is used."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import chosen
from ..ops.reverse_step import check_clip
from .layout import overlaps, reach_of, shift_of

if TYPE_CHECKING:
    from ..sampling import Run

# Whose equality is that of what a model makes of them, and which nobody changes in place
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.layout,
)
SPREAD = 8  # a buffer with the strides of an argument may be so many times its elements

Holders = list[Mapping[str, Tensor | None]]


class UnsuitedError(Exception):
    """An argument that no captured step takes; without a word where no step takes it."""


class Same:
    """An object that equals itself alone, and lives as long as this."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class Known:
    """An object that equals itself alone, where that may go: a model is large."""

    def __init__(self, value: object) -> None:
        self._value: Callable[[], object]
        try:
            self._value = weakref.ref(value)
        except TypeError:
            self._value = lambda: value

    def is_of(self, value: object) -> bool:
        return self._value() is value


class Key(NamedTuple):
    """What two trajectories must have in common to be played from one captured step.

    Attributes:
        model: what is called; weights that were put in the place of others make another.
        weights: where they lie.
        rest: everything else.
        opaque: whether something is called that can change without a trace here.
    """

    model: Hashable
    weights: Hashable
    rest: Hashable
    opaque: bool


def key_of(run: Run, every_state: bool, steps: int, holders: Holders) -> Key:
    """Of a trajectory whose next step is to be captured, ``steps`` a graph.

    Raises:
        UnsuitedError: an argument of the model's whose changes could not be seen.
    """
    sampler, x = run.sampler, run.x
    weights = _weights(holders, x.device)
    rest = (
        (every_state, steps),
        (x.shape, x.stride(), x.device, run.low_precision),
        (Same(run.table), tuple(run.model_timesteps), run.t_dtype),
        check_clip(sampler.clip),
        (sampler.dynamic_threshold, Same(sampler.denoised_fn)),
        _scale(sampler.guidance_scale, x),
        frozen(run.model_kwargs, x.device, "model_kwargs"),
        frozen(run.uncond_kwargs, x.device, "uncond_kwargs"),
        chosen() if sampler.backend == "auto" else sampler.backend,
        _modes(x.device.type),
    )
    model = Same(sampler.model if run.plan is None else run.plan.family)
    return Key(model, weights, rest, run.plan is None or sampler.denoised_fn is not None)


def frozen(value: object, device: torch.device, name: str) -> Hashable:
    """What a step is captured for, of an argument: a tensor's form, the values of others.

    Raises:
        UnsuitedError: it may change unseen, or would make the host wait.
    """
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
            raise UnsuitedError(f"{name} is a tensor of a kind of its own, {type(value).__name__}")
        if value.is_quantized or value.is_conj() or value.is_neg():
            raise UnsuitedError(f"{name} is a tensor of a kind of its own")
        if overlaps(value):
            raise UnsuitedError(f"{name} has elements that lie over each other")
        if reach_of(value) > SPREAD * max(value.numel(), 1 << 20):
            raise UnsuitedError(f"{name} is strewn over {reach_of(value)} elements of memory")
        # Kernels are chosen by all of it
        form = (value.shape, value.stride(), value.dtype, value.device, shift_of(value))
        if value.device == device:
            return form
        if value.device.type == "cpu" and value.ndim == 0:
            return (*form, frozen(value.item(), device, name))  # a number to all operations
        raise UnsuitedError(f"{name} lies on {value.device}, and the states on {device}")
    kind = type(value)
    if isinstance(value, float):
        return kind, value.hex()  # 0 and -0 are equal
    if kind in _PLAIN:
        return kind, value
    if isinstance(value, dict) and kind is dict:
        return kind, tuple(
            (frozen(key, device, name), frozen(part, device, f"{name}[{key!r}]"))
            for key, part in value.items()
        )
    if isinstance(value, (list, tuple)) and kind in (list, tuple):
        return kind, tuple(frozen(part, device, f"{name}[{i}]") for i, part in enumerate(value))
    raise UnsuitedError(f"{name} is of {kind.__qualname__}, which may change unseen")


def tensors_of(value: object) -> Iterator[Tensor]:
    """The tensors in an argument, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """An argument with others in the place of its tensors."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: with_tensors(part, tensors) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([with_tensors(part, tensors) for part in value])
    return value


def _scale(scale: object, x: Tensor) -> Hashable:
    """A number is written where the graph reads it, like a tensor."""
    if scale is None:
        return "none"
    if not isinstance(scale, Tensor):
        return 0
    shape = list(scale.shape)
    if (scale.device, scale.dtype) != (x.device, torch.float32) or shape not in ([], [len(x)]):
        raise UnsuitedError  # the step itself says what is wrong
    return scale.ndim


def holders_of(run: Run) -> Holders:
    """Where the tensors of the model that is called are held, where it is a module's."""
    module = getattr(run.sampler.model, "__self__", run.sampler.model)
    if run.plan is not None or not isinstance(module, nn.Module):
        return []
    held = [tensors for part in module.modules() for tensors in (part._parameters, part._buffers)]
    return [tensors for tensors in held if tensors]


def _weights(holders: Holders, device: torch.device) -> Hashable:
    """Where parameters and buffers lie: written to in place they are seen, put elsewhere not."""
    places = []
    for held in holders:
        for tensor in held.values():
            if tensor is None:
                continue
            if tensor.device != device:
                raise UnsuitedError(f"a weight lies on {tensor.device}, the states on {device}")
            try:
                places.append((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype))
            except RuntimeError as error:
                raise UnsuitedError(f"a weight has no address: {error}") from None
    return tuple(places)


def _modes(kind: str) -> Hashable:
    """How PyTorch is told to compute."""
    backends = torch.backends
    autocast: Hashable = None
    if torch.amp.is_autocast_available(kind):
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    told: list[Callable[[], Any]] = [
        torch.get_default_dtype,
        torch.are_deterministic_algorithms_enabled,
        torch.get_float32_matmul_precision,
        lambda: backends.cuda.matmul.allow_tf32,
        lambda: backends.cuda.matmul.fp32_precision,
        lambda: backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        lambda: backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        lambda: (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        lambda: backends.cudnn.allow_tf32,
        lambda: backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        backends.cuda.flash_sdp_enabled,
        backends.cuda.mem_efficient_sdp_enabled,
        backends.cuda.math_sdp_enabled,
        backends.cuda.cudnn_sdp_enabled,
    ]
    return autocast, tuple(map(_value, told))


def _value(told: Callable[[], Any]) -> Hashable:
    """PyTorch refuses to tell one setting where it was given in other words."""
    try:
        found: Hashable = told()
    except (RuntimeError, AttributeError):
        return None
    return found
