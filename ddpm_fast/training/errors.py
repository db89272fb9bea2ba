"""What stops a run, with a message for the person who started it."""

from __future__ import annotations


class RunError(Exception):
    """A run that cannot go on; the message says why and what to do.

    status: the exit status that it is worth: 2 where the call is at fault, 1 otherwise.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class FailedElsewhere(RunError):
    """Another process has failed and says why."""
