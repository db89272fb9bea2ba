"""Dropout whose mask is a function of (seed, sample id, layer, element), as all noise is."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor, nn

from ..ops.checks import is_channels_last
from ..ops.randn import randn

DROPOUT_STREAM = 9


class SampleAddress:
    """Which samples the model is computing; set before each call.

    Attributes:
        seed: of the run.
        sample_ids: int64 [N], on the model's device.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.sample_ids: Tensor | None = None


class AddressedDropout(nn.Module):
    """In training, x / (1 − p) where z ≥ Φ⁻¹(p) and 0 elsewhere, z the normals of stream 9.

    The mask of a sample is the same in any batch, in any process, and in the second pass of
    activation checkpointing; no generator's state has to be kept.

    Args:
        p: the share that is dropped, in [0, 1).
        address: of the batch.
        index: the layer's; its noise's index.

    >>> address = SampleAddress(seed=0)
    >>> address.sample_ids = torch.arange(3)
    >>> AddressedDropout(0.5, address, 0)(torch.ones(3, 4))[1]
    tensor([0., 2., 2., 0.])
    """

    def __init__(self, p: float, address: SampleAddress, index: int) -> None:
        super().__init__()
        self.p, self.index, self._address = p, index, address
        self._threshold = NormalDist().inv_cdf(p) if p > 0 else 0.0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        ids = self._address.sample_ids
        assert ids is not None
        z = randn(
            x.shape,
            seed=self._address.seed,
            sample_ids=ids,
            stream=DROPOUT_STREAM,
            index=self.index,
            device=x.device,
            memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format,
        )
        return x * z.ge_(self._threshold).mul_(1 / (1 - self.p)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}, index={self.index}"


def address_dropout(model: nn.Module, address: SampleAddress) -> None:
    """Puts an :class:`AddressedDropout` in each nn.Dropout's place, numbered in their order."""
    places = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Dropout)
    ]
    for index, (module, name, child) in enumerate(places):
        setattr(module, name, AddressedDropout(child.p, address, index).train(child.training))
