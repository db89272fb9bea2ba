"""In-flight batching: sessions that draw for many who ask at any time (docs/sessions.md)."""

from .session import Handle, Session, SessionClosed, SessionFull

__all__ = ["Handle", "Session", "SessionClosed", "SessionFull"]
