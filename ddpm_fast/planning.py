"""Which plan a sampler uses for its model, if any."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .engine import Plan, Trajectory, check_dtype, names, prepare
from .model import Model
from .nn import inspection


class Planner:
    """Makes the plan of a sampler's model when it is first needed, and keeps it.

    Args:
        choice: "auto", "off", a plan, or names of rewrites.
        dtype: of the plan that is to be made.
        model: that it is to be of; perhaps a plan itself.

    Raises:
        TypeError, ValueError: an unknown choice; a model that there is no plan of; a plan of
            another model; a dtype where no plan is to be made.
    """

    def __init__(self, choice: Any, dtype: torch.dtype | None, model: Model) -> None:
        if isinstance(model, Plan) and choice == "auto":
            choice = model
        self._automatic, self._off = choice == "auto", choice == "off"
        self._given = choice if isinstance(choice, Plan) else None
        self._made: Plan | None = None
        self._rewrites: Iterable[str] = "all"
        self._dtype, self._told, self._failed = dtype, "", False
        if self._given is not None:
            if choice is not model and not choice.is_of(model):
                raise ValueError("the plan was prepared from another model")
        elif not self._automatic and not self._off:
            self._rewrites = names(choice)
            inspection.check_class(model)
        if dtype is not None:
            check_dtype(dtype)
            if self._off or self._given is not None or not inspection.is_known(model):
                raise ValueError(
                    "plan_dtype is of the plan that is made for a UNet: there is none to make of "
                    f"{type(model).__qualname__} with plan={choice!r}"
                )

    def trajectory(self, model: Any, timesteps: Sequence[float]) -> Trajectory | None:
        """The plan at a trajectory's timesteps; None where the model itself is to be called.

        Raises:
            ValueError, MemoryError: no plan can be made, and one was asked for.
        """
        if self._given is not None:
            return self._given.trajectory(timesteps)
        if self._off or (self._automatic and not self._suits(model)):
            return None
        try:
            if self._made is None or not self._made.is_of(model):
                self._made = None
                self._made = prepare(model, rewrites=self._rewrites, dtype=self._dtype)
            return self._made.trajectory(timesteps)
        except (ValueError, MemoryError) as error:
            if not self._automatic:
                raise
            self._failed = isinstance(error, MemoryError)
            if str(error) != self._told:
                self._told = str(error)
                warnings.warn(f"sampling without a plan: {error}", stacklevel=4)
            return None

    def _suits(self, model: Any) -> bool:
        """Whether a plan is worth trying: of a model that is not compiled, and runs in its own
        dtype. That it is in training mode was said already."""
        if self._failed or not inspection.is_known(model) or model.training:
            return False
        device = next(model.parameters()).device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return model._compiled_call_impl is None and not autocast

    def __getstate__(self) -> dict[str, Any]:
        # A copy, perhaps in another process, makes its own.
        return {**self.__dict__, "_made": None}
