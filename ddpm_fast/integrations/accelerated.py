"""Objects of other libraries that have become accelerated, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .noise import NoiseSource, Source


class Accelerated:
    """What stands before the stock class of an accelerated object.

    ``super()`` is the stock formula. Copies and pickles stay accelerated.

    Attributes:
        noise_source: where the noise comes from, see :class:`NoiseSource`.
    """

    noise_source: NoiseSource

    def set_noise(
        self,
        source: Source = "addressed",
        *,
        seed: int | None = None,
        sample_ids: Tensor | Sequence[int] | None = None,
        consumed: int = 0,
    ) -> None:
        """Says where the noise comes from from now on; the arguments are NoiseSource's."""
        self.noise_source = NoiseSource(source, seed, sample_ids, consumed)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: tuple[Any, ...] = super().__reduce_ex__(max(protocol, 2))  # type: ignore[assignment]
        _, (cls, *arguments), *rest = reduced
        return _new, (cls.mixin, cls.stock, *arguments), *rest


_classes: dict[tuple[type, type], type] = {}


def accelerated_class(mixin: type[Accelerated], stock: type) -> type:
    """``mixin`` before ``stock``: a subclass of both, the same at every call."""
    if (mixin, stock) not in _classes:
        names = {"mixin": mixin, "stock": stock, "__module__": mixin.__module__}
        _classes[mixin, stock] = type(f"Fast{stock.__name__}", (mixin, stock), names)
    return _classes[mixin, stock]


def stands_for(cls: Any) -> None:
    """Makes a class that is written out the accelerated class of its ``mixin`` and ``stock``."""
    _classes[cls.mixin, cls.stock] = cls


def accelerate_object(instance: Any, mixin: type[Accelerated], noise: NoiseSource) -> Any:
    """The instance itself, of the accelerated class from now on."""
    if not isinstance(instance, mixin):
        instance.__class__ = accelerated_class(mixin, type(instance))
    instance.noise_source = noise
    return instance


def _new(mixin: type[Accelerated], stock: type, *arguments: Any) -> Any:
    cls = accelerated_class(mixin, stock)
    return cls.__new__(cls, *arguments)
