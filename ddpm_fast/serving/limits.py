"""What a server takes before it says no."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

# Names by which a browser on the same machine reaches a server that listens there alone
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_MOST = 1_000_000_000  # of anything that is counted


@dataclass(frozen=True)
class Limits:
    """Bounds of requests and of those who send them.

    Attributes:
        max_batch: images that share a call of the model.
        max_waiting: images that may wait for a place in the batch beside those.
        max_images: of one request; by default 64, or max_batch + max_waiting if that is less.
        max_steps: of an image; by default as many as the schedule has.
        max_guidance: of a guidance scale's absolute value.
        max_requests: that draw at the same time; one whose answer is still being read does not.
        max_connections: open at the same time, those of clients that ask for nothing included.
        max_frames: of a live view, spread over the steps of its images; beside them it sends
            ``frames_per_second`` where steps take long.
        frames_per_second: see there.
        head_seconds: in which a request's head has to be there, on a connection that is idle too.
        body_seconds: in which its body has to be there.
        stall_seconds: in which a client has to take something of what was sent to it, 16 KiB at
            least.

    Raises:
        TypeError, ValueError: a number out of range.

    >>> Limits(max_batch=4, max_waiting=8).images
    12
    """

    max_batch: int = 16
    max_waiting: int = 256
    max_images: int | None = None
    max_steps: int | None = None
    max_guidance: float = 100.0
    max_requests: int = 128
    max_connections: int = 512
    max_frames: int = 120
    frames_per_second: float = 12.0
    head_seconds: float = 15.0
    body_seconds: float = 15.0
    stall_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "max_waiting" else 1
            if value is None and field.default is None:
                continue
            whole = isinstance(field.default, int) or field.default is None
            kinds = (int,) if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                what = "an integer" if whole else "a number"
                raise TypeError(f"{field.name} must be {what}; got {value!r}")
            if not whole and not 0 < value < math.inf:
                raise ValueError(f"{field.name} must be positive and finite; got {value}")
            if whole and value < least:
                raise ValueError(f"{field.name} must be at least {least}; got {value}")
            if whole and value > _MOST:
                raise ValueError(f"{field.name} must be at most {_MOST:,}; got {value}")
        if self.max_images is not None and self.max_images > self.room:
            raise ValueError(
                f"max_images must be at most max_batch + max_waiting, {self.room}: a request of "
                f"more could never be taken; got {self.max_images}"
            )

    @property
    def room(self) -> int:
        """For images, of all requests together."""
        return self.max_batch + self.max_waiting

    @property
    def images(self) -> int:
        """Of one request, at most."""
        return min(64, self.room) if self.max_images is None else self.max_images

    @property
    def body_bytes(self) -> int:
        """Of a request: enough for the largest, with an id and a class for each image."""
        return 16384 + 256 * self.images
