"""What a UNet is made of."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

import numpy as np

DownKind = Literal["conv", "resblock", "pool"]
UpKind = Literal["conv", "resblock", "nearest"]
Middle = Literal["attention", "residual", "none"]
_KINDS = {"downsample": ("conv", "resblock", "pool"), "upsample": ("conv", "resblock", "nearest")}
_MIDDLES = ("attention", "residual", "none")
_INTEGERS = (
    *("image_size", "in_channels", "out_channels", "num_res_blocks", "num_heads", "num_classes"),
    *("norm_groups", "time_channels", "embedding_channels", "freq_shift", "downsample_padding"),
    *("head_channels", "num_heads_up", "middle_norm_groups"),
)
_SIDES = ("channels", "attention_resolutions", "attention_up_resolutions")
_OPTIONAL = (
    *("out_channels", "num_classes", "time_channels", "embedding_channels", "head_channels"),
    *("num_heads_up", "middle_norm_groups", "attention_up_resolutions"),
)
_NUMBERS = ("dropout", "label_dropout", "norm_eps")
_FLAGS = ("cosine_first", "scale_shift", "null_class")
_MOST_BLOCKS = 1000  # at a resolution: a damaged number would be built for ever


@dataclass(frozen=True)
class UNetConfig:
    """What a UNet is made of; the defaults are the CIFAR-10 network of Ho et al. 2020.

    Attributes:
        image_size: side of the square images, in pixels; it fixes at which depth attention lies.
        in_channels, out_channels: of x and of the output; out_channels None means in_channels, and
            2 · in_channels is for learned variances.
        channels: of each resolution, highest first; each halves the side of the one before.
        num_res_blocks: at each resolution on the way down; one more on the way up.
        attention_resolutions: sides at which every residual block is followed by attention.
        num_heads: of each attention.
        dropout: inside the residual blocks, in training.
        num_classes: of class labels, or None. Label ``num_classes`` is the null class.
        label_dropout: in training, the share of labels replaced by the null class.
        norm_groups, norm_eps: of every GroupNorm.
        time_channels: of the timestep's sines and cosines; None means channels[0].
        embedding_channels: of the embedding made of them; None means 4 · time_channels.
        cosine_first: the embedding is [cos, sin] instead of [sin, cos].
        freq_shift: of its frequencies, 10000^(−i / (time_channels/2 − freq_shift)).
        scale_shift: the embedding scales and shifts what the second norm gave, instead of being
            added before it.
        downsample_padding: of convolutions of stride 2; 0: at the right and the bottom only, 1: on
            all sides.
        downsample: how a side is halved: "conv", of stride 2; "resblock", a residual block that
            averages 2×2 pixels; "pool", the average alone. One for all, or one a halving.
        upsample: the same on the way up, as many, highest resolution first too: "conv" after
            repeated pixels, "resblock", or "nearest", the repetition alone.
        attention_up_resolutions: on the way up, where it differs from attention_resolutions.
        head_channels: of each head, in place of num_heads: there are width / head_channels heads.
        num_heads_up: on the way up, where it differs from num_heads.
        middle: "attention" between two residual blocks; "residual", those alone; or "none".
        middle_norm_groups: of the attention's norm there, where it differs; 0: it has none.
        null_class: whether there is one. Without it a label is always needed, and label_dropout
            means nothing.
    """

    image_size: int = 32
    in_channels: int = 3
    out_channels: int | None = None
    channels: tuple[int, ...] = (128, 256, 256, 256)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    num_heads: int = 1
    dropout: float = 0.1
    num_classes: int | None = None
    label_dropout: float = 0.1
    norm_groups: int = 32
    norm_eps: float = 1e-6
    # Of other implementations. A config.json that an earlier version wrote does not have them.
    time_channels: int | None = None
    embedding_channels: int | None = None
    cosine_first: bool = False
    freq_shift: int = 1
    scale_shift: bool = False
    downsample_padding: int = 0
    downsample: tuple[DownKind, ...] = ("conv",)
    upsample: tuple[UpKind, ...] = ("conv",)
    attention_up_resolutions: tuple[int, ...] | None = None
    head_channels: int | None = None
    num_heads_up: int | None = None
    middle: Middle = "attention"
    middle_norm_groups: int | None = None
    null_class: bool = True

    def __post_init__(self) -> None:
        sequences = ("channels", "attention_resolutions", "downsample", "upsample")
        for name in (*sequences, "attention_up_resolutions"):  # JSON has lists
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_types()
        self._to_python()
        for name in ("image_size", "in_channels", "num_res_blocks", "num_heads", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in (
            "num_classes",
            "time_channels",
            "embedding_channels",
            "head_channels",
            "num_heads_up",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or None; got {getattr(self, name)}")
        if self.num_res_blocks > _MOST_BLOCKS:
            raise ValueError(
                f"num_res_blocks must be at most {_MOST_BLOCKS}; got {self.num_res_blocks}"
            )
        self._check_levels()
        self._check_attention()
        self._check_embedding()
        for name in ("dropout", "label_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}")

    def _check_types(self) -> None:
        """A file may hold anything; what else is compared with numbers."""
        for name in (*_INTEGERS, *_SIDES):
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            for number in value if name in _SIDES else (value,):
                if isinstance(number, bool) or not isinstance(number, Integral):
                    raise TypeError(f"{name} must be of integers; got {value!r}")
                if abs(int(number)) >= 1 << 31:
                    raise ValueError(f"{name} must be below 2^31; got {number}")
        for name in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number; got {value!r}")
        if not 0 <= self.norm_eps <= sys.float_info.max:  # an integer may be larger
            raise ValueError(f"norm_eps must be finite and at least 0; got {self.norm_eps}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        for name in (*_KINDS, "middle"):
            value = getattr(self, name)
            if not all(isinstance(kind, str) for kind in (value if name in _KINDS else (value,))):
                raise TypeError(f"{name} must be of strings; got {value!r}")

    def _to_python(self) -> None:
        """NumPy's numbers are taken, and JSON has none of them."""
        for name in (*_INTEGERS, *_SIDES):
            value = getattr(self, name)
            if value is not None:
                value = tuple(map(int, value)) if name in _SIDES else int(value)
                object.__setattr__(self, name, value)
        for name in _NUMBERS:
            if type(getattr(self, name)) is not int:  # as it was given: a file may have a 0
                object.__setattr__(self, name, float(getattr(self, name)))
        for name in _FLAGS:
            object.__setattr__(self, name, bool(getattr(self, name)))

    def _check_levels(self) -> None:
        if not self.channels:
            raise ValueError("channels must name at least one resolution")
        halvings = len(self.channels) - 1
        if self.image_size % 2**halvings:
            raise ValueError(
                f"image_size must be a multiple of {2**halvings}, to be halved {halvings} times; "
                f"got {self.image_size}"
            )
        if min(self.channels) < 1 or (self.out_channels is not None and self.out_channels < 1):
            raise ValueError(
                f"channels and out_channels must be at least 1; got {self.channels}, "
                f"{self.out_channels}"
            )
        for width in self.channels:
            heads = self.num_heads if self.head_channels is None else 1
            if width % self.norm_groups or width % heads:
                raise ValueError(
                    f"channels must be multiples of norm_groups ({self.norm_groups}) and num_heads "
                    f"({heads}); got {width}"
                )
        if self.downsample_padding not in (0, 1):
            raise ValueError(f"downsample_padding must be 0 or 1; got {self.downsample_padding}")
        for name, kinds in _KINDS.items():
            found = getattr(self, name)
            if not set(found) <= set(kinds):
                raise ValueError(f"{name} must be of {', '.join(kinds)}; got {list(found)}")
            if len(found) not in (1, halvings):
                raise ValueError(
                    f"{name} must name one kind, or one a halving ({halvings}); got {list(found)}"
                )

    def _check_attention(self) -> None:
        for name in ("attention_resolutions", "attention_up_resolutions"):
            missing = set(getattr(self, name) or ()) - set(self.resolutions)
            if missing:
                raise ValueError(
                    f"{name} must be among {list(self.resolutions)}; got {sorted(missing)}"
                )
        if self.middle not in _MIDDLES:
            raise ValueError(f"middle must be one of {', '.join(_MIDDLES)}; got {self.middle!r}")
        groups = self.middle_norm_groups
        if groups is not None and (groups < 0 or (groups and self.channels[-1] % groups)):
            raise ValueError(
                f"middle_norm_groups must divide {self.channels[-1]}, or be 0 or None; got {groups}"
            )
        for width, up in self.attention_widths():
            per_head = self.head_channels
            if per_head is not None and width % per_head:
                raise ValueError(
                    f"head_channels must divide the channels where there is attention; got "
                    f"{per_head} for {width}"
                )
            if width % self.heads(width, up):
                raise ValueError(
                    f"num_heads_up must divide the channels; got {self.num_heads_up} for {width}"
                )

    def _check_embedding(self) -> None:
        name = "channels" if self.time_channels is None else "time_channels"
        if self.time_width % 2:
            begin = "begin with" if name == "channels" else "be"
            raise ValueError(f"{name} must {begin} an even number; got {self.time_width}")
        most = max(self.time_width // 2 - 1, 1)
        if not 0 <= self.freq_shift <= most:
            raise ValueError(
                f"freq_shift must lie in 0 … {most} for {self.time_width} channels; got "
                f"{self.freq_shift}"
            )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The side at each depth."""
        return tuple(self.image_size >> depth for depth in range(len(self.channels)))

    @property
    def time_width(self) -> int:
        """Of the timestep's sines and cosines."""
        return self.channels[0] if self.time_channels is None else self.time_channels

    @property
    def embedding_width(self) -> int:
        """Of what each residual block is given."""
        return 4 * self.time_width if self.embedding_channels is None else self.embedding_channels

    @property
    def embedded_classes(self) -> int | None:
        """Rows of the classes' embedding, the null class's included."""
        return None if self.num_classes is None else self.num_classes + self.null_class

    def attends(self, depth: int, up: bool) -> bool:
        """Whether there is attention at a depth on one of the two ways."""
        sides = self.attention_resolutions
        if up and self.attention_up_resolutions is not None:
            sides = self.attention_up_resolutions
        return self.resolutions[depth] in sides

    def heads(self, width: int, up: bool) -> int:
        """Of an attention of ``width`` channels."""
        if self.head_channels is not None:
            return width // self.head_channels
        return self.num_heads_up if up and self.num_heads_up is not None else self.num_heads

    def attention_widths(self) -> list[tuple[int, bool]]:
        """(channels, whether on the way up) of each place with attention."""
        places = [
            (width, up)
            for up in (False, True)
            for depth, width in enumerate(self.channels)
            if self.attends(depth, up)
        ]
        return places + [(self.channels[-1], False)] * (self.middle == "attention")

    def downsample_at(self, depth: int) -> DownKind:
        """How the side at ``depth`` is halved."""
        return self.downsample[depth if len(self.downsample) > 1 else 0]

    def upsample_at(self, depth: int) -> UpKind:
        """How the side at ``depth`` + 1 is doubled to that at ``depth``."""
        return self.upsample[depth if len(self.upsample) > 1 else 0]
