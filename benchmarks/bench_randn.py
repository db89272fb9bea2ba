"""randn against torch.randn, each returning a new tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import COMPILED, REFERENCE, compiled, on_reference, ours
from correctness import agree, like_randn
from peers import Maybe, Missing, diffusers
from results import OURS

from ddpm_fast import randn, use_backend

FULL = pytest.mark.full


def rule_of(shape: tuple[int, ...]) -> Callable[[str, Callable[[], torch.Tensor]], None]:
    """The specification's bits, of the first images and the last; the moments of all."""
    few = min(shape[0], 32)
    ends = {0: range(few), shape[0] - few: range(shape[0] - few, shape[0])}
    with use_backend("reference"):
        expected = {
            begin: randn((few, *shape[1:]), seed=1, sample_ids=list(ids))
            for begin, ids in ends.items()
        }

    def rule(name: str, call: Callable[[], torch.Tensor]) -> None:
        z = call()
        if name.startswith(OURS) or name == "reference":
            for begin, bits in expected.items():
                agree(name, z[begin : begin + few], bits.to(z.dtype))
        like_randn(name, z, 0.0 if z.dtype == torch.float32 else torch.finfo(z.dtype).eps)

    return rule


def from_diffusers(size: tuple[int, ...], device: torch.device) -> Maybe:
    package = diffusers()
    if isinstance(package, Missing):
        return package
    from diffusers.utils.torch_utils import randn_tensor

    return lambda: randn_tensor(size, device=device)


def bench_float32(compare, size, device):
    state = torch.empty(size, device="meta")
    candidates = ours(lambda: randn(size, seed=1, device=device), device)
    candidates["torch.randn"] = lambda: torch.randn(size, device=device)
    if size[0] in COMPILED[device.type]:
        whole = compiled(lambda: torch.randn(size, device=device), device.type)
        candidates["torch.compile"] = whole
    candidates["diffusers"] = from_diffusers(size, device)
    if size[0] <= REFERENCE[device.type]:
        candidates["reference"] = on_reference(candidates[OURS])
    compare("randn float32", state, 4 * state.numel(), candidates, rule=rule_of(size))


@pytest.mark.parametrize("layout", ["contiguous", pytest.param("channels_last", marks=FULL)])
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=FULL), torch.bfloat16],
    ids=["float32", "bfloat16"],
)
def bench_layouts(compare, large_size, dtype, layout, device):
    state = torch.empty(large_size, device="meta", dtype=dtype)
    format_ = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    kwargs = {"dtype": dtype, "device": device}
    candidates = {
        OURS: lambda: randn(large_size, seed=1, memory_format=format_, **kwargs),
        "torch.randn": lambda: torch.randn(large_size, **kwargs),
    }
    name = f"randn {str(dtype).removeprefix('torch.')} {layout}"
    compare(name, state, state.nbytes, candidates, rule=rule_of(large_size))
