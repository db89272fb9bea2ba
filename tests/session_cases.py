"""What the tests of sessions share: models that can be held up, and samples drawn alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ddpm_fast import NoiseSchedule, Sampler

SCHEDULE = NoiseSchedule.linear()
SHAPE = (2, 3, 4)
SECONDS = 60  # after which a test fails rather than hangs


def exact(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
    """A model whose bits depend neither on the batch nor on a place in it: products and sums. Its
    arguments are tensors that are multiplied, [N] or more."""
    out = x * over(0.5 + t.to(x.dtype) / 2048, x)
    for value in kwargs.values():
        out = out * over(value, x) + 0.125
    return out


def over(value: Tensor, x: Tensor) -> Tensor:
    """[N, …] broadcast over the dimensions that it lacks."""
    return value.to(x.dtype).reshape(*value.shape, *[1] * (x.ndim - value.ndim))


class Gated:
    """A model whose calls wait until they are let through."""

    def __init__(self, model: Callable[..., Any] = exact) -> None:
        self.model = model
        self.sizes: list[int] = []  # of the calls' batches
        self.told: list[list[int]] = []
        self._begun, self._permits = threading.Semaphore(0), threading.Semaphore(0)
        self._opened = False

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        self.sizes.append(x.shape[0])
        self.told.append(t.tolist())
        self._begun.release()
        if not self._opened:
            assert self._permits.acquire(timeout=SECONDS)
        return self.model(x, t, **kwargs)

    def reached(self) -> None:
        """Returns when a call has begun that no other call of this method has seen."""
        assert self._begun.acquire(timeout=SECONDS)

    def let(self, count: int = 1) -> None:
        """Lets some calls through, and returns when the next one has begun."""
        for _ in range(count):
            self._permits.release()
            self.reached()

    def open(self) -> None:
        """Lets all through that come."""
        self._opened = True
        self._permits.release(1000)


def wait_for(condition: Callable[[], Any]) -> None:
    """Until it holds."""
    end = time.monotonic() + SECONDS
    while not condition():
        time.sleep(1e-3)
        assert time.monotonic() < end


def gated(num_steps: int = 4, max_batch: int = 4, **arguments: Any):
    """A gate, and a session of its model."""
    gate = Gated()
    sampler = Sampler(gate, SCHEDULE, num_steps=num_steps)
    return gate, sampler.session(SHAPE, max_batch=max_batch, **arguments)


def alone(
    make: Callable[..., Sampler],
    shape: Sequence[int],
    *,
    seed: int = 0,
    sample_id: int = 0,
    num_steps: int | None = None,
    model_kwargs: Any = None,
    uncond_kwargs: Any = None,
    guidance_scale: float | None = None,
) -> Tensor:
    """What ``Session.submit`` is to give for the same arguments, of a sampler made for it."""
    other = {} if num_steps is None else {"num_steps": num_steps, "timesteps": None}
    if guidance_scale is not None:
        other["guidance_scale"] = guidance_scale
    return make(**other).sample(
        [1, *shape],
        seed=seed,
        sample_ids=[sample_id],
        model_kwargs=model_kwargs,
        uncond_kwargs=uncond_kwargs,
    )[0]


def maker(model: Any, **arguments: Any) -> Callable[..., Sampler]:
    """Makes samplers of a model, with some arguments changed."""
    arguments = {"num_steps": 6, **arguments}

    def make(**others: Any) -> Sampler:
        if arguments.get("timesteps") is not None and "timesteps" not in others:
            others = {"num_steps": None, **others}
        return Sampler(model, SCHEDULE, **{**arguments, **others})

    return make


def drawn(session: Any, asked: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Results of a session, in the order of what was asked."""
    handles = [session.submit(**arguments) for arguments in asked]
    return [handle.result(timeout=SECONDS) for handle in handles]
