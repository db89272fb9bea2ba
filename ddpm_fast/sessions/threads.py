"""What a thread inherits from the one that it works for: torch keeps it by thread."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from ..backends import native

_T = TypeVar("_T")


class Settings:
    """The caller's context variables, autocast and default device, and the work's device, for
    another thread.

    Args:
        device: of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, kind = device, device.type
        self._variables = contextvars.copy_context()
        self._default_device = torch.get_default_device()
        self._autocast: dict[str, Any] | None = None
        if _has_autocast(kind):
            self._autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind)}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """No gradients; on a GPU, its default stream."""
        for variable, value in self._variables.items():
            variable.set(value)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self._autocast is not None:
                stack.enter_context(torch.autocast(**self._autocast))
            elif _has_autocast(self._device.type):
                stack.enter_context(torch.autocast(self._device.type, enabled=False))
            if self._default_device != torch.get_default_device():
                stack.enter_context(self._default_device)
            if self._device.type == "cuda":
                stack.enter_context(torch.cuda.device(self._device))
                stack.enter_context(torch.cuda.stream(torch.cuda.default_stream(self._device)))
            yield

    def run(self, function: Callable[[], _T]) -> _T:
        """What it returns under these settings, in the calling thread, which keeps its own."""

        def applied() -> _T:
            with self.applied():
                return function()

        return contextvars.copy_context().run(applied)

    def event(self) -> Any:
        """Behind which the caller's tensors are ready, where that is not the order of the default
        stream."""
        if self._device.type != "cuda":
            return None
        stream = torch.cuda.current_stream(self._device)
        if stream == torch.cuda.default_stream(self._device):
            return None
        return stream.record_event()


def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def release_threads() -> None:
    """Ends the threads that OpenMP keeps for the calling one, which is about to let another work:
    while both have some, each parallel loop of either waits for the operating system
    (csrc/cpu/threads.cpp)."""
    if native is not None:
        native.release_threads()
