"""GroupNorm and SiLU as a UNet has them, and their gradients, against F.group_norm and F.silu."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from comparison import compiled, on_reference, ours
from correctness import agree, within
from peers import Missing, calling
from results import OURS

from ddpm_fast import group_norm_silu, reference

GROUPS = 32
FULL = pytest.mark.full
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


@pytest.mark.parametrize("case", [pytest.param(i, marks=FULL) if i != 1 else 1 for i in range(5)])
@pytest.mark.parametrize("layout", ["channels_last", pytest.param("contiguous", marks=FULL)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_forward(compare, dtype, layout, case, device, quick):
    if case >= len(SHAPES[device.type]):
        pytest.skip("group_norm_silu: shapes of CPUs alone")
    shape = SHAPES[device.type][case]
    x, weight, bias = tensors(shape, dtype, layout, device)
    exact, _ = reference.group_norm_silu(x.double(), GROUPS, weight.double(), bias.double())
    allowed = 2 * (eager(x, weight, bias).double() - exact).abs().max()
    allowed += torch.finfo(dtype).eps * exact.abs().max()

    def rule(name: str, call: Callable[[], torch.Tensor]) -> None:
        within(name, (call().double() - exact).abs().max(), allowed)

    candidates = ours(lambda: group_norm_silu(x, GROUPS, weight, bias), device)
    candidates["eager"] = lambda: eager(x, weight, bias)
    if shape in COMPILED and not (quick and dtype == torch.bfloat16):
        candidates["torch.compile"] = calling(compiled(eager, device.type), x, weight, bias)
    candidates["reference"] = on_reference(candidates[OURS])
    name = f"group_norm_silu {list(shape)} {str(dtype).removeprefix('torch.')} {layout}"
    compare(name, x, 2 * x.nbytes, candidates, rule=rule)


@pytest.mark.parametrize("layout", ["channels_last", pytest.param("contiguous", marks=FULL)])
def bench_training(compare, layout, device, quick):
    """Forward and backward."""
    shape = SHAPES[device.type][1]
    x, weight, bias = tensors(shape, torch.float32, layout, device)
    dy = torch.randn_like(x)

    def step(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
            function(*leaves).backward(dy)
            return [leaf.grad for leaf in leaves]

    def fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return group_norm_silu(x, GROUPS, weight, bias)

    expected = step(eager)

    def rule(name: str, call: Callable[[], list[torch.Tensor]]) -> None:
        for found, gradient in zip(call(), expected, strict=True):
            scale = float(gradient.abs().max())
            agree(f"{name}, gradient", found, gradient, rtol=1e-4, atol=1e-5 * scale)

    candidates = ours(lambda: step(fused), device)
    candidates["eager"] = lambda: step(eager)
    if not quick:
        whole = compiled(eager, device.type)
        candidates["torch.compile"] = whole if isinstance(whole, Missing) else lambda: step(whole)
    # x read and y written, then x and dy read twice and dx written
    name = f"group_norm_silu {list(shape)} forward and backward float32 {layout}"
    compare(name, x, 7 * x.nbytes, candidates, rule=rule)
