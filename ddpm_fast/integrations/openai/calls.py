"""How OpenAI's diffusion objects are called, and how they call a model."""

from __future__ import annotations

import functools
import inspect
import warnings
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.checks import noise_address
from ..accelerated import Accelerated
from .tables import Tables, made_of

STOCK_NAMES = ("GaussianDiffusion", "SpacedDiffusion")
# What the replaced methods would have called, and no longer do.
PASSED_OVER = (
    "p_mean_variance",
    "q_mean_variance",
    "q_posterior_mean_variance",
    "_predict_xstart_from_eps",
    "_predict_xstart_from_xprev",
    "_predict_eps_from_xstart",
    "_vb_terms_bpd",
    "_prior_bpd",
)
_PASSED_OVER_BY = {
    method: frozenset((*PASSED_OVER, *more))
    for method, more in {
        "p_sample": (),
        "p_sample_loop": ("p_sample_loop_progressive", "p_sample"),
        "p_sample_loop_progressive": ("p_sample",),
        "ddim_sample": (),
        "ddim_sample_loop": ("ddim_sample_loop_progressive", "ddim_sample"),
        "ddim_sample_loop_progressive": ("ddim_sample",),
        "ddim_reverse_sample": (),
        "training_losses": ("q_sample",),
        "calc_bpd_loop": ("q_sample",),
    }.items()
}
_WRAPPER_ATTRIBUTES = {"model", "timestep_map", "rescale_timesteps", "original_num_steps"}


class Choices(NamedTuple):
    """Arguments that their methods have in common. Not every method, nor every copy of the code,
    takes each, and they stand in another order."""

    clip_denoised: bool = True
    denoised_fn: Any = None
    cond_fn: Any = None
    model_kwargs: Any = None
    eta: float = 0.0
    noise: Tensor | None = None
    device: Any = None
    progress: bool = False

    @property
    def clip(self) -> tuple[float, float] | None:
        return (-1.0, 1.0) if self.clip_denoised else None

    @property
    def kwargs(self) -> dict[str, Any]:
        return self.model_kwargs or {}

    @property
    def of_mean_variance(self) -> dict[str, Any]:
        """What p_mean_variance takes of them."""
        return {
            "clip_denoised": self.clip_denoised,
            "denoised_fn": self.denoised_fn,
            "model_kwargs": self.model_kwargs,
        }


def stock_method(cls: type, name: str) -> Any:
    """Their base class's function, without what SpacedDiffusion puts around it; None where that
    copy of the code lacks it."""
    base = next(c for c in cls.__mro__ if c.__name__ == STOCK_NAMES[0])
    return getattr(base, name, None)


@functools.cache
def _signature(cls: type, method: str) -> tuple[inspect.Signature, Choices]:
    """Of the arguments that Choices has, and what it has where none are given."""
    parameters = inspect.signature(stock_method(cls, method)).parameters.values()
    kept = [p for p in parameters if p.name in Choices._fields]
    defaults = {p.name: p.default for p in kept if p.default is not p.empty}
    return inspect.Signature(kept), Choices(**defaults)


class AcceleratedDiffusion(Accelerated):
    """What the parts of an accelerated object share: its tables and its calls."""

    num_timesteps: int
    _tables_kept: Tables | None = None
    _warned: frozenset[str] = frozenset()
    _is_quiet = False  # while it is tried

    @property
    def _tables(self) -> Tables:
        """Of what the object has now; at each call, once."""
        tables = self._tables_kept
        if tables is None or not all(map(is_, tables.made_of, made_of(self))):
            tables = self._tables_kept = Tables(self)
        return tables

    def _has_own(self, method: str) -> bool:
        """Whether something that ``method`` passes over has been set on the object itself, whose
        place is the stock method's then. Warns."""
        if _PASSED_OVER_BY[method].isdisjoint(self.__dict__):
            return False
        own = sorted(frozenset().union(*_PASSED_OVER_BY.values()) & self.__dict__.keys())
        noise = ", and its steps draw torch's noise" if self.noise_source.is_addressed else ""
        self._warn(
            f"this object has its own {', '.join(own)}: what would pass over it stays the stock "
            f"code{noise}",
            stacklevel=4,
        )
        return True

    def _warn(self, why: str, stacklevel: int = 3) -> None:
        """Once for an object."""
        if why not in self._warned and not self._is_quiet:
            self._warned |= {why}
            warnings.warn(why, stacklevel=stacklevel)

    def __getstate__(self) -> dict[str, Any]:
        made_anew = ("_tables_kept", "_told")
        return {k: v for k, v in self.__dict__.items() if k not in made_anew}

    def _choices(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choices:
        """The arguments after the first ones, by the stock method's names, order and defaults.

        Raises:
            TypeError: what the stock method does not take.
        """
        cls: Any = type(self)
        signature, defaults = _signature(cls, method)
        if not args and kwargs.keys() <= signature.parameters.keys():
            return defaults._replace(**kwargs)
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{method}(): {error}") from None
        return defaults._replace(**given)

    def _given(self, method: str, choices: Choices) -> dict[str, Any]:
        """The arguments by name, as the stock method takes them."""
        cls: Any = type(self)
        return {name: getattr(choices, name) for name in _signature(cls, method)[0].parameters}

    def _address(self, samples: int, device: torch.device) -> tuple[int, Tensor | None]:
        """Of a trajectory's noise: its seed, and its ids on the device."""
        if not self.noise_source.is_addressed:
            return 0, None
        seed, ids = self.noise_source.of_trajectory(device)
        return seed, noise_address(0, ids, samples, device)[2]

    def _wrap_model(self, model: Any) -> Any:
        """As SpacedDiffusion's: tells a model the timesteps that it knows, by a map that stays on
        the device. Called for GaussianDiffusion's too, where it leaves the model as it is."""
        stock = getattr(super(), "_wrap_model", None)
        if stock is None:
            return model
        wrapped = stock(model)
        if wrapped is model or set(vars(wrapped)) - _WRAPPER_ATTRIBUTES:
            return wrapped
        wrapped.__class__ = _with_kept_map(type(wrapped))
        steps = wrapped.timestep_map
        scales = getattr(wrapped, "rescale_timesteps", None)
        told_of = (len(steps), scales, getattr(wrapped, "original_num_steps", None))
        kept = self.__dict__.get("_told")
        if kept is None or kept[0] is not steps or kept[1] != told_of:
            kept = self.__dict__["_told"] = steps, told_of, {}
        wrapped.told = kept[2]
        return wrapped

    def _model_output(
        self, tables: Tables, model: Any, x: Tensor, t: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """What a wrapped model says at timesteps t, int64 [N]; in whatever dtype, as theirs may."""
        scale = getattr(self, "_scale_timesteps", None)
        output = model(x, t if scale is None else scale(t), **kwargs)
        if isinstance(output, tuple):
            output = output[0]
        expected = (x.shape[0], tables.halves * x.shape[1], *x.shape[2:])
        if not isinstance(output, Tensor) or output.shape != expected:
            shape = getattr(output, "shape", None)
            raise ValueError(
                f"model must return a tensor of shape {list(expected)}, its variance being "
                f"{tables.variance}; got "
                f"{type(output).__name__ if shape is None else list(shape)}"
            )
        return output


def model_timesteps(diffusion: Any) -> Tensor:
    """[T] on the CPU: what the stock code gives a model as t at each of its timesteps."""
    told: list[Tensor] = []

    def model(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        told.append(t)
        return x

    t = torch.arange(diffusion.num_timesteps, device="cpu")
    scale = getattr(diffusion, "_scale_timesteps", None)
    wrap = getattr(diffusion, "_wrap_model", None)
    called = model if wrap is None else wrap(model)
    called(torch.zeros(len(t), 1, device="cpu"), t if scale is None else scale(t))
    return told[0].detach().clone()


class _KeptMap:
    """Before their wrapper of a model: the map as a tensor that is made once for a device."""

    told: dict[torch.device, Tensor]
    model: Any

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Any:
        if ts.dtype != torch.int64:
            return super().__call__(x, ts, **kwargs)  # type: ignore[misc]
        told = self.told.get(ts.device)
        if told is None:
            told = self.told[ts.device] = self._whole_map(ts.device)
        return self.model(x, told[ts], **kwargs)

    @torch.inference_mode(False)
    def _whole_map(self, device: torch.device) -> Tensor:
        model, found = self.model, []
        self.model = lambda x, t, **kwargs: found.append(t)
        try:
            steps = torch.arange(len(self.timestep_map), device=device)  # type: ignore[attr-defined]
            super().__call__(steps, steps)  # type: ignore[misc]
        finally:
            self.model = model
        return found[0]


_wrappers: dict[type, type] = {}


def _with_kept_map(wrapper: type) -> type:
    if wrapper not in _wrappers:
        _wrappers[wrapper] = type(f"Fast{wrapper.__name__}", (_KeptMap, wrapper), {})
    return _wrappers[wrapper]
