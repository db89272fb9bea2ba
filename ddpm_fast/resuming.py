"""A call of Sampler.sample whose state is kept in a folder, for another process to go on from."""

from __future__ import annotations

import contextlib
import os
import warnings
from types import TracebackType

import torch
from torch import Tensor

from .fingerprints import tensor_text, value_text
from .ops.checks import is_channels_last, laid_out
from .sample_state import arithmetic, check_same, described
from .sampling import Run
from .schedule import integer
from .states import StateFolder

KIND = "sample"


class Keeper:
    """Saves the states of a trajectory, and sets it to the state that was saved.

    While entered, it holds the folder, unless the call is done already; tell it of each step by
    :meth:`after`. It keeps a copy of the last state: one that an exception leaves half changed is
    not saved.

    Args:
        folder: of the call's state, made where it does not exist.
        every: steps from one save to the next.
        run: the call, before its first step. Where the folder holds a state of the same call, its
            ``x``, ``row`` and ``rows`` are set to it.
        given: whether its x_T was given.

    Raises:
        TypeError: an argument of the model's that cannot be told from another in another process;
            weights that are not there.
        ReferenceError: a plan whose model is gone.
        ValueError: the folder holds the state of another call, and in what they differ, or
            something else.
        InUseError: another process, or another call in this one, goes on from it.
        OSError: it cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int, run: Run, given: bool) -> None:
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"checkpoint must be the path of a folder; got {folder!r}")
        self._every = integer("checkpoint_every", every)
        if self._every < 1:
            raise ValueError(f"checkpoint_every must be at least 1; got {every}")
        self._states, self._run, self._call = StateFolder(folder, KIND), run, call_of(run, given)
        self._rows = run.rows
        self._kept: tuple[int, Tensor] | None = None  # the next row and its state
        self._saved = -1  # the row of the state in the folder
        self._writing = False

    def __enter__(self) -> Keeper:
        self._take_up()
        if self._run.rows:  # else nothing is written: any number of processes may read the result
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._states)
                self._take_up()  # again: whoever held the folder may have gone on
                if self._run.rows:  # to be told now, not after many steps, of what cannot be done
                    self._write(self._run.rows.start, self._run.x)
                stack.pop_all()
        return self

    def _take_up(self) -> None:
        found = self._states.read()
        if found is None:
            return
        description, tensors = found
        check_same(self._states.path, description["call"], self._call)
        x = self._run.x
        channels_last = is_channels_last(x) and not x.is_contiguous()
        self._run.x = laid_out(tensors["x"], channels_last).to(x.device)
        self._saved = description["row"]
        self._run.row = self._saved
        self._run.rows = range(self._saved, self._rows.stop)

    def after(self, row: int, x: Tensor) -> None:
        """A step was taken: x is the state that ``row`` is the next of."""
        self._kept = row, x.clone()  # at once: an interrupt comes before or after
        if row // self._every > self._saved // self._every and row < self._rows.stop:
            self._save()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._save()
            elif not (self._writing and isinstance(error, Exception)):
                self._save_in_spite_of_an_error()
        finally:
            self._states.__exit__(kind, error, traceback)

    def _save(self) -> None:
        """The last state that is there, unless it is saved."""
        if self._kept is not None and self._kept[0] != self._saved:
            self._write(*self._kept)

    def _save_in_spite_of_an_error(self) -> None:
        """Nothing that goes wrong, a second Ctrl-C included, takes the place of the error."""
        try:
            self._save()
        except BaseException as second:
            with contextlib.suppress(Warning):
                warnings.warn(
                    f"the state could not be saved in {self._states.path}, which holds that before "
                    f"step {self._saved}: {second!r}",
                    stacklevel=4,
                )

    def _write(self, row: int, x: Tensor) -> None:
        if bool(x.isnan().any()):  # on a GPU the loop tells of it at its end
            return
        self._writing = True
        self._states.write({"row": row, "call": self._call}, {"x": x})
        self._saved, self._writing = row, False


def call_of(run: Run, given: bool) -> dict[str, str]:
    """All that the bits of a call's result depend on, as far as it has a value, by name."""
    x = run.x
    call = {
        "shape": str(list(x.shape)),
        "seed": _seed(run.seed),
        "sample_ids": _ids(run.sample_ids, x.shape[0]),
        "x_T": f"{tensor_text(x, 'x_T')}{_layout(x)}" if given else "None",
        "start": str(run.rows.start),
        **described(run.sampler),
        **arithmetic(run.sampler, x.device, run.low_precision, run.plan),
    }
    for name, kwargs in (("model_kwargs", run.model_kwargs), ("uncond_kwargs", run.uncond_kwargs)):
        for key, value in (kwargs or {}).items():
            call[f"{name}[{key!r}]"] = value_text(value, f"{name}[{key!r}]")
    return call


def _seed(seed: int | Tensor) -> str:
    """One for all is the same however it was given."""
    if not isinstance(seed, Tensor):
        return str(int(seed))
    if seed.numel() and bool((seed == seed.reshape(-1)[0]).all()):
        return str(int(seed.reshape(-1)[0]) % (1 << 64))  # two's complement
    return value_text(seed, "seed")


def _ids(ids: Tensor | None, count: int) -> str:
    """By what they are, however they were given."""
    ids = torch.arange(count) if ids is None else ids.cpu()
    if ids.equal(torch.arange(count)):
        return f"0 … {count - 1}" if count else "none"
    return value_text(ids, "sample_ids")


def _layout(x: Tensor) -> str:
    """Sums over channels depend on it."""
    return "" if x.is_contiguous() else ", channels_last"
