"""GroupNorm and SiLU as a UNet has them, and their gradients, against F.group_norm and F.silu."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparison import compiled, ours

from ddpm_fast import group_norm_silu, reference

GROUPS = 32
# Of google/ddpm-cifar10-32: its widest layers, for one image, and for batches of sampling.
SHAPES = {
    "cpu": [(1, 128, 32, 32), (8, 128, 32, 32), (1, 256, 16, 16), (8, 256, 16, 16), (8, 256, 8, 8)],
    "cuda": [(1, 128, 32, 32), (256, 128, 32, 32), (1, 256, 16, 16), (256, 256, 16, 16)],
}
COMPILED = {(8, 128, 32, 32), (256, 128, 32, 32)}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """x, and weight and bias in x's dtype, as a model of that dtype has them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    weight, bias = (torch.randn(shape[1], generator=generator).to(device, dtype) for _ in range(2))
    return x.contiguous(memory_format=LAYOUTS[layout]), weight, bias


def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_forward(compare, dtype, layout, case, device):
    if case >= len(SHAPES[device.type]):
        pytest.skip("no such shape on this device")
    shape = SHAPES[device.type][case]
    x, weight, bias = tensors(shape, dtype, layout, device)

    def check() -> None:
        exact, _ = reference.group_norm_silu(x.double(), GROUPS, weight.double(), bias.double())
        error = (group_norm_silu(x, GROUPS, weight, bias).double() - exact).abs().max()
        allowed = 2 * (eager(x, weight, bias).double() - exact).abs().max()
        assert error <= allowed + torch.finfo(dtype).eps * exact.abs().max()

    candidates = ours(lambda: group_norm_silu(x, GROUPS, weight, bias), device)
    candidates["eager"] = lambda: eager(x, weight, bias)
    if shape in COMPILED:
        whole = compiled(eager)
        candidates["torch.compile"] = lambda: whole(x, weight, bias)
    name = f"group_norm_silu {list(shape)} {str(dtype).removeprefix('torch.')} {layout}"
    compare(name, x.numel(), 2 * x.nbytes, candidates, check)


@pytest.mark.parametrize("layout", LAYOUTS)
def bench_training(compare, layout, device):
    """Forward and backward."""
    shape = SHAPES[device.type][1]
    x, weight, bias = tensors(shape, torch.float32, layout, device)
    dy = torch.randn_like(x)
    whole = compiled(eager)

    def step(function) -> list[torch.Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
            function(*leaves).backward(dy)
            return [leaf.grad for leaf in leaves]

    def fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return group_norm_silu(x, GROUPS, weight, bias)

    def check() -> None:
        for found, expected in zip(step(fused), step(eager), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())

    candidates = ours(lambda: step(fused), device)
    candidates["eager"] = lambda: step(eager)
    candidates["torch.compile"] = lambda: step(whole)
    # x read and y written, then x and dy read twice and dx written
    name = f"group_norm_silu {list(shape)} forward and backward float32 {layout}"
    compare(name, x.numel(), 7 * x.nbytes, candidates, check)
