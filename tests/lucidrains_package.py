"""denoising_diffusion_pytorch itself, also where torchvision is missing or cannot be imported.

The package takes torchvision for its folder of images and its pictures alone. Where the real one
cannot be had, as beside a CPU build of torch, modules that do as much stand in for it while the
package is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import math
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

MAIN_MODULE = "denoising_diffusion_pytorch.denoising_diffusion_pytorch"
# Imported before anything stands in for torchvision, which some of them look for.
DEPENDENCIES = ("accelerate", "einops", "ema_pytorch", "scipy.optimize", "tqdm.auto")


def import_package() -> ModuleType:
    """The package's own main module.

    Raises:
        ImportError: the package, or something that it needs, is not installed.
    """
    if MAIN_MODULE in sys.modules:
        return sys.modules[MAIN_MODULE]
    for name in DEPENDENCIES:
        importlib.import_module(name)
    with contextlib.nullcontext() if _has_torchvision() else _standing_in():
        return importlib.import_module(MAIN_MODULE)


def package_or_skip() -> ModuleType:
    """The package's main module; skips the tests of the module that asks where there is none."""
    try:
        return import_package()
    except ImportError as error:
        pytest.skip(f"denoising_diffusion_pytorch: {error}", allow_module_level=True)


def _has_torchvision() -> bool:
    before = set(sys.modules)
    try:
        importlib.import_module("torchvision.transforms")
        importlib.import_module("torchvision.utils")
    except (ImportError, RuntimeError):  # the latter where its operators fit another torch
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "torchvision":
                del sys.modules[name]
        return False
    return True


@contextlib.contextmanager
def _standing_in() -> Iterator[None]:
    contents = {
        "torchvision": [],
        "torchvision.transforms": [
            CenterCrop,
            Compose,
            Lambda,
            RandomHorizontalFlip,
            Resize,
            ToTensor,
        ],
        "torchvision.utils": [save_image],
    }
    modules = {}
    for name, members in contents.items():
        modules[name] = ModuleType(name)
        modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        for member in members:
            setattr(modules[name], member.__name__, member)
    modules["torchvision"].transforms = modules["torchvision.transforms"]
    modules["torchvision"].utils = modules["torchvision.utils"]
    modules["torchvision"].__path__ = []
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class Lambda:
    def __init__(self, function):
        self.function = function

    def __call__(self, image):
        return self.function(image)


class Resize:
    """To (height, width), or the shorter side to a number."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        if isinstance(self.size, int):
            scale = self.size / min(image.size)
            size = [max(self.size, round(side * scale)) for side in image.size]
        else:
            size = self.size[::-1]
        return image.resize(tuple(size), Image.Resampling.BILINEAR)


class CenterCrop:
    def __init__(self, size):
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def __call__(self, image):
        height, width = self.size
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


class RandomHorizontalFlip:
    def __call__(self, image):
        return ImageOps.mirror(image) if torch.rand(1) < 0.5 else image


class ToTensor:
    """[C, H, W] in [0, 1] of 8-bit pixels."""

    def __call__(self, image):
        pixels = torch.from_numpy(np.array(image))
        return torch.atleast_3d(pixels).permute(2, 0, 1).float() / 255


def save_image(images, path, nrow=8):
    """[N, C, H, W] in [0, 1], in rows of ``nrow``."""
    columns = min(nrow, len(images))
    blank = images.new_zeros(math.ceil(len(images) / columns) * columns, *images.shape[1:])
    blank[: len(images)] = images
    grid = torch.cat([torch.cat([*row], 2) for row in blank.split(columns)], 1)
    pixels = (grid * 255 + 0.5).clamp(0, 255).byte().permute(1, 2, 0).squeeze(2)
    Image.fromarray(pixels.numpy()).save(path)
