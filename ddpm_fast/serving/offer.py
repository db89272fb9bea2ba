"""What a server offers: a sampler, the images that it draws, and what may be asked of it."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import torch
from torch import nn

from .. import __version__
from ..model import first_parameter
from ..sample_state import described
from ..sampler import Sampler
from ..schedule import integer
from ..stepping import device_of
from ..training.images import MODES
from .limits import Limits


@dataclass(frozen=True)
class Address:
    """An image: all that decides what it looks like, the model aside.

    Attributes:
        seed: in [0, 2^64).
        sample_id: in [0, 2^63).
        label: of its class; None where the model has none.
        steps: of its trajectory.
        guidance_scale: None: without guidance.
    """

    seed: int
    sample_id: int
    label: int | None
    steps: int
    guidance_scale: float | None


class Offer:
    """A sampler as clients see it.

    Args:
        sampler: how images are drawn. Its model must stay as it is.
        shape: [C, H, W] of one image, C = 1 … 4.
        classes: their names, or how many there are; None: the model takes no ``class_labels``.
        guidance: whether it can be guided: called with ``class_labels=None`` as well.
        name: of what is served.
        limits: of requests.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    def __init__(
        self,
        sampler: Sampler,
        shape: Sequence[int],
        classes: Sequence[str] | int | None,
        guidance: bool,
        name: str,
        limits: Limits,
    ) -> None:
        self.sampler, self.name, self.limits = sampler, name, limits
        self.shape = [integer("shape", size) for size in shape]
        if len(self.shape) != 3 or self.shape[0] not in MODES or min(self.shape) < 1:
            raise ValueError(f"shape must be [C, H, W] with 1 to 4 channels; got {list(shape)}")
        self.classes = _names(classes)
        scale = sampler.guidance_scale
        if (guidance or scale is not None) and self.classes is None:
            raise ValueError("guidance needs classes, and none are given")
        if isinstance(scale, torch.Tensor):
            raise TypeError("the sampler's guidance_scale must be a number, or None")
        if scale is not None and not abs(scale) <= limits.max_guidance:
            most = limits.max_guidance
            raise ValueError(
                f"guidance_scale must lie in {-most:g} … {most:g} (max_guidance), so that clients "
                f"can name it; got {scale:g}"
            )
        self.guidance, self.guidance_scale = guidance or scale is not None, scale
        self.most_steps = min(len(sampler.schedule), limits.max_steps or len(sampler.schedule))
        self.default_steps = min(len(sampler), self.most_steps)
        # The sampler's scale is that of requests which name none: a session's sampler has none
        self.unguided = sampler._as_it_is()
        self.unguided.guidance_scale = None
        self.device = device_of(sampler, first_parameter(sampler.model))
        self.fingerprint = _fingerprint(self)

    def arguments(self, address: Address) -> dict[str, Any]:
        """Of Session.submit, for an image."""
        own = address.steps == len(self.sampler)
        arguments: dict[str, Any] = {
            "seed": address.seed,
            "sample_id": address.sample_id,
            "num_steps": None if own else address.steps,
        }
        if address.label is not None:
            label = torch.tensor([address.label], device=self.device)
            arguments["model_kwargs"] = {"class_labels": label}
        if address.guidance_scale is not None:
            arguments["guidance_scale"] = address.guidance_scale
            arguments["uncond_kwargs"] = {"class_labels": None}
        return arguments

    def told(self, address: Address) -> dict[str, Any]:
        """An image's address for clients: JSON, what it lacks left out."""
        told: dict[str, Any] = {"seed": address.seed, "id": address.sample_id}
        if address.label is not None and self.classes is not None:
            told["class"] = address.label
            told["class_name"] = self.classes[address.label]
        told["steps"] = address.steps
        if address.guidance_scale is not None:
            told["guidance_scale"] = address.guidance_scale
        return {**told, "url": self.path(address)}

    def path(self, address: Address) -> str:
        """Of its URL; every choice in it, so that it stays the same image if defaults change."""
        query = [] if address.label is None else [f"class={self._class_text(address.label)}"]
        query.append(f"steps={address.steps}")
        if address.guidance_scale is not None:
            query.append(f"guidance_scale={address.guidance_scale!r}")
        return f"/api/images/{address.seed}/{address.sample_id}.png?{'&'.join(query)}"

    def _class_text(self, label: int) -> str:
        """For a query, where a string is a name first."""
        assert self.classes is not None
        number = str(label)
        if number in self.classes and self.classes.index(number) != label:
            return quote(self.classes[label], safe="")
        return number

    def etag(self, address: Address) -> str:
        """Of an image's file: it is a function of this."""
        text = f"{self.fingerprint} {address} {__version__}"
        return f'"{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"'

    def description(self) -> dict[str, Any]:
        """JSON for clients."""
        table, limits = self.sampler.table, self.limits
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "shape": self.shape,
            "classes": self.classes,
            "method": table.method,
            "prediction": table.prediction,
            "steps": {"least": 1, "most": self.most_steps, "default": self.default_steps},
            "guidance": {
                "available": self.guidance,
                "most": limits.max_guidance,
                "default": self.guidance_scale,
            },
            "limits": {
                "images": limits.images,
                "batch": limits.max_batch,
                "waiting": limits.max_waiting,
                "requests": limits.max_requests,
                "frames": limits.max_frames,
                "body_bytes": limits.body_bytes,
            },
            "device": str(self.device),
            "version": __version__,
        }


def _names(classes: Sequence[str] | int | None) -> list[str] | None:
    if classes is None:
        return None
    if isinstance(classes, str):
        raise TypeError(f"classes must be names, or their number; got {classes!r}")
    if isinstance(classes, int):
        classes = [str(label) for label in range(classes)]
    if not classes:
        raise ValueError("classes must be at least one; None: the model has none")
    return [str(name) for name in classes]


def _fingerprint(offer: Offer) -> str:
    """Of what draws, 16 hexadecimal digits; of functions, whose code cannot be compared, another
    one in every process."""
    try:
        what: Any = described(offer.sampler)
    except (TypeError, ReferenceError):
        what = secrets.token_hex()
    if not isinstance(offer.sampler.model, nn.Module) or offer.sampler.denoised_fn is not None:
        what = [what, secrets.token_hex()]
    what = [what, offer.shape, offer.device.type]
    return hashlib.blake2b(json.dumps(what).encode(), digest_size=8).hexdigest()
