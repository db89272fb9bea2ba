"""How far a plan and the model itself lie from the model's float64 forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

T = (0, 437, 999)


def relative(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||."""
    assert found.shape == exact.shape
    assert found.isfinite().all()
    return ((found.double() - exact).norm() / exact.norm()).item()


def sample_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.sample


class Reference:
    """A model's outputs at several t, in float64 and its own dtype.

    Attributes:
        model: in ``dtype``.
        eager: its largest relative error over t.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, device: str = "cpu", count: int = 8
    ) -> None:
        # nn.Module's own, since diffusers' warns of a list of modules that is empty
        self.model = nn.Module.to(copy.deepcopy(model), device, dtype)
        double = nn.Module.to(copy.deepcopy(self.model), torch.float64)
        config: Any = model.config
        side = getattr(config, "image_size", None) or config.sample_size
        classes = getattr(config, "embedded_classes", None) or getattr(
            config, "num_class_embeds", None
        )
        generator = torch.Generator().manual_seed(1)
        shape = count, config.in_channels, side, side
        self.images = [torch.randn(shape, generator=generator).to(device, dtype) for _ in T]
        self.labels = None if classes is None else torch.arange(count, device=device) % classes
        with torch.no_grad():
            self.exact = [
                sample_of(
                    double(x.double(), torch.full((count,), t, device=device), *self._labels())
                )
                for x, t in zip(self.images, T, strict=True)
            ]
        self.eager = self.error(self.model)

    def error(self, function: Callable[..., Any]) -> float:
        """The largest over t, for a batch of one t."""
        return max(
            relative(
                sample_of(function(x, torch.full((len(x),), t, device=x.device), *self._labels())),
                exact,
            )
            for x, t, exact in self._all()
        )

    def error_of_steps(self, trajectory: Any) -> float:
        """The same for a plan's trajectory over T."""
        return max(
            relative(trajectory.step(row, x, *self._labels()), exact)
            for row, (x, _, exact) in enumerate(self._all())
        )

    @torch.no_grad()
    def _all(self) -> Iterator[tuple[Tensor, int, Tensor]]:
        yield from zip(self.images, T, self.exact, strict=True)

    def _labels(self) -> list[Tensor]:
        return [] if self.labels is None else [self.labels]
