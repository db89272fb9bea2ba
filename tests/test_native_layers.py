"""The CPU's convolutions and attention against float64, on every instruction set."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from conftest import with_isa
from helpers import ISAS
from torch import Tensor

from ddpm_fast.backends import native
from ddpm_fast.nn.native_layers import BLOCK, Conv, Workspace, attention_call, inside

pytestmark = [
    pytest.mark.skipif(native is None, reason="installed without compiled kernels"),
    pytest.mark.usefixtures("one_thread"),
]

# (samples, c_in, c_out, height, width): odd ones, whole tiles of 8, 6 and 4 rows and parts of them,
# whole blocks of 32 channels, one vector of them, and parts of either.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 5, 7),
    (1, 32, 64, 8, 8),
    (3, 40, 35, 4, 6),
    (5, 17, 16, 3, 2),
    (2, 64, 33, 9, 16),
]
WAYS = {
    "direct": {},
    "winograd": {"winograd": True},
    "phases": {"phases": True},
    "doubled winograd": {"phases": True, "winograd": True},
}


@pytest.fixture(params=ISAS)
def isa(request):
    """The instruction sets alone: the GPU has cuDNN's convolutions."""
    with_isa(request.param)
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padded(x: Tensor) -> Tensor:
    """[n, c, h, w] in a workspace's memory, as [n, h + 2, w + 2, c] or one more."""
    n, c, h, w = x.shape
    image = Workspace().take_padded(n, h, w, c)
    inside(image, h, w).copy_(x.movedim(1, 3))
    return image


def images(n: int, h: int, w: int, c: int, gap: int = 0) -> Tensor:
    """NaN, in memory with ``gap`` more channels on either side."""
    return torch.full((n, h, w, c + 2 * gap), torch.nan)[..., gap : gap + c]


def assert_as_good(found: Tensor, exact: Tensor, eager: Tensor) -> None:
    """At most twice the error of the same formula in PyTorch, and an ulp of what was added up.

    PyTorch's has fused multiply-adds here, and the portable kernels round each product besides: as
    a processor without them would in PyTorch, too. They are given half as much again.
    """
    most = 3 if native.isa() == "portable" else 2
    ulp = torch.finfo(torch.float32).eps * max(exact.abs().max(), 1.0)
    assert found.isfinite().all()
    assert (found - exact).abs().max() <= most * (eager - exact).abs().max() + ulp
    assert (found - exact).norm() <= most * (eager - exact).norm() + ulp


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_convolution_with_bias_and_residual(isa, way, shape):
    n, c_in, c_out, h, w = shape
    x, weight, bias = draw(n, c_in, h, w), draw(c_out, c_in, 3, 3, seed=1), draw(c_out, seed=2)
    whole = F.interpolate(x, scale_factor=2.0) if "phases" in WAYS[way] else x
    residual = draw(n, *whole.shape[2:], c_out + 2, seed=3)[..., 1:-1]
    exact, eager = (
        (F.conv2d(*(p.to(d) for p in (whole, weight, bias)), padding=1).movedim(1, 3) + residual)
        for d in (torch.float64, torch.float32)
    )
    y = images(*exact.shape, gap=3)
    Conv(weight, bias, **WAYS[way]).call(padded(x), y, residual=residual)([], 1)
    assert_as_good(y, exact, eager)
    around = y._base
    assert around[..., :3].isnan().all()
    assert around[..., -3:].isnan().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_map_of_each_pixel_in_place_of_the_residual(isa, shape):
    """A shortcut is written where the block's last convolution then reads and adds to it."""
    n, c_in, c_out, h, w = shape
    x, weight, y = draw(n, h, w, c_in), draw(c_out, c_in, seed=1), images(n, h, w, c_out)
    y.copy_(draw(n, h, w, c_out, seed=2))
    exact, eager = (y.to(d) + F.linear(x.to(d), weight.to(d)) for d in (torch.float64, torch.float))
    Conv(weight, None).call(x, y, residual=y)([], 1)
    assert_as_good(y, exact, eager)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("shape", [(2, 3, 5, 6, 8), (1, 33, 40, 8, 4)], ids=str)
def test_stride_2(isa, shape, padding):
    n, c_in, c_out, h, w = shape
    x, weight = draw(n, c_in, h, w), draw(c_out, c_in, 3, 3, seed=1)
    around = x if padding else F.pad(x, (0, 1, 0, 1))
    exact, eager = (
        F.conv2d(around.to(d), weight.to(d), stride=2, padding=padding).movedim(1, 3)
        for d in (torch.float64, torch.float32)
    )
    y = images(*exact.shape)
    first = padded(x)[:, 1 - padding :, 1 - padding :]
    Conv(weight, None, stride=2).call(first, y)([], 1)
    assert_as_good(y, exact, eager)


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_biases_of_all_samples_or_of_each(isa, way):
    n, c_in, c_out, h, w = 3, 20, 36, 4, 5
    x, weight = draw(n, c_in, h, w), draw(c_out, c_in, 3, 3, seed=1)
    conv, image = Conv(weight, draw(c_out, seed=9), **WAYS[way]), padded(x)
    factor = 2 if "phases" in WAYS[way] else 1
    plain, y = images(n, factor * h, factor * w, c_out), images(n, factor * h, factor * w, c_out)
    Conv(weight, None, **WAYS[way]).call(image, plain)([], 1)
    call = conv.call(image, y, row=1)
    for rows in (draw(1, 2 * c_out, seed=2)[:, c_out:], draw(n, 2 * c_out, seed=3)[:, c_out:]):
        call([torch.empty(0), rows], 1)
        torch.testing.assert_close(y, plain + rows[:, None, None], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("way", "threads"), [*itertools.product(WAYS, [1, 2, 3])])
def test_bits_depend_on_neither_batch_nor_threads(isa, way, threads):
    n, c_in, c_out, h, w = 7, 48, 70, 10, 12
    conv = Conv(draw(c_out, c_in, 3, 3, seed=1), draw(c_out, seed=2), **WAYS[way])
    x, factor = draw(n, c_in, h, w), 2 if "phases" in WAYS[way] else 1
    together = images(n, factor * h, factor * w, c_out)
    conv.call(padded(x), together)([], threads)
    for i in range(n):
        alone = images(1, factor * h, factor * w, c_out)
        conv.call(padded(x[i : i + 1]), alone)([], 1)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (2, 3, 2, 5),
        (1, 64, 1, 32),
        (3, 36, 4, 8),
        (2, 35, 2, 40),
        (1, 100, 3, 17),
        (1, 2048, 1, 8),  # whose sums are long
    ],
    ids=str,
)
def test_attention(isa, shape):
    """(samples, pixels, heads, depth); scores of some hundreds."""
    n, pixels, heads, depth = shape
    qkv = 4 * draw(n, 1, pixels, 3 * heads * depth + 2)[..., 1:-1]
    parts = qkv.reshape(n, pixels, 3, heads, depth).permute(2, 0, 3, 1, 4)
    exact, eager = (
        F.scaled_dot_product_attention(*parts.to(d)).transpose(1, 2).reshape(n, 1, pixels, -1)
        for d in (torch.float64, torch.float32)
    )
    y = images(n, 1, pixels, heads * depth, gap=1)
    attention_call(qkv, heads, y, own=True)([], 1)
    assert_as_good(y, exact, eager)
    again = images(n, 1, pixels, heads * depth)
    attention_call(qkv, heads, again, own=True)([], 3)
    assert torch.equal(again, y)
    attention_call(qkv.contiguous(), heads, again, own=False)([], 1)
    assert_as_good(again, exact, eager)


def test_attention_keeps_nan(isa):
    """A NaN among the keys is one in every query's sum; among the queries, in its own."""
    qkv = draw(1, 1, 40, 3 * 16)
    qkv[0, 0, 7, 3] = torch.nan
    y = torch.zeros(1, 1, 40, 16)
    attention_call(qkv, 1, y, own=True)([], 1)
    assert y[0, 0, 7].isnan().all()
    assert y[0, 0, 8].isfinite().all()
    qkv[0, 0, 9, 16] = torch.nan
    attention_call(qkv, 1, y, own=True)([], 1)
    assert y.isnan().all()


def test_no_pixels(isa):
    """Nothing to do, and nothing is divided by their number."""
    for way in WAYS.values():
        x, y = torch.zeros(2, 2, 6, 8), torch.zeros(2, 0, 8, 16)
        Conv(draw(16, 8, 3, 3), None, **way).call(x, y)([], 2)
    attention_call(torch.zeros(2, 0, 4, 48), 1, torch.zeros(2, 0, 4, 16), own=True)([], 2)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.parametrize("threads", [1, 2])
def test_no_memory_for_a_thread(threads):
    """It is an error, and not the end of the process."""
    child = f"""
        import resource, torch
        from ddpm_fast.nn.native_layers import attention_call
        qkv, y = torch.zeros(1, 1, 200_000, 3), torch.zeros(1, 1, 200_000, 1)
        few = qkv[:, :, :1024], 1, y[:, :, :1024]
        attention_call(*few, own=True)([], {threads})  # starts the threads
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**22, -1))
        try:
            attention_call(qkv, 1, y, own=True)([], {threads})
        except MemoryError:
            print("told")
    """
    run = [sys.executable, "-c", textwrap.dedent(child)]
    found = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert found.stdout == "told\n", found.stderr


def test_packed_weights_are_the_blocks_that_the_kernels_read():
    weight = draw(BLOCK + 3, 5, 3, 3)
    packed = Conv(weight, None).weights
    assert packed.shape == (2, 9, 5, BLOCK)
    assert torch.equal(packed[1, :, :, :3], weight[BLOCK:].flatten(2).permute(2, 1, 0))
    assert packed[1, :, :, 3:].count_nonzero() == 0


def test_workspace_gives_out_what_came_back_and_keeps_zeros_around():
    space = Workspace()
    first = space.take(2, 3, 4, 5)
    space.give(first[..., 1:])  # a part of it: still taken
    second = space.take(2, 3, 4, 5)
    assert second.data_ptr() != first.data_ptr()
    space.give(first)
    assert space.take(4, 3, 2, 5).data_ptr() == first.data_ptr()
    image = space.take_padded(1, 3, 5, 2)
    assert image.shape == (1, 6, 8, 2)
    inside(image, 3, 5).fill_(1.0)
    assert image.sum() == 3 * 5 * 2
    space.give(image)
    assert space.take_padded(1, 4, 6, 2).sum() == 0  # as large, but its zeros lie elsewhere
    assert space.take_padded(1, 3, 5, 2).sum() == 3 * 5 * 2
