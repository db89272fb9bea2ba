"""How many connections a process can have: each is a file that is open."""

from __future__ import annotations

import os

_OTHERS = 64  # files that a server opens beside them: a checkpoint, threads' pipes, a log


def fitting(connections: int, more: int, raising: bool) -> int:
    """How many connections a server can keep, at most as many as are wanted.

    Args:
        connections: that are wanted.
        more: that it may have for a moment.
        raising: the process's own bound may be raised up to the system's.

    >>> fitting(8, 0, raising=False)
    8
    """
    try:
        import resource
    except ImportError:  # Windows has no such bound
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + more + _OTHERS + _open_files()
    if raising and soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (OSError, ValueError):
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    return max(1, connections - (wanted - soft))


def _open_files() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        try:
            return len(os.listdir(folder))
        except OSError:
            continue
    return _OTHERS
