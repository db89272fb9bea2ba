"""What Triton makes of group_norm_silu for sm_90 and gfx942, read without a GPU: vectors of 16
bytes, no local memory, nothing approximate; and how many kernels are compiled for launches that
differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import machine_code
import pytest
from test_triton_machine_code import AMD, count

from ddpm_fast.kernels import support

# Tensors of x's size that each kernel reads and writes: always, and with a residual.
TENSORS = {
    "group_norm_silu_moments_tile_kernel": ((1, 0), (1, 1)),
    "group_norm_silu_tile_kernel": ((1, 1), (0, 0)),
    "group_norm_silu_sums_tile_kernel": ((2, 0), (0, 0)),
    "group_norm_silu_bwd_tile_kernel": ((2, 1), (1, 0)),
}
SUM = "group_norm_silu_sums_sum_tile_kernel"
WITH_RESIDUAL = ["bfloat16, channels_last, groups of 12"]
# Instructions that read and write 16 bytes; and those of a single element of 16 bits.
INSTRUCTIONS = {
    "90": (r"ld\.global\.v4\.b32", r"st\.global\.v4\.b32", r"(ld|st)\.global\.b16"),
    AMD: (r"buffer_load_dwordx4", r"buffer_store_dwordx4", r"buffer_(load_u|store_)short\S*"),
}


def ask(*question: str) -> dict[str, Any]:
    if support.triton_problem():
        pytest.skip(support.triton_problem())
    if machine_code.find_tool("cuobjdump") is None:
        pytest.skip("needs cuobjdump")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(machine_code.ROOT / "build" / "tests" / "triton")
    run = subprocess.run(
        [sys.executable, "tests/triton_group_norm_compiler.py", *question],
        cwd=machine_code.ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def check(kernels: list[dict[str, Any]]) -> None:
    assert {kernel["kernel"] for kernel in kernels} == {*TENSORS, SUM}
    for kernel in kernels:
        named = f"{kernel['kernel']}, {kernel['name']}, for {kernel['arch']}"
        code = kernel["assembly"]
        if kernel["arch"] == AMD:
            assert kernel["scratch"] == count(code, r"scratch_\w+") == 0, named
        else:
            assert kernel["STACK"] == kernel["LOCAL"] == 0, named
            assert kernel["REG"] <= 128, named
            inexact = r".*approx.*|div\.full\S*|(add|sub|mul|fma)(\.ftz)?\.f32"
            assert count(code, inexact) == 0, named
        if kernel["kernel"] == SUM:
            continue
        always, with_residual = TENSORS[kernel["kernel"]]
        reads, writes = always
        if kernel["name"] in WITH_RESIDUAL:
            reads, writes = reads + with_residual[0], writes + with_residual[1]
        load, store, single = INSTRUCTIONS[kernel["arch"]]
        assert count(code, load) >= reads, named
        assert count(code, store) >= writes, named
        assert (count(code, store) == 0) == (writes == 0), named
        assert count(code, single) == 0, named


def test_vectors_of_16_bytes_and_no_local_memory():
    check(ask()["kernels"])


@pytest.mark.slow
def test_every_layout_and_what_is_no_reason_to_compile():
    """One kernel serves every batch size, and every image of as many pixels; another where rows of
    channels are not aligned. A part of a batch has its code."""
    answer = ask("all")
    check(answer["kernels"])
    assert answer["counts"] == {
        "batch sizes": [1, 1, 1, 1],
        "images": [0, 0, 0, 0],
        "rows of channels aside": [1, 1, 1, 1],
        "codes for parts of a batch": [1, 1, 1, 1],
    }
