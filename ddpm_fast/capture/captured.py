"""One step of a Sampler, recorded once and played at every row, for any state, seeds and ids.

What a step reads lies in buffers: the state, the row, seeds, ids, the guidance scale and the
tensors of the model's arguments. The row counts itself; coefficients, noise addresses and timesteps
are looked up by it on the device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..callers import warn_caller
from ..model import Model, call_model
from ..sampling import Run, SampleStep
from ..stepping import NO_NAN
from .key import Key, UnsuitedError, holders_of, key_of, tensors_of, with_tensors
from .layout import distinct, room_for, same_bits
from .recorder import Recorder
from .rehearsal import WATCHES_AT_FIRST, Rehearsal, UncapturableError

# Steps that are taken before one is captured, the last of them watched: cuBLAS's and cuDNN's
# memory, compiled kernels and choices by timing have to be there.
WARM_UPS = 3


class CapturedStep:
    """A step captured for one trajectory's arguments, for all that have the same key.

    Args:
        run: the trajectory. It stays as it was.
        key: its.
        every_state: x̂₀ is wanted.
        steps: how many a recording holds; a second one of a single step takes the rest.
        recorder: of the device.

    It is warmed up, then recorded, then compared, and each may raise what the step raises.
    """

    def __init__(
        self, run: Run, key: Key, every_state: bool, steps: int, recorder: Recorder
    ) -> None:
        self.key, self.every_state, self.steps = key, every_state, steps
        self.lock = threading.Lock()  # of the buffers: a trajectory at a time
        self._recorder = recorder
        self._allocate(run)
        self._keeps: list[object] = [run.plan, run.table]  # what the graph has addresses of

    def _allocate(self, run: Run) -> None:
        x, count = run.x, run.x.shape[0]
        scale = run.sampler.guidance_scale

        def numbers(shape: list[int], dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=x.device)

        with torch.inference_mode(False):  # whoever samples next may not be in that mode
            self.x = torch.empty_like(x)
            self.lowp = None
            if run.low_precision is not None:
                self.lowp = torch.empty_like(x, dtype=run.low_precision)
            self.row, self.nan_step = numbers([1], torch.int64), numbers([1], torch.int32)
            self.seeds, self.ids = numbers([count], torch.int64), numbers([count], torch.int64)
            self.scale = None
            if scale is not None:
                ndim = scale.ndim if isinstance(scale, Tensor) else 0
                self.scale = numbers([count] * ndim, torch.float32)
            told = run.model_timesteps
            self._told = torch.tensor(told, dtype=run.t_dtype).to(x.device)
            self._inputs = [room_for(tensor) for tensor in _given(run)]
            self._written = [distinct(buffer) for buffer in self._inputs]
        buffers = iter(self._inputs)
        self.kwargs = with_tensors(run.model_kwargs, buffers)
        self.uncond_kwargs = with_tensors(run.uncond_kwargs, buffers)

    def warm_up(self, run: Run) -> None:
        """Takes some steps on the buffers.

        Raises:
            UncapturableError: the step changes what it did not make, which is as it was again.
        """

        def warm() -> None:
            self._load(run, run.x, run.rows.start)
            self._step(run, run.model)

        # A plan is known to change nothing; what compiles had better not begin to under a mode
        if self.key.opaque and WATCHES_AT_FIRST and not is_compiled(run.sampler.model):
            self._watched(run, Rehearsal(run.x.device, self._own(), self._inputs, strict=False))
        for _ in range(WARM_UPS - 1):
            self._recorder.aside(warm)
        self._look_at_arguments(run)

    def record(self, run: Run) -> None:
        """Records it, after a last one that is watched.

        Raises:
            UncapturableError: an operation that no graph can hold.
        """
        # The last: what is compiled or made to stay is there, and seen as such
        rehearsal = Rehearsal(run.x.device, self._own(), self._inputs)
        self._watched(run, rehearsal)
        self._look_at_arguments(run)
        if rehearsal.keeps():
            raise UncapturableError(
                "a tensor that is made in it is kept (by a hook, say, that collects one a step)"
            )
        # Whoever holds it now may drop it, as a model does its tables for another size
        self._keeps.append(rehearsal.read())
        self._record(run)

    def _own(self) -> list[Tensor]:
        """What the steps themselves write to."""
        own = [self.x, self.lowp, self.row, self.nan_step, self.seeds, self.ids, self.scale]
        return [tensor for tensor in own if tensor is not None]

    def _watched(self, run: Run, rehearsal: Rehearsal) -> None:
        def rehearse() -> None:
            self._load(run, run.x, run.rows.start)
            try:
                with rehearsal:
                    self._step(run, run.model)
            finally:
                self.x0 = self.x  # which was there before
                rehearsal.undo()

        try:
            self._recorder.aside(rehearse)
        except Exception as error:
            if not rehearsal.hindrance or isinstance(error, UncapturableError):
                raise
        if rehearsal.hindrance:  # and the model went another way then
            raise UncapturableError(rehearsal.hindrance)

    def _look_at_arguments(self, run: Run) -> None:
        """After a step, for what no rehearsal sees: kernels that a model launches itself."""
        for buffer, tensor in zip(self._written, _given(run), strict=True):
            if not same_bits(buffer, distinct(tensor)):
                raise UncapturableError("the model writes to a tensor among its arguments")

    def _record(self, run: Run) -> None:
        self._load(run, run.x, run.rows.start)
        outputs: list[Tensor] = []
        model = _noting(run, outputs)
        self._one = self._recorder.record(lambda: self._step(run, model))
        self._outputs = outputs
        self._many = None
        if 1 < self.steps <= len(run.rows) and not self.every_state:

            def several() -> None:
                for _ in range(self.steps):
                    self._step(run, run.model)

            self._many = self._recorder.record(several)

    def _step(self, run: Run, model: Model) -> None:
        """One on the buffers, of which the host reads nothing."""
        row = self.row.view(())
        t = row
        if run.plan is None:
            t = self._told.index_select(0, self.row.expand(self.x.shape[0]))
        first = run.rows.start
        result = run.stepper(
            self.x,
            row,
            model,
            t,
            seed=self.seeds,
            sample_ids=self.ids,
            kwargs=self.kwargs,
            uncond_kwargs=self.uncond_kwargs,
            guidance_scale=self.scale,
            out=self.x,
            out_lowp=self.lowp,
            return_x0=self.every_state,
            nan_step=self.nan_step,
            where=f"at step {first}, t = {run.timesteps[first]}",
        )
        if isinstance(result, tuple):
            self.x0 = result[1]
        self.row.add_(1)

    def fits(self, run: Run) -> bool:
        """Whether the first step of a trajectory is the captured one. Only a look can tell, where
        what the model reads may have changed without a trace."""
        return not self.key.opaque or self._agrees(run, run.rows.start, run.x)

    def compare(self, run: Run) -> None:
        """At two rows and two states, to the bit: a model that counts its calls may differ by as
        little as rounding does.

        Raises:
            UncapturableError: the graph does not what the step does.
        """
        first, last = run.rows.start, run.rows.stop - 1
        if self._agrees(run, first, run.x):
            row = min(first + (last - first + 1) // 2, last)
            if self._agrees(run, row, self.x.clone()):
                return
        raise UncapturableError(
            "what the model returns depends on more than its arguments and weights (it counts its "
            "calls, keeps results of earlier ones, or draws random numbers)"
        )

    def _agrees(self, run: Run, row: int, x: Tensor) -> bool:
        """Whether a replay at a row, from a state, has the bits of the step itself."""
        self._load(run, x, row)
        expected = self._plainly(run, row)
        self._one.replay()
        found = [self.x, *self._outputs]
        found += [self.lowp] if self.lowp is not None else []
        found += [self.x0] if self.every_state else []
        return all(map(same_bits, found, expected))

    def _plainly(self, run: Run, row: int) -> list[Tensor]:
        """What the loop without a graph makes of the state in the buffers."""
        x, lowp = self.x.clone(), None if self.lowp is None else self.lowp.clone()
        outputs: list[Tensor] = []
        result = run.stepper(
            x,
            row,
            _noting(run, outputs),
            run.told(row),
            seed=run.seed,
            sample_ids=run.sample_ids,
            kwargs=self.kwargs,
            uncond_kwargs=self.uncond_kwargs,
            guidance_scale=run.sampler.guidance_scale,
            out=x,
            out_lowp=lowp,
            return_x0=self.every_state,
            nan_step=torch.full_like(self.nan_step, NO_NAN),
            where=f"at step {row}, t = {run.timesteps[row]}",
        )
        # A model that turns out to return one buffer is called twice as often, the first time
        found = [x, *outputs[-len(self._outputs) :]]
        found += [lowp] if lowp is not None else []
        found += [result[1]] if isinstance(result, tuple) else []
        return found

    def play(self, run: Run) -> Iterator[SampleStep]:
        """Takes a trajectory's steps, as Run.steps yields them, from ``run.row`` on; not to the end
        where who got a state changed what is captured."""
        first, end = run.row, run.rows.stop
        self._looked, self._holders = first, holders_of(run)
        self._load(run, run.x, first)
        while run.row < end:
            if self.every_state and run.row > first:
                if not self._is_as_it_was(run, first):
                    return
            elif self._many is not None and end - run.row >= self.steps:
                self._many.replay()
                run.row += self.steps - 1
            else:
                self._one.replay()
            run.row += 1
            x = x0 = self.x
            if self.every_state or run.row == end:
                run.x = x = self.x.clone()
                x0 = self.x0.clone() if self.every_state else x
                run.nan_step.copy_(self.nan_step)
            yield SampleStep(run.row - 1, run.timesteps[run.row - 1], x, x0)

    def _is_as_it_was(self, run: Run, first: int) -> bool:
        """Takes a step from a state that somebody got, who may have changed it, and other things:
        not where these are captured. What leaves no trace is looked for at the second step, the
        third, the fifth, … and the last."""
        with contextlib.suppress(UnsuitedError):
            if key_of(run, self.every_state, self.steps, self._holders) == self.key:
                done = run.row - first
                if not self.key.opaque or (done & (done - 1) and run.row != run.rows.stop - 1):
                    self._load(run, run.x, run.row)
                    self._one.replay()
                    return True
                before, self._looked = self._looked, run.row
                if self._agrees(run, run.row, run.x):
                    return True
                if run.row - before > 1:
                    warn_caller(
                        "the model has changed while a trajectory was under way: steps before step "
                        f"{run.row} may have been taken by it as it was at the beginning; "
                        'graph="off" is for models that are changed between steps'
                    )
        return False

    def _load(self, run: Run, x: Tensor, row: int) -> None:
        self._queue = self._recorder.queue()  # that the next replays join
        self.x.copy_(x)
        if self.lowp is not None:
            self.lowp.copy_(x)
        self.row.fill_(row)
        self.nan_step.copy_(run.nan_step)
        if isinstance(run.seed, Tensor):
            self.seeds.copy_(run.seed)
        else:
            seed = int(run.seed)
            self.seeds.fill_(seed - (1 << 64) if seed >= 1 << 63 else seed)
        if run.sample_ids is None:
            torch.arange(len(self.ids), out=self.ids)
        else:
            self.ids.copy_(run.sample_ids)
        scale = run.sampler.guidance_scale
        if self.scale is not None and isinstance(scale, Tensor):
            self.scale.copy_(scale)
        elif self.scale is not None and scale is not None:
            self.scale.fill_(scale)
        for buffer, tensor in zip(self._written, _given(run), strict=True):
            buffer.copy_(distinct(tensor))

    def release(self) -> None:
        """Gives the buffers to the next trajectory, perhaps on another stream; perhaps from another
        thread, where who left a stream is cleaned up."""
        try:
            self._recorder.mark(self._queue).synchronize()
        finally:
            self.lock.release()


def _given(run: Run) -> list[Tensor]:
    """The tensors of the model's arguments."""
    return [*tensors_of(run.model_kwargs), *tensors_of(run.uncond_kwargs)]


def is_compiled(model: object) -> bool:
    """Whether it, or a part of it, is seen to be of torch.compile."""
    parts = model.modules() if isinstance(model, nn.Module) else [model]
    return any(
        hasattr(part, "_orig_mod")
        or hasattr(part, "_torchdynamo_orig_callable")
        or getattr(part, "_compiled_call_impl", None) is not None
        for part in parts
    )


def _noting(run: Run, outputs: list[Tensor]) -> Model:
    """The model, whose outputs are noted."""

    def model(x: Tensor, t: Any, **kwargs: Any) -> Tensor:
        outputs.append(call_model(run.model, x, t, kwargs, run.stepper.halves))
        return outputs[-1]

    return model
