"""How a model is called, and where it lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .ops.checks import FLOAT_DTYPES

Model = Callable[..., Any]  # (x [N, C, …], t int64 [N], **model_kwargs) -> a tensor, or its .sample


def call_model(
    model: Model,
    x: Tensor,
    t: Tensor,
    kwargs: Mapping[str, Any],
    halves: int = 1,
    where: str = "",
) -> Tensor:
    """What a model says: a float tensor of x's shape, of ``halves`` times its channels; itself, its
    ``.sample``, or first in a tuple.

    where: what an error adds about the call.

    Raises:
        TypeError, ValueError: it says something else.
    """
    output = model(x, t, **kwargs)
    if isinstance(output, tuple) and output:
        output = output[0]
    elif not isinstance(output, Tensor):
        output = getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            "model must return a tensor, or an object whose .sample is one, or a tuple that "
            f"begins with one; got {type(output).__name__}"
        )
    expected = [x.shape[0], halves * x.shape[1], *x.shape[2:]]
    if list(output.shape) != expected or output.dtype not in (*FLOAT_DTYPES, x.dtype):
        why = ", twice x's channels for a learned variance" if halves == 2 else ""
        raise ValueError(
            f"model must return a float tensor of shape {expected}{why}{where}; got "
            f"{list(output.shape)} {output.dtype}"
        )
    return output


def first_parameter(model: Model) -> Tensor | None:
    """Tells where a module lies and of which dtype it is; None where there is nothing to ask."""
    return next(model.parameters(), None) if isinstance(model, nn.Module) else None
