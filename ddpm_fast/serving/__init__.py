"""A model behind HTTP: a page to watch it, and an interface for programs (docs/serving.md)."""

try:
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'ddpm_fast.serving needs {error.name}: pip install "ddpm_fast[serve]"', name=error.name
    ) from error

from .limits import LOOPBACK, Limits
from .running import serving
from .site import create_app

__all__ = ["LOOPBACK", "Limits", "create_app", "serving"]
