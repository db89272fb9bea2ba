"""A plan at timesteps that are known beforehand, and samples that are at different ones of them."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .prepared import Labels, Prepared, check_tensor
from .time_table import TimeTable, on_host


class Trajectory:
    """A plan at given timesteps, made by ``Plan.trajectory``: changes of the model that come later
    do not reach it. The table of their embeddings is made when it is first needed."""

    def __init__(self, prepared: Prepared, timesteps: Tensor | Sequence[float]) -> None:
        told = torch.as_tensor(timesteps, device=prepared.device)
        if told.ndim != 1:
            raise ValueError(f"timesteps must have shape [S]; got {list(told.shape)}")
        self._prepared = prepared
        self._timesteps = told
        self._made: TimeTable | None = None

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

    @property
    def family(self) -> Hashable:
        """One object for all trajectories whose samples :func:`mixed_step` takes together: those of
        one plan, of the same weights."""
        return self._prepared

    def step(
        self, row: int | Tensor, x: Tensor, class_labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The model's output at the ``row``-th timestep, for arguments as of the plan's call.

        With a tensor on a GPU the host reads nothing of it, so that the call can be captured in a
        CUDA graph: call it once before, which makes the table of all timesteps. A row that is out
        of range there is taken as the nearest that is in it.

        Args:
            row: a number; or int64 on the plan's device, 0-d or [1], of all samples, or [N].
            x: [N, in_channels, H, W], float, on the plan's device.
            class_labels: int64 [N], as the model takes them.
            kwargs: ``return_dict`` of a UNet2DModel, without a meaning here.

        Raises:
            TypeError, IndexError: no number of a row, or there is no such row.
            ValueError: a tensor of rows of another shape or device.
        """
        prepared = self._prepared
        if not isinstance(row, Tensor):
            row = self._number(row)
        prepared.check_keywords(kwargs)
        with torch.no_grad(), prepared.context():
            x, labels = prepared.inputs(x, class_labels)
            if isinstance(row, Tensor):
                return prepared(x, self._rows_of(row, labels, x.shape[0]))
            return prepared(x, self._rows(row, labels, x.shape[0]))

    def reserve(self, shape: Sequence[int]) -> None:
        """Takes the memory that steps of images [N, C, H, W] need, which the first would take.

        Raises:
            ValueError: a shape that the model cannot take.
            MemoryError: there is not enough.
        """
        with torch.no_grad(), self._prepared.context():
            self._prepared.reserve(shape)

    def of_row(self, x: Tensor, row: int | Tensor, **kwargs: Any) -> Tensor:
        """:meth:`step` in the order of a model's arguments, the row in place of the timestep."""
        return self.step(row, x, **kwargs)

    def _rows(self, row: int, labels: Labels, count: int) -> Sequence[Tensor]:
        time = self._prepared.time
        if not time.joined:
            return time(self._timesteps[row].expand(count), labels)
        return self._table().step(row, labels)

    def _rows_of(self, row: Tensor, labels: Labels, count: int) -> Sequence[Tensor]:
        """Of a tensor of numbers."""
        check_tensor("row", row, self.device)
        if row.dtype != torch.int64:
            raise TypeError(f"row must be int64 where it is a tensor; got {row.dtype}")
        if row.ndim > 1 or row.numel() not in (1, count):
            raise ValueError(f"row must be 0-d or have shape [{count}]; got {list(row.shape)}")
        row = row.reshape(-1)
        if not on_host(row):
            if not len(self):
                raise IndexError("row must lie in a trajectory, and this one has no timesteps")
            if self._prepared.time.joined:
                return self._table().select(row, labels)
            row = row.clamp(0, len(self) - 1)
            return self._prepared.time(self._timesteps.index_select(0, row).expand(count), labels)
        numbers = [self._number(number) for number in row.tolist()]
        if len(numbers) == 1:
            return self._rows(numbers[0], labels, count)
        if not numbers:
            return []  # no images
        return _mixed_rows(self._prepared, [(self, number) for number in numbers], labels)

    def _number(self, row: int) -> int:
        """The number of a row that there is."""
        try:
            row = operator.index(row)
        except TypeError:
            raise TypeError(
                f"row must be an integer, the timestep's place in the trajectory; got {row!r}"
            ) from None
        if not len(self):
            raise IndexError("row must lie in a trajectory, and this one has no timesteps")
        if not 0 <= row < len(self):
            raise IndexError(f"row must lie in 0 … {len(self) - 1}; got {row}")
        return row

    def _table(self) -> TimeTable:
        if self._made is None:
            self._made = self._prepared.time.table(self._timesteps)
        return self._made


Place = tuple[Trajectory, int]


def mixed_step(
    places: Sequence[Place], x: Tensor, class_labels: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """The model's output for samples that are at different steps: sample i at row ``places[i][1]``
    of the trajectory ``places[i][0]``.

    With the native executor (CPU, float32) and the rewrite ``time_table`` each sample has the bits
    that ``trajectory.step(row, …)`` gives it alone, whatever the others are and wherever it stands
    among them. On other devices nothing waits.

    Args:
        places: [N] pairs of a trajectory and a number of a row, the trajectories of one plan.
        x: [N, in_channels, H, W], float, on the plan's device.
        class_labels: int64 [N], as the model takes them.
        kwargs: ``return_dict`` of a UNet2DModel, without a meaning here.

    Raises:
        TypeError: places that are no pairs, or a row that is no number.
        IndexError: there is no such row.
        ValueError: none or another number of places; trajectories of several plans, or of one that
            was prepared again between them.

    >>> config = UNetConfig(image_size=8, channels=(32,), attention_resolutions=())
    >>> plan = prepare(UNet(config).eval())
    >>> long, short = plan.trajectory(range(99, -1, -1)), plan.trajectory([90, 5])
    >>> mixed_step([(long, 70), (short, 1)], torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """
    if not len(places):
        raise ValueError("places must have one pair a sample; got none, which tells no plan")
    checked = [_checked(i, place) for i, place in enumerate(places)]
    prepared = checked[0][0]._prepared
    for i, (trajectory, _) in enumerate(checked):
        if trajectory._prepared is not prepared:
            raise ValueError(
                "places must be of trajectories of one plan, of the same weights; sample "
                f"{i}'s is of another than sample 0's"
            )
    prepared.check_keywords(kwargs)
    with torch.no_grad(), prepared.context():
        x, labels = prepared.inputs(x, class_labels)
        if x.shape[0] != len(checked):
            raise ValueError(f"places must be {x.shape[0]}, one a sample; got {len(checked)}")
        return prepared(x, _mixed_rows(prepared, checked, labels))


def _checked(i: int, place: Place) -> Place:
    if not isinstance(place, Sequence) or len(place) != 2 or not isinstance(place[0], Trajectory):
        raise TypeError(f"places must be pairs of a Trajectory and a row; got {place!r} at {i}")
    return place[0], place[0]._number(place[1])


def _mixed_rows(prepared: Prepared, places: Sequence[Place], labels: Labels) -> Sequence[Tensor]:
    time = prepared.time
    if time.joined:
        return time.mixed([(each._table(), row) for each, row in places], labels)
    return time(torch.cat([each._timesteps[row : row + 1] for each, row in places]), labels)
