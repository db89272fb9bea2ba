"""How far it is: bars by tqdm where they are wanted, and lines of a log for long jobs."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

LINE_EVERY = 30.0  # seconds


class _NoBar:
    def update(self, count: int = 1, there: int = 0) -> None:
        pass


def bar(
    wanted: bool, total: int | None, what: str, unit: str = "image", there: int = 0
) -> contextlib.AbstractContextManager[Any]:
    """A bar on stderr with an ``update(count)``, or one that shows nothing.

    there: units that were done before; they are not in the rate.

    Raises:
        ImportError: it is wanted and tqdm is not installed.
    """
    if not wanted:
        return contextlib.nullcontext(_NoBar())
    return _tqdm()(total=total, initial=there, desc=what, unit=unit, mininterval=0.5)


def job(
    wanted: bool, total: int, there: int, what: str, unit: str = "images", lines: bool = False
) -> contextlib.AbstractContextManager[Any]:
    """How far a job is that goes on from what an earlier run of it has left.

    On a terminal a bar; elsewhere, a log file say, a line at the beginning, after the first
    ``update(count, there)`` and then every half a minute. What was there counts in what is done,
    not in the rate or the time that is left. The rate is units a second below one as well: it is
    compared with others', and added up over processes.

    Args:
        total: units in all.
        there: of them those that were there before; ``update`` tells of more, or less.
        lines: on a terminal too, for processes that share one.

    Raises:
        ImportError: a bar is wanted and tqdm is not installed.
    """
    if not wanted:
        return contextlib.nullcontext(_NoBar())
    kind = _Lines if lines or not sys.stderr.isatty() else _Bar
    return kind(total, there, what, unit)


def span(seconds: float) -> str:
    """A time as people read it.

    >>> span(3.21), span(75), span(100_000)
    ('3.2 s', '0:01:15', '27:46:40')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def per_second(count: int, seconds: float, unit: str = "images") -> str:
    """A rate of three digits.

    >>> per_second(412, 10), per_second(12345, 1), per_second(1, 30)
    ('41.2 images/s', '12345 images/s', '0.0333 images/s')
    """
    rate = count / max(seconds, 1e-9)
    return f"{rate:.0f} {unit}/s" if rate >= 100 else f"{rate:.3g} {unit}/s"


class _Job:
    """Counts; the kinds show."""

    def __init__(self, total: int, there: int, what: str, unit: str) -> None:
        self.total, self.there, self.what, self.unit = total, there, what, unit
        self.count, self._began = 0, time.monotonic()

    @property
    def done(self) -> int:
        return self.there + self.count

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    @property
    def left(self) -> str:
        """The time that the rest takes at the mean rate so far."""
        return span((self.total - self.done) * self.elapsed / self.count)

    def update(self, count: int, there: int = 0) -> None:
        """``count`` more units are done, and ``there`` more were found to be there."""
        self.count += count
        self.there += there
        self.show()

    def show(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Lines(_Job):
    """A line now and then, so that a log of a day has thousands and not millions."""

    def __init__(self, total: int, there: int, what: str, unit: str) -> None:
        super().__init__(total, there, what, unit)
        self._next = 0.0
        self._say(f"{self.done}/{self.total} {self.unit}")

    def show(self) -> None:
        elapsed = self.elapsed
        if self.count and elapsed >= self._next:
            self._next = elapsed + LINE_EVERY
            rate = per_second(self.count, elapsed, self.unit)
            self._say(f"{self.done}/{self.total} {self.unit}, {rate}, ETA {self.left}")

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a log that cannot be written must not stop the job
            print(f"{self.what}: {text}", file=sys.stderr, flush=True)


class _Bar(_Job):
    def __init__(self, total: int, there: int, what: str, unit: str) -> None:
        super().__init__(total, there, what, unit)
        self._bar = _tqdm()(
            total=self.total,
            initial=self.there,
            desc=self.what,
            mininterval=0.5,
            smoothing=0,  # the mean rate: batches are few, and the first is slow
            # tqdm's own rate turns into seconds a unit below one.
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
            "[{elapsed}<{remaining}{postfix}]",
        )

    def show(self) -> None:
        # What was there moves both ends of what tqdm takes the rate of.
        found = self.there - self._bar.initial
        self._bar.initial += found
        self._bar.n += found
        if self.count:
            self._bar.set_postfix_str(
                per_second(self.count, self.elapsed, self.unit), refresh=False
            )
        self._bar.update(self.done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("a progress bar needs tqdm: pip install tqdm") from error
    return tqdm
