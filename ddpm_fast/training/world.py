"""The processes of a run: who this one is, and what they tell each other beside the gradients."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import FailedElsewhere, RunError

_T = TypeVar("_T")


class World:
    """One process, or those that torchrun started.

    Attributes:
        rank, size: this process's number, and how many there are.
        device: that it computes on.
    """

    def __init__(self, device: str | None = None) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
        self._hosts: Any = None
        if self.size > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            try:
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
                # Messages between hosts wait for no GPU.
                self._hosts = dist.new_group(backend="gloo")
            except (RuntimeError, ValueError) as error:
                raise RunError(
                    f"process {self.rank} of {self.size} cannot reach the others (start them with "
                    f"torchrun): {first_line(error)}"
                ) from error

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and talks."""
        return self.rank == 0

    def share(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns in the first process, for all.

        Raises:
            Exception: what it raises, in the first process; FailedElsewhere in the others.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None]
        failure: BaseException | None = None
        if self.first:
            try:
                outcome = [(True, work())]
            except BaseException as error:
                failure = error
                outcome = [(False, getattr(error, "status", 1))]
        self._with_peers(lambda: dist.broadcast_object_list(outcome, 0, group=self._hosts))
        if failure is not None:
            raise failure
        succeeded, result = outcome[0]
        if not succeeded:
            raise FailedElsewhere("the first process has failed", result)
        shared: _T = result
        return shared

    def together(self, work: Callable[[], _T]) -> _T:
        """What ``work``, which all processes do, returns in this one, if it succeeds in all.

        Raises:
            Exception: what it raises, in the first process that it fails in; FailedElsewhere in the
                others.
        """
        if self.size == 1:
            return work()
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        mine = [float(failure is not None and rank == self.rank) for rank in range(self.size)]
        failed = self.totals(mine)
        if any(failed):
            if failure is not None and failed.index(1) == self.rank:
                raise failure
            raise FailedElsewhere("another process has failed", getattr(failure, "status", 1))
        return result

    def totals(self, values: Sequence[float]) -> list[float]:
        """The sums of the processes' numbers, the same bits in each."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        self._with_peers(lambda: dist.all_reduce(numbers, group=self._hosts))
        result: list[float] = numbers.tolist()
        return result

    def close(self) -> None:
        """Leaves the group when all have come to it. Not after a failure: they would not come."""
        if self.size > 1 and dist.is_initialized():
            self.totals([0.0])
            dist.destroy_process_group()

    def _with_peers(self, work: Callable[[], object]) -> None:
        try:
            work()
        except RuntimeError as error:
            raise FailedElsewhere(f"lost the other processes: {first_line(error)}") from error


def leave(status: int) -> None:
    """Ends one of several processes without the interpreter's own end, at which a thread of gloo's
    now and then aborts it: 3 of some 25 runs with fsdp, torch 2.13. For one process, nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def lost_peers(error: BaseException) -> bool:
    """Whether an error of torch's says that another process is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
    )


def _device(name: str | None, local_rank: int) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RunError(f"device must be cpu or cuda; got {name!r}", 2) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RunError(f"device {name} is not there: torch sees no GPU", 2)
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise RunError(f"{device} is not there: torch sees {torch.cuda.device_count()} GPUs", 2)
    elif device.type != "cpu":
        raise RunError(f"device must be cpu or cuda; got {name!r}", 2)
    return device


def first_line(error: BaseException) -> str:
    """Of an error's text, without gloo's guess at why a process is gone."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line.partition("This is typically")[0].rstrip(" .")
