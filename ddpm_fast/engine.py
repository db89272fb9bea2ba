"""The plan of a UNet: the same function, prepared once for being computed often.

A plan computes what the model computes, up to rounding, by other operations and from weights laid
out for them. docs/plan.md tells what it does and when it is made again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from .backends import chosen, use_backend
from .nn import inspection
from .nn.memory import within_memory
from .nn.prepared import Prepared
from .nn.rewrites import REWRITES, check_dtype, names
from .nn.snapshot import Snapshot
from .nn.trajectory import Trajectory, mixed_step

__all__ = ["REWRITES", "Plan", "Trajectory", "mixed_step", "prepare"]


def prepare(
    model: nn.Module,
    *,
    rewrites: Literal["all"] | Iterable[str] = "all",
    without: Iterable[str] = (),
    dtype: torch.dtype | None = None,
) -> Plan:
    """The plan of a UNet, for inference: no gradients flow through it.

    The model stays as it is, and its weights are shared where their layout allows. The plan does
    not keep it alive, and outlives it.

    Args:
        model: a :class:`UNet`, or a UNet2DModel of diffusers', in eval mode, float32, bfloat16 or
            float16, on any device.
        rewrites: names among REWRITES. What means nothing on the model's device is passed over;
            ``Plan.rewrites`` tells which are in effect.
        without: names to leave out.
        dtype: of weights, images and output; the model's if None.

    Raises:
        TypeError: a model of another class, a subclass, say.
        ValueError: a name that is none; a model in training mode, or with anything that the plan
            would leave out (hooks, parametrisations, modules of other classes, options without an
            equivalent), by name; weights offloaded, quantised, of several dtypes or devices.
        MemoryError: there was not enough; the model is untouched and nothing is kept.

    >>> config = UNetConfig(image_size=8, channels=(32,), attention_resolutions=())
    >>> plan = prepare(UNet(config).eval())
    >>> plan(torch.zeros(2, 3, 8, 8), torch.tensor([7, 7])).shape
    torch.Size([2, 3, 8, 8])
    """
    if dtype is not None:
        check_dtype(dtype)
    return Plan(model, names(rewrites) - names(without), dtype)


class Plan:
    """A UNet prepared for sampling by :func:`prepare`; called like the model, from any thread.

    Each call, and each :meth:`trajectory`, first compares the model's parameters with what was
    prepared, by identity, address and version, and a trajectory some of their values, too: if one
    was changed, all is prepared again, for the backend that it was first prepared under.

    Raises:
        TypeError, ValueError: what the model cannot take; and, when it was changed, whatever
            ``prepare`` raises.
        MemoryError: there is not enough for images of a shape.
    """

    def __init__(
        self, model: nn.Module, rewrites: frozenset[str], dtype: torch.dtype | None
    ) -> None:
        self._asked, self._asked_dtype, self._backend = rewrites, dtype, chosen()
        self._lock = threading.RLock()
        self._prepared: Prepared | None = None
        self._snapshot: Snapshot | None = None
        self._prepare(model)
        self._model = weakref.ref(model, self._forget)

    def __call__(
        self, x: Tensor, t: Tensor | float, class_labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The model's output for a batch, [N, out_channels, H, W] in the plan's dtype.

        Args:
            x: [N, in_channels, H, W], float, on the plan's device.
            t: int64 or float, [N], [1] or a number.
            class_labels: int64 [N], as the model takes them.
            kwargs: ``return_dict`` of a UNet2DModel, without a meaning here.
        """
        prepared = self._current()
        prepared.check_keywords(kwargs)
        with torch.no_grad(), prepared.context():
            x, labels = prepared.inputs(x, class_labels)
            return prepared(x, prepared.time(prepared.timesteps(t, x.shape[0]), labels))

    def trajectory(self, timesteps: Tensor | Sequence[float]) -> Trajectory:
        """The plan at given timesteps, which all samples share; of the weights as they are now, by
        a look at some of their values.

        Args:
            timesteps: [S], integers or floats.
        """
        return Trajectory(self._current(look=True), timesteps)

    def refresh(self) -> None:
        """Prepares again from the model's current weights, after a change that cannot be seen: of
        single elements through ``.data``, say, or before a call that is of no trajectory.

        Raises:
            ReferenceError: the model is gone.
            ValueError, MemoryError: as ``prepare``.
        """
        with self._lock:
            model = self._model()
            if model is None:
                raise ReferenceError("the model that the plan was prepared from is gone")
            self._prepare(model)

    @property
    def stale(self) -> bool:
        """Whether the model was changed, so that the next call will prepare it again or refuse;
        without a look at values."""
        model, snapshot = self._model(), self._snapshot
        return model is not None and (snapshot is None or not snapshot.is_of(model))

    @property
    def rewrites(self) -> tuple[str, ...]:
        """The names in effect, in the order of REWRITES."""
        return tuple(name for name in REWRITES if name in self._current().rewrites)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, images and output."""
        return self._current().dtype

    @property
    def device(self) -> torch.device:
        """Where weights and images lie."""
        return self._current().device

    @property
    def backend(self) -> str:
        """That it was prepared under, perhaps "auto"."""
        return self._backend

    def is_of(self, model: object) -> bool:
        """Whether it was prepared from this object."""
        return self._model() is model

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Plan can be neither copied nor pickled: prepare one from the copied model, or give "
            "the Sampler that is copied the names of its rewrites, plan=plan.rewrites"
        )

    def _current(self, look: bool = False) -> Prepared:
        """Of the model as it is; ``look``: at values, too."""
        with self._lock:
            snapshot = self._snapshot  # none of a model that is gone: then nothing can change
            unseen = look and snapshot is not None and not self.stale and not snapshot.has_values()
            if unseen or self.stale or self._prepared is None:
                self.refresh()
            assert self._prepared is not None
            return self._prepared

    def _prepare(self, model: nn.Module) -> None:
        inspection.inspect(model)
        self._prepared = self._snapshot = None  # first: two need more memory than one
        snapshot = Snapshot(model)
        with use_backend(self._backend):
            self._prepared = within_memory(
                "a plan of the model, which is untouched",
                Prepared,
                model,
                self._asked,
                self._asked_dtype,
            )
        self._snapshot = snapshot

    def _forget(self, _: object) -> None:
        """What the model alone kept alive is not kept by its plan."""
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is not None:
            snapshot.forget()
