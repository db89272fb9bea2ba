"""Which plan a sampler uses for its model, if any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .backends import chosen
from .callers import warn_caller
from .engine import Plan, Trajectory, prepare
from .model import Model
from .nn import inspection
from .nn.rewrites import check_dtype, names


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

    def trajectory(
        self, model: Any, timesteps: Sequence[float], shape: Sequence[int]
    ) -> Trajectory | None:
        """The plan at a trajectory's timesteps, with memory for images of a shape; None where the
        model itself is to be called.

        Raises:
            ValueError: a shape that the model cannot take.
            ValueError, MemoryError: no plan can be made, or not for the shape, and one was asked
                for.
        """
        if self._off:
            return None
        if self._automatic and (why := self._unsuited(model)):
            if self._dtype is not None and not self._failed:
                self._tell(f"plan_dtype={self._dtype} is not obeyed: the model is called, as {why}")
            return None
        try:
            found = self._plan_of(model).trajectory(timesteps)
        except (ValueError, MemoryError) as error:
            if not self._automatic:
                raise
            self._failed = isinstance(error, MemoryError)
            self._tell_without(error)
            return None
        try:
            found.reserve(shape)
        except MemoryError as error:
            if not self._automatic:
                raise
            self._tell_without(error)
            return None
        return found

    def is_as_it_was(self, trajectory: Trajectory) -> bool:
        """Whether the model still has the weights of a trajectory, as far as can be seen without a
        look at their values."""
        plan = self._made if self._given is None else self._given
        return plan is not None and not plan.stale and plan._prepared is trajectory.family

    def _plan_of(self, model: Any) -> Plan:
        if self._given is not None:
            return self._given
        made = self._made
        if made is None or not made.is_of(model) or made.backend != chosen():
            self._made = made = None  # first: two need more memory than one
            self._made = made = prepare(model, rewrites=self._rewrites, dtype=self._dtype)
        return made

    def _unsuited(self, model: Any) -> str:
        """Why no plan is worth trying of a model: it is compiled, say, or does not run in its own
        dtype. That it is in training mode was said already."""
        if self._failed:
            return "there was not enough memory for a plan"
        if not inspection.is_known(model):
            return "there are no plans of its class"
        if model.training:
            return "it is in training mode"
        if model._compiled_call_impl is not None:
            return "it is compiled"
        device = next(model.parameters()).device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return "autocast is on"
        return ""

    def _tell_without(self, error: Exception) -> None:
        dtype = "" if self._dtype is None else f" (plan_dtype={self._dtype} is not obeyed)"
        self._tell(f"sampling without a plan{dtype}: {error}")

    def _tell(self, what: str) -> None:
        """Once, to who samples."""
        if what != self._told:
            self._told = what
            warn_caller(what)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, perhaps in another process, makes its own.
        return {**self.__dict__, "_made": None}
