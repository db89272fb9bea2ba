"""The demo's pictures, as the bytes of a file. Needs matplotlib and pillow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # [N, H, W]


def sample_grid(pixels: Pixels) -> bytes:
    """Ten columns, one a class, each under its label; PNG."""
    from matplotlib.figure import Figure

    rows = len(pixels) // 10
    figure = Figure(figsize=(6, 0.6 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, 10, squeeze=False)
    for i, (axis, image) in enumerate(zip(axes.flat, pixels, strict=True)):
        axis.imshow(image, cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
        axis.set_axis_off()
        if i < 10:
            axis.set_title(str(i), fontsize=11)
    return _png(figure)


def loss_curve(losses: Sequence[float]) -> bytes:
    """The training loss and its moving mean over 50 steps, on a logarithmic scale; PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.semilogy(losses, linewidth=0.4, color="0.7", label="each step")
    window = min(50, len(losses))
    mean = np.convolve(losses, np.ones(window) / window, "valid")
    axis.semilogy(np.arange(window - 1, len(losses)), mean, color="C0", label=f"mean of {window}")
    axis.set_xlabel("training step")
    axis.set_ylabel("mean squared error of ε")
    axis.legend()
    return _png(figure)


def animation(frames: Sequence[Pixels], scale: int = 5) -> bytes:
    """Each frame's images in ten columns, the last frame held for two seconds; GIF."""
    from PIL import Image

    images = []
    for frame in frames:
        n, height, width = frame.shape
        grid = frame.reshape(n // 10, 10, height, width).transpose(0, 2, 1, 3)
        grid = np.pad(grid, [(0, 0), (1, 1), (0, 0), (1, 1)])
        sheet = 255 - grid.reshape(n // 10 * (height + 2), 10 * (width + 2))
        sheet = sheet.repeat(scale, 0).repeat(scale, 1)
        images.append(Image.fromarray(sheet.astype(np.uint8)))
    file = io.BytesIO()
    durations = [60] * (len(images) - 1) + [2000]
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    return file.getvalue()


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
