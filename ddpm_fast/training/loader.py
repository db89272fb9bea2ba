"""Batches of a data set by position, read ahead by worker processes."""

from __future__ import annotations

import atexit
import gc
import signal
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .dataset import ImageData
from .images import UnreadableImage
from .order import flips_at, images_at

# Ctrl-C and a batch system's end reach the whole process group, and the caller's reading goes on
# until it decides otherwise.
_TO_THE_GROUP = (signal.SIGINT, signal.SIGTERM)
_iterations: weakref.WeakSet[Any] = weakref.WeakSet()  # whose workers may be running


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of a run.

    Attributes:
        images: uint8 [N, C, H, W], mirrored where the flips say so.
        labels: int64 [N], or None.
        sample_ids: int64 [N], their positions.
    """

    images: Tensor
    labels: Tensor | None
    sample_ids: Tensor

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which copies to a GPU need not be waited for."""
        labels = None if self.labels is None else self.labels.pin_memory()
        return Batch(self.images.pin_memory(), labels, self.sample_ids)


class Loader:
    """Reads the batches at given positions, in their order.

    Position p is image data_order(len(data), p, 1, seed) of the data, mirrored if flips(seed, [p]):
    what comes depends on nothing but data, seed and positions, so a run goes on at any of them.

    Args:
        data: images by number.
        positions: of each batch: a range, a list, or an int64 tensor. May be endless; it is taken
            ``prefetch · workers`` batches ahead. To go through it again it must be a collection.
        seed: in [0, 2^64).
        shuffle: False: position p is image p mod len(data).
        flip: mirror half of the samples left to right.
        workers: processes that read ahead; 0: the caller's reads, when a batch is asked for. By
            default ``data.workers``. They ignore Ctrl-C and SIGTERM, and end with the iteration.
        prefetch: batches that each worker reads ahead.
        pin_memory: page-locked batches, for a GPU.

    Raises:
        UnreadableImage: while iterating, if ``data`` does not skip them.

    >>> from ddpm_fast.training.data import open_data
    >>> data = open_data("digits", image_size=8, channels=1)
    >>> batches = (range(start, start + 64) for start in range(0, 1 << 40, 64))
    >>> batch = next(iter(Loader(data, batches, seed=0, flip=True)))
    >>> batch.images.shape, batch.sample_ids[:3]
    (torch.Size([64, 1, 8, 8]), tensor([0, 1, 2]))
    """

    def __init__(
        self,
        data: ImageData,
        positions: Iterable[Sequence[int] | Tensor],
        *,
        seed: int = 0,
        shuffle: bool = True,
        flip: bool = False,
        workers: int | None = None,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self._requests = _Requests(len(data), positions, seed, shuffle, flip)
        self._reader = _Reader(data)
        self._pin_memory = pin_memory
        workers = data.workers if workers is None else workers
        if workers < 0 or prefetch < 1:
            raise ValueError(
                f"workers must be at least 0 and prefetch at least 1; got {workers}, {prefetch}"
            )
        self._workers, self._prefetch = workers, prefetch
        self._running: Any = None

    def __iter__(self) -> Iterator[Batch]:
        """Starts the workers, which end with the iteration."""
        self.close()
        results: Iterator[_Result | Exception]
        results = map(self._reader.__getitem__, self._requests)
        if self._workers:
            results = self._running = self._started()
            _iterations.add(results)
        try:
            for result in results:
                if isinstance(result, Exception):
                    raise result
                for index, error in result.bad_images.items():
                    self._reader.data.note_bad(index, error)
                batch = result.batch()
                yield batch.pin_memory() if self._pin_memory else batch
        finally:
            _end(results)

    def close(self) -> None:
        """Ends the workers, and with them the iteration."""
        _end(self._running)
        self._running = None

    def _started(self) -> Iterator[_Result | Exception]:
        processes = DataLoader(
            self._reader,
            batch_size=None,
            sampler=self._requests,
            num_workers=self._workers,
            prefetch_factor=self._prefetch,
            collate_fn=_as_it_is,
            worker_init_fn=_prepare_worker,
            generator=torch.Generator(),  # it would draw from torch's own otherwise
        )
        if not hasattr(signal, "pthread_sigmask"):
            return iter(processes)
        # They are held back until each worker ignores them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_THE_GROUP)
        try:
            return iter(processes)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Request:
    """Arrays throughout, which travel by a pipe: tensors would by shared memory, of which
    containers have little."""

    indices: np.ndarray[Any, np.dtype[np.int64]]
    sample_ids: np.ndarray[Any, np.dtype[np.int64]]
    mirrored: np.ndarray[Any, np.dtype[np.bool_]] | None


@dataclass(frozen=True)
class _Result:
    images: np.ndarray[Any, np.dtype[np.uint8]]
    labels: np.ndarray[Any, np.dtype[np.int64]] | None
    sample_ids: np.ndarray[Any, np.dtype[np.int64]]
    bad_images: dict[int, UnreadableImage]

    def batch(self) -> Batch:
        labels = None if self.labels is None else torch.from_numpy(self.labels)
        return Batch(torch.from_numpy(self.images), labels, torch.from_numpy(self.sample_ids))


class _Requests(Sampler[_Request]):
    """What each batch is made of; runs in the caller's process."""

    def __init__(
        self,
        num_images: int,
        positions: Iterable[Sequence[int] | Tensor],
        seed: int,
        shuffle: bool,
        flip: bool,
    ) -> None:
        self._num_images, self._positions = num_images, positions
        self._seed, self._shuffle, self._flip = seed, shuffle, flip

    def __iter__(self) -> Iterator[_Request]:
        for positions in self._positions:
            ids = _as_ids(positions)
            if self._shuffle:
                indices = images_at(self._num_images, ids, self._seed)
            else:
                indices = ids % self._num_images
            mirrored = flips_at(self._seed, ids).numpy() if self._flip else None
            yield _Request(indices.numpy(), ids.numpy(), mirrored)


def _as_ids(positions: Sequence[int] | Tensor) -> Tensor:
    if isinstance(positions, range):
        return torch.arange(positions.start, positions.stop, positions.step)
    return torch.as_tensor(positions, dtype=torch.int64)


class _Reader(Dataset[_Result | Exception]):
    """Carries out requests; a copy of it runs in each worker."""

    def __init__(self, data: ImageData) -> None:
        self.data = data
        self._told: set[int] = set()

    def __getitem__(self, request: _Request) -> _Result | Exception:
        try:
            images, labels = self.data.batch(request.indices.tolist())
        except Exception as error:
            return error  # raised by a worker, it would come wrapped in its traceback
        if request.mirrored is not None:
            rows = torch.from_numpy(request.mirrored.nonzero()[0])
            images[rows] = images[rows].flip(-1)
        new = {i: e for i, e in self.data.bad_images.items() if i not in self._told}
        self._told |= new.keys()
        return _Result(
            images.numpy(), None if labels is None else labels.numpy(), request.sample_ids, new
        )


def _as_it_is(result: Any) -> Any:
    return result


def _prepare_worker(_worker: int) -> None:
    for number in _TO_THE_GROUP:
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()  # no finaliser of what it got from the caller runs here


def _end(results: Any) -> None:
    """Ends an iteration's workers now: left to the garbage collector, it could be another worker's,
    forked meanwhile, and close what is not its own."""
    shut_down = getattr(results, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


@atexit.register  # before multiprocessing's own, which waits for those that ignore SIGTERM
def _end_all() -> None:
    for results in list(_iterations):
        _end(results)
