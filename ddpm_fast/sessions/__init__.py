"""In-flight batching: sessions that draw for many who ask at any time (docs/sessions.md)."""

from .handle import Handle, SessionClosed, SessionFull
from .session import Session

__all__ = ["Handle", "Session", "SessionClosed", "SessionFull"]
