"""A stand-in for the UNetModel of OpenAI's improved- and guided-diffusion: its options, the names
and shapes of its weights and its function, so that their checkpoints can be tested without them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width)


class Half(nn.Module):
    def __init__(self, width: int, learned: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, 2, 1) if learned else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Double(nn.Module):
    def __init__(self, width: int, learned: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1) if learned else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Residual(nn.Module):
    def __init__(self, c_in, c_out, emb_width, dropout, film, change=None) -> None:
        super().__init__()
        self.film, self.change = film, change or nn.Identity()
        self.in_layers = nn.Sequential(norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_width, 2 * c_out if film else c_out)
        )
        self.out_layers = nn.Sequential(
            norm(c_out), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.change(self.in_layers[1](self.in_layers[0](x))))
        e = self.emb_layers(emb).unflatten(1, (-1, 1, 1))
        if self.film:
            c = h.shape[1]
            h = self.out_layers[0](h) * (1 + e[:, :c]) + e[:, c:]
        else:
            h = self.out_layers[0](h + e)
        for layer in self.out_layers[1:]:
            h = layer(h)
        return self.skip_connection(self.change(x)) + h


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = norm(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        if self.new_order:  # all of q, all of k, all of v
            q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        else:  # q, k, v of a head, then of the next
            q, k, v = qkv.unflatten(1, (self.heads, 3, -1)).unbind(2)
        weights = (q.transpose(2, 3) @ k / math.sqrt(q.shape[2])).softmax(3)  # [N, heads, T, T]
        h = (v @ weights.transpose(2, 3)).flatten(1, 2)
        return (flat + self.proj_out(h)).reshape(x.shape)


class Sequence(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, Residual) else layer(x)
        return x


class UNetModel(nn.Module):
    def __init__(
        self,
        image_size,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,  # rates: the side is image_size over it
        dropout=0.0,
        channel_mult=(1, 2, 4, 8),
        conv_resample=True,
        num_classes=None,
        num_heads=1,
        num_head_channels=-1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
        resblock_updown=False,
        use_new_attention_order=False,
    ) -> None:
        super().__init__()
        emb_width = 4 * model_channels
        self.model_channels = model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_width)
        widths = [int(multiple * model_channels) for multiple in channel_mult]

        def residual(c_in, c_out, change=None):
            return Residual(c_in, c_out, emb_width, dropout, use_scale_shift_norm, change)

        def attention(width, heads):
            if num_head_channels != -1:
                heads = width // num_head_channels
            return Attention(width, heads, use_new_attention_order)

        c = widths[0]
        self.input_blocks = nn.ModuleList([Sequence(nn.Conv2d(in_channels, c, 3, padding=1))])
        skips = [c]
        for depth, width in enumerate(widths):
            attends = 2**depth in attention_resolutions
            for _ in range(num_res_blocks):
                here = [attention(width, num_heads)] if attends else []
                self.input_blocks.append(Sequence(residual(c, width), *here))
                skips.append(c := width)
            if depth < len(widths) - 1:
                change = Half(c, conv_resample)
                if resblock_updown:
                    change = residual(c, c, Half(c, False))
                self.input_blocks.append(Sequence(change))
                skips.append(c)
        self.middle_block = Sequence(residual(c, c), attention(c, num_heads), residual(c, c))
        self.output_blocks = nn.ModuleList()
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        for depth, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [residual(c + skips.pop(), width)]
                c = width
                if 2**depth in attention_resolutions:
                    layers.append(attention(c, heads_up))
                if depth and i == num_res_blocks:
                    up = residual(c, c, Double(c, False)) if resblock_updown else None
                    layers.append(up or Double(c, conv_resample))
                self.output_blocks.append(Sequence(*layers))
        self.out = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, out_channels, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        half = self.model_channels // 2
        ω = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = timesteps[:, None].float() * ω
        embedded = torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype)
        emb = self.time_embed(embedded)
        if y is not None:
            emb = emb + self.label_emb(y)
        hs = []
        for block in self.input_blocks:
            x = block(x, emb)
            hs.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, hs.pop()], 1), emb)
        return self.out(x)


def create_model(
    image_size=64,
    num_channels=128,
    num_res_blocks=2,
    num_heads=4,
    num_heads_upsample=-1,
    num_head_channels=-1,
    attention_resolutions="16,8",
    channel_mult="",
    dropout=0.0,
    learn_sigma=False,
    class_cond=False,
    use_scale_shift_norm=True,
    resblock_updown=False,
    use_new_attention_order=False,
) -> UNetModel:
    """What the scripts make of their options; their defaults."""
    multiples = {
        512: (0.5, 1, 1, 2, 2, 4, 4),
        256: (1, 1, 2, 2, 4, 4),
        128: (1, 1, 2, 3, 4),
        64: (1, 2, 3, 4),
        32: (1, 2, 2, 2),
    }
    return UNetModel(
        image_size,
        3,
        num_channels,
        6 if learn_sigma else 3,
        num_res_blocks,
        [image_size // int(side) for side in attention_resolutions.split(",")],
        dropout,
        [int(m) for m in channel_mult.split(",")] if channel_mult else multiples[image_size],
        num_classes=1000 if class_cond else None,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
    )
