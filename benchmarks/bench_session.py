"""In-flight batching against a batch at a time, under Poisson arrivals: the network of the digits
preset, classes, DDIM. And what a session itself takes of a step."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from correctness import agree
from results import OURS
from torch import Tensor

from ddpm_fast import Sampler, UNet
from ddpm_fast.training.presets import completed, preset

FULL = pytest.mark.full
SHAPE = [1, 8, 8]
SAMPLE = torch.empty(1, *SHAPE, device="meta")
MAX_BATCH = 32
STEPS = {"of 10 to 100 steps": (10, 20, 50, 100), "of 50 steps": (50,)}
LOADS = (0.4, 0.8)  # of what full batches could do
BATCH = "a batch at a time"
DEVIATION = 1e-4
AT_ONCE = 4  # calls of each candidate in turn


@pytest.fixture(scope="module")
def sampler(device: torch.device) -> Sampler:
    config = completed({"data": {"path": "digits"}, **preset("digits")}, (1, 8, 8), 10)
    torch.manual_seed(0)
    model = UNet(config.unet).eval().to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return Sampler(model, config.build_schedule(), method="ddim", num_steps=50)


@dataclass(frozen=True)
class Arrival:
    """What is asked for, seconds after the beginning."""

    after: float
    sample_id: int
    num_steps: int


def classes(ids: Iterable[int], device: torch.device) -> dict[str, Tensor]:
    return {"class_labels": torch.tensor([i % 10 for i in ids], device=device)}


def device_of(sampler: Sampler) -> torch.device:
    return sampler.model.conv_in.weight.device


def arrivals(rate: float, count: int, steps: tuple[int, ...], seed: int) -> list[Arrival]:
    """A Poisson process."""
    generator = torch.Generator().manual_seed(seed)
    after = (torch.empty(count).exponential_(rate, generator=generator)).cumsum(0).tolist()
    which = torch.randint(len(steps), (count,), generator=generator).tolist()
    return [Arrival(after[i], i, steps[which[i]]) for i in range(count)]


class BatchAtATime:
    """The server that people write: what waits when a batch is done is the next batch, the oldest
    and those of as many steps."""

    def __init__(self, sampler: Sampler) -> None:
        self._device = device_of(sampler)
        self._samplers = {
            count: Sampler(
                sampler.model,
                sampler.schedule,
                method="ddim",
                num_steps=count,
                plan=sampler._planner._plan_of(sampler.model),
            )
            for count in {count for steps in STEPS.values() for count in steps}
        }
        self._waiting: list[tuple[Arrival, Future[Tensor]]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def submit(self, arrival: Arrival) -> Future[Tensor]:
        future: Future[Tensor] = Future()
        with self._changed:
            self._waiting.append((arrival, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closed:
                        return
                    self._changed.wait()
                count = self._waiting[0][0].num_steps
                batch = [each for each in self._waiting if each[0].num_steps == count][:MAX_BATCH]
                for each in batch:
                    self._waiting.remove(each)
            ids = [arrival.sample_id for arrival, _ in batch]
            images = self._samplers[count].sample(
                [len(batch), *SHAPE], sample_ids=ids, model_kwargs=classes(ids, self._device)
            )
            if images.is_cuda:
                torch.cuda.synchronize()  # a result is there when it can be read
            for (_, future), image in zip(batch, images, strict=True):
                future.set_result(image)


class InFlight:
    """A session."""

    def __init__(self, sampler: Sampler) -> None:
        self._device = device_of(sampler)
        self._session = sampler.session(SHAPE, max_batch=MAX_BATCH, max_waiting=1 << 20)

    def submit(self, arrival: Arrival) -> Future[Tensor]:
        return self._session.submit(
            sample_id=arrival.sample_id,
            num_steps=arrival.num_steps,
            model_kwargs=classes([arrival.sample_id], self._device),
        )

    def close(self) -> None:
        self._session.close()


@dataclass(frozen=True)
class Served:
    """Seconds that each waited, seconds from the first arrival to the last result, the results."""

    latencies: list[float]
    seconds: float
    images: list[Tensor]

    def latency(self, quantile: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[math.ceil(quantile * len(ordered)) - 1]


def served(server: Any, asked: list[Arrival]) -> Served:
    ends = [0.0] * len(asked)
    futures = []

    def ended(i: int) -> Callable[[Future[Tensor]], None]:
        return lambda _: ends.__setitem__(i, time.perf_counter())

    begin = time.perf_counter()
    for i, arrival in enumerate(asked):
        wait = begin + arrival.after - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        future = server.submit(arrival)
        future.add_done_callback(ended(i))
        futures.append(future)
    images = [future.result() for future in futures]
    server.close()
    latencies = [end - begin - arrival.after for end, arrival in zip(ends, asked, strict=True)]
    return Served(latencies, max(ends) - begin, images)


@pytest.fixture(scope="module")
def full(sampler: Sampler) -> dict[str, float]:
    """Samples a second in full batches, by their steps."""
    return {kind: capacity(sampler, steps) for kind, steps in STEPS.items()}


def capacity(sampler: Sampler, steps: tuple[int, ...]) -> float:
    """Samples a second in full batches."""
    labels = classes(range(MAX_BATCH), device_of(sampler))
    shape = [MAX_BATCH, *SHAPE]
    sampler.sample(shape, model_kwargs=labels)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        sampler.sample(shape, model_kwargs=labels)
        times.append((time.perf_counter() - start) / len(sampler))
    return MAX_BATCH / (statistics.median(times) * statistics.mean(steps))


@pytest.mark.full
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("load", LOADS)
def bench_arrivals(record, sampler, full, kind, load):
    rate = load * full[kind]
    count = max(int(rate * 8.0), 20)
    asked = arrivals(rate, count, STEPS[kind], seed=int(100 * load))
    rounds: dict[str, list[Served]] = {OURS: [], BATCH: []}
    for _ in range(3):
        for name, server in ((OURS, InFlight), (BATCH, BatchAtATime)):
            rounds[name].append(served(server(sampler), asked))
    case = f"samples {kind}, load {load:.0%}, median latency"
    with record.checking(case, SAMPLE):  # the same samples
        agree("samples", rounds[OURS][0].images, rounds[BATCH][0].images, atol=DEVIATION)
    record(
        case,
        SAMPLE,
        [
            {name: each.latency(0.5) for name, each in zip(rounds, pair, strict=True)}
            for pair in zip(*rounds.values(), strict=True)
        ],
        arrivals_per_second=round(rate, 1),
        p95_milliseconds={
            name: round(1e3 * statistics.median(r.latency(0.95) for r in each), 2)
            for name, each in rounds.items()
        },
        samples_per_second={
            name: round(statistics.median(count / r.seconds for r in each), 1)
            for name, each in rounds.items()
        },
    )


@pytest.mark.parametrize("count", [pytest.param(1, marks=FULL), 8, pytest.param(32, marks=FULL)])
def bench_overhead(record, sampler, device, count, quick):
    """A step of ``count`` samples at a time: of a session's, all of whose costs it bears, and of
    ``sample``'s."""
    labels = [classes([i], device) for i in range(count)]
    together = classes(range(count), device)
    session = sampler.session(SHAPE, max_batch=count)

    def in_session() -> Tensor:
        handles = [session.submit(sample_id=i, model_kwargs=labels[i]) for i in range(count)]
        return torch.stack([handle.result() for handle in handles])

    def alone() -> Tensor:
        return sampler.sample([count, *SHAPE], model_kwargs=together)

    state = torch.empty(count, *SHAPE, device="meta")
    case = f"a step in a session, batch {count}"
    with record.checking(case, state):
        agree(OURS, in_session(), alone(), atol=DEVIATION)
    rounds = []
    deadline = time.perf_counter() + (1.0 if quick else 5.0)
    while time.perf_counter() < deadline or len(rounds) < 5:
        times = {}
        for name, call in {OURS: in_session, "sample": alone}.items():
            time.sleep(0.1)  # by then the other's thread has let its OpenMP threads go
            call()
            start = time.perf_counter()
            for _ in range(AT_ONCE):
                call()
            times[name] = (time.perf_counter() - start) / (AT_ONCE * len(sampler))
        rounds.append(times)
    session.close()
    record(case, state, rounds)
