"""The trajectories that a session's samples follow, joined in one table."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine import Trajectory
from ..model import first_parameter
from ..sample_state import arithmetic, described
from ..step_table import StepTable, joined
from ..stepping import backend_of, checked_parameter, device_of, low_precision

if TYPE_CHECKING:
    from ..sampler import Sampler

_KEPT = 16  # trajectories that nobody follows at the moment


class Lane:
    """A trajectory of some number of steps.

    Attributes:
        timesteps: that its rows leave.
        told: what the model is told at them.
        plan: of the model at these; None: the model itself is called.
        offset: where its rows begin in the joined table.

    Args:
        like: a lane whose weights it is to have; None: those that the model has now.
    """

    def __init__(
        self,
        table: StepTable,
        sampler: Sampler,
        shape: Sequence[int],
        like: Lane | None = None,
    ) -> None:
        self.table = table
        self.timesteps: list[int] = table.timesteps.tolist()
        told = sampler.model_timesteps
        self.told = self.timesteps if told is None else told[self.timesteps].tolist()
        self.plan: Trajectory | None = None
        if like is None:
            with backend_of(sampler):
                self.plan = sampler._planner.trajectory(sampler.model, self.told, shape)
        elif like.plan is not None:
            self.plan = Trajectory(like.plan._prepared, self.told)
        self.offset, self.followers = 0, 0

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def family(self) -> Hashable:
        """Of the lanes whose samples may share a call: of one model as it was at one time."""
        return None if self.plan is None else self.plan.family


class Lanes:
    """Makes lanes as they are asked for, and keeps those in use and a few more.

    Args:
        sampler: whose model and methods they are of.
        shape: [N, C, …] of the largest batch.

    Attributes:
        table: the joined one, on ``device``; another object whenever it changes.
        told: what the model is told at its rows, int64 or float32, on ``device``.
    """

    def __init__(self, sampler: Sampler, shape: Sequence[int]) -> None:
        self._sampler, self._shape = sampler, list(shape)
        parameter = checked_parameter(sampler.model, stacklevel=5)
        self._lanes: dict[int | None, Lane] = {}
        self._ends: dict[int | None, tuple[int, int]] = {}
        # Whose weights all have that are made before the next look at the model
        self._current = lane = self._lanes[None] = self._lane(None)
        self._description: dict[str, str] | None = None
        lies = parameter if lane.plan is None else lane.plan
        self.device, self.low_precision = device_of(sampler, lies), low_precision(lies)
        self._join()

    def ends(self, num_steps: int | None) -> tuple[int, int]:
        """How many steps the trajectory of so many has, and the timestep that the last one leaves;
        from any thread.

        Raises:
            ValueError: there is none.
        """
        found = self._ends.get(num_steps)
        if found is None:
            table = self._sampler.table_of(num_steps)
            found = self._ends[num_steps] = len(table), int(table.timesteps[-1])
        return found

    def take(self, num_steps: int | None) -> Lane:
        """A lane for one more follower."""
        if num_steps not in self._lanes:
            self._lanes[num_steps] = self._lane(num_steps, self._current)
            self._forget()
            self._join()
        lane = self._lanes[num_steps] = self._lanes.pop(num_steps)  # the latest
        lane.followers += 1
        return lane

    def give_back(self, lane: Lane) -> None:
        lane.followers -= 1

    def renew(self) -> None:
        """Looks at the model's weights again, while nobody follows a lane.

        Raises:
            TypeError, ValueError, MemoryError: it cannot be sampled from as it is now.
        """
        lane = self._lane(None)
        lies = first_parameter(self._sampler.model) if lane.plan is None else lane.plan
        if (device := device_of(self._sampler, lies)) != self.device:
            raise ValueError(f"the model is on {device} now, and its session on {self.device}")
        self.low_precision = low_precision(lies)
        if lane.family is None or lane.family != self._current.family:
            self._description = None
        self._current = lane
        if any(lane.family != other.family for other in self._lanes.values()):
            self._lanes = {None: lane}  # of other weights: all are made anew
            self._join()

    def description(self) -> dict[str, str]:
        """By what a saved state is known to be of the same sampler, with the weights that lanes
        have. Those of a plan are read once, when it is first asked for; a model that is called
        itself computes with those it has at the moment.

        Raises:
            TypeError: a model whose weights are not there.
            ValueError: the model has others by now.
        """
        plan = self._current.plan
        if self._description is None or plan is None:
            if plan is not None and not self._sampler._planner.is_as_it_was(plan):
                raise ValueError(
                    "the model's weights were changed while samples of its plan are under way, "
                    "which go on with those of before: they cannot be told any more; save when "
                    "these samples are finished"
                )
            self._description = {
                **described(self._sampler),
                **arithmetic(self._sampler, self.device, self.low_precision, plan),
            }
        return dict(self._description)

    def _lane(self, num_steps: int | None, like: Lane | None = None) -> Lane:
        return Lane(self._sampler.table_of(num_steps), self._sampler, self._shape, like)

    def _forget(self) -> None:
        """The idle ones that were used longest ago."""
        idle = [number for number, lane in self._lanes.items() if not lane.followers]
        for number in idle[: max(len(idle) - _KEPT, 0)]:
            del self._lanes[number]

    def _join(self) -> None:
        offset = 0
        told: list[float] = []
        for lane in self._lanes.values():
            lane.offset = offset
            offset += len(lane)
            told += lane.told
        dtype = torch.int64
        if self._sampler.model_timesteps is not None:
            dtype = self._sampler.model_timesteps.dtype
        self.told: Tensor = torch.tensor(told, dtype=dtype, device=self.device)
        self.table = joined([lane.table for lane in self._lanes.values()]).to(self.device)
