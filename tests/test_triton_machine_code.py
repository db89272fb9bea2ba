"""What Triton makes of its kernels for sm_80, sm_90 and gfx942, read without a GPU: vectors of 16
bytes, roots that round correctly, no product contracted into an addition, no local memory; and
how many kernels are compiled for launches that differ."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import machine_code
import pytest

from ddpm_fast.kernels import support

NVIDIA, AMD = ["80", "90"], "gfx942"
QUESTIONS = [*NVIDIA, AMD, "launches"]
WHOLE = ["contiguous", "channels_last 3", "channels_last 4"]
LOOKING_FOR_NAN = ["reverse_step float32, looking for NaN", "reverse_step float32 with everything"]
# Bytes an element of each tensor of x's size.
READS = {
    "randn float32": [],
    "add_noise float32": [4],
    "reverse_step float32": [4, 4],
    "reverse_step float32 with learned variance": [4, 8],
    "reverse_step float32 with guidance": [4, 4, 4],
    "reverse_step float32, noise given": [4, 4, 4],
    "reverse_step float32, looking for NaN": [4, 4],
    "randn bfloat16": [],
    "reverse_step bfloat16": [2, 2],
    "reverse_step float16": [2, 2],
    "reverse_step bfloat16 with learned variance": [2, 4],
    "denoising_loss float32": [4],
    "denoising_loss float32 of v, with a second half": [4, 4],
    "denoising_loss float32 of v, with a second half, channels_last 3": [4, 8],  # side by side
    "denoising_loss bfloat16": [2],
}
# Bytes an element that the bound's terms read and write 16 at a time.
BOUND = {
    "vlb_terms float32": (8, 4),
    "hybrid_loss float32": (12, 8),
    "vlb_terms bfloat16 of uint8, learned variance, tanh": (4, 4),
}
# Of a thread of the kernels whose vectors are whole; 3 channels make 12.
ELEMENTS = {"contiguous": 16, "channels_last 3": 12, "channels_last 4": 16}


def ask(question: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(machine_code.ROOT / "build" / "tests" / "triton")
    run = subprocess.run(
        [sys.executable, "tests/triton_compiler.py", question],
        cwd=machine_code.ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    if support.triton_problem():
        pytest.skip(support.triton_problem())
    if machine_code.find_tool("cuobjdump") is None:
        pytest.skip("needs cuobjdump")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(QUESTIONS, pool.map(ask, QUESTIONS), strict=True))


@pytest.fixture
def kernels(answers) -> list[dict[str, Any]]:
    return [kernel for arch in (*NVIDIA, AMD) for kernel in answers[arch]]


@pytest.fixture
def nvidia(answers) -> list[dict[str, Any]]:
    return [kernel for arch in NVIDIA for kernel in answers[arch]]


def named(kernel: dict[str, Any]) -> str:
    return f"{kernel['name']}, {kernel['layout']}, for {kernel['arch']}"


def of_the_bound(kernel: dict[str, Any]) -> bool:
    """Those that also have the decoder, which divides and takes logarithms, and whose programs at
    t = 0 take four elements a thread at a time."""
    return kernel["name"].startswith(("vlb_terms", "hybrid_loss"))


def shares(kernel: dict[str, Any]) -> int:
    """Floats that a program leaves of a sample's sums."""
    return {"denoising_loss": 1, "vlb_terms": 2, "hybrid_loss": 3}.get(kernel["name"].split()[0], 0)


def count(instructions: dict[str, int], pattern: str) -> int:
    return sum(number for name, number in instructions.items() if re.fullmatch(pattern, name))


def test_no_local_memory(kernels):
    for kernel in kernels:
        if kernel["arch"] == AMD:
            assert kernel["scratch"] == 0, named(kernel)
            assert count(kernel["assembly"], r"scratch_\w+") == 0, named(kernel)
        else:
            assert kernel["STACK"] == kernel["LOCAL"] == 0, named(kernel)
            assert count(kernel["assembly"], r"(ld|st)\.local\S*") == 0, named(kernel)
            assert count(kernel["machine"], r"(LDL|STL)\S*") == 0, named(kernel)


def test_nothing_approximate(nvidia):
    """The roots are those that round to nearest, one for two normals."""
    for kernel in nvidia:
        assert count(kernel["assembly"], r".*approx.*") == 0, named(kernel)
        inexact = r"(sin|cos|ex2|lg2|rcp|rsqrt|div(?!\.rn))\.\S*f\d+"
        assert count(kernel["assembly"], inexact) == 0, named(kernel)
        if not of_the_bound(kernel) and kernel["layout"] != "sums":
            assert count(kernel["assembly"], r"div\.\S*f\d+") == 0, named(kernel)
        assert count(kernel["assembly"], r"sqrt\S*") == count(kernel["assembly"], r"sqrt\.rn\.f32")
        if kernel["layout"] in WHOLE:
            roots = count(kernel["assembly"], r"sqrt\.rn\.f32")
            drawn = 0 if "noise given" in kernel["name"] else ELEMENTS[kernel["layout"]]
            if of_the_bound(kernel):
                drawn = kernel["of a thread"] + 4
            assert 2 * roots == drawn, named(kernel)


def test_nothing_is_contracted(answers, nvidia):
    """On NVIDIA's GPUs every operation says that it rounds, which forbids it to the assembler. On
    AMD's there are as many fused multiply-adds as on those, and five a root."""
    for kernel in nvidia:
        assert count(kernel["assembly"], r"(add|sub|mul|fma)(\.ftz)?\.f32") == 0, named(kernel)
        assert count(kernel["assembly"], r"mad\.\S*f32") == 0, named(kernel)
        if kernel["layout"] != "sums":
            assert count(kernel["assembly"], r"\S*\.f64") == 0, named(kernel)
    fused = {
        (kernel["name"], kernel["layout"]): count(kernel["assembly"], r"fma\.rn\.f32")
        for kernel in answers["90"]
    }
    for kernel in answers[AMD]:
        if kernel["layout"] in WHOLE and not of_the_bound(kernel):
            found = count(kernel["assembly"], r"v_(fma|fmac|fmaak|fmamk|mad|mac)_f32\w*")
            found += 2 * count(kernel["assembly"], r"v_pk_fma_f32\w*")
            found -= 5 * count(kernel["assembly"], r"v_rsq_f32\w*")
            assert found == fused[kernel["name"], kernel["layout"]], named(kernel)


def test_vectors_of_16_bytes(kernels):
    """All that has the width of x: 8 bytes where 3 channels have 16 bits, and beside a wider x."""
    for kernel in kernels:
        if kernel["layout"] not in WHOLE or of_the_bound(kernel):
            continue
        code, name = kernel["assembly"], kernel["name"]
        wide = r"buffer_store_dwordx4" if kernel["arch"] == AMD else r"st\.global\.v4\.b32"
        narrow = r"buffer_store_dwordx2" if kernel["arch"] == AMD else r"st\.global\.v2\.b32"
        stores = count(code, r"(buffer_store|st\.global)\S*")
        if kernel["arch"] != AMD:  # on AMD's GPUs shares are global_store
            stores -= shares(kernel)
        beside = "bfloat16 output" in name or "everything" in name
        if "float32" not in name and kernel["layout"] == "channels_last 3":
            assert count(code, narrow) == stores > 0, named(kernel)
        elif beside:
            assert count(code, wide) + count(code, narrow) == stores, named(kernel)
            assert count(code, wide) >= count(code, narrow) > 0, named(kernel)
        else:
            assert count(code, wide) == stores > 0, named(kernel)
        if kernel["arch"] == AMD and "second half" in name and kernel["layout"] != "contiguous":
            continue  # its compiler leaves out what nobody asks for of a vector
        tensors = READS.get(f"{name}, {kernel['layout']}", READS.get(name))
        if tensors is not None and stores == count(code, wide):
            reads = ELEMENTS[kernel["layout"]] * sum(tensors) // 16
            load = r"buffer_load_dwordx4" if kernel["arch"] == AMD else r"ld\.global\.v4\.b32"
            assert count(code, load) == reads, named(kernel)
            others = r"buffer_load_(?!dwordx4)\w+|ld\.global\.(b16|b8|v2\S*)"
            assert count(code, others) == 0, named(kernel)


def test_vectors_of_16_bytes_of_the_bound(nvidia):
    """But for the shares, and what is done at t = 0 with four elements of 16 bits at a time."""
    for kernel in nvidia:
        if kernel["layout"] in WHOLE and of_the_bound(kernel):
            code, parts = kernel["assembly"], 1 if "float32" in kernel["name"] else 0
            reads, writes = (
                (kernel["of a thread"] + 4 * parts) * number // 16
                for number in BOUND[kernel["name"]]
            )
            assert count(code, r"ld\.global\.v4\.b32") == reads, named(kernel)
            assert count(code, r"st\.global\.v4\.b32") == writes, named(kernel)
            narrow = 0 if parts else BOUND[kernel["name"]][1] * 4 // 8
            assert count(code, r"st\.global\.v2\.b32") == narrow, named(kernel)
            assert count(code, r"st\.global\S*") == writes + narrow + shares(kernel), named(kernel)


def test_registers_are_renamed_and_nothing_moves(kernels):
    """Between a tile's vectors and the tensors in which its noise is drawn lies no memory, and no
    exchange among threads. Only what looks for NaN asks them all, and sums go from one to the
    other: in two steps, among a warp's threads and among warps."""
    for kernel in kernels:
        if kernel["layout"] not in WHOLE:
            continue
        if shares(kernel):
            if kernel["arch"] != AMD:
                assert count(kernel["assembly"], r"shfl\.(?!sync\.bfly)\S+") == 0, named(kernel)
                assert kernel["shared"] <= 16, named(kernel)
        elif kernel["name"] not in LOOKING_FOR_NAN:
            assert kernel["shared"] == 0, named(kernel)
            moved = count(kernel["assembly"], r"(shfl|ld\.shared|st\.shared|bar)\S*|ds_\w+")
            assert moved == 0, named(kernel)


def test_what_is_no_reason_to_compile(answers):
    """One kernel serves every batch size, seed and row, and every image that is cut alike."""
    assert answers["launches"] == {
        "batch sizes": 1,
        "images": 0,
        "seeds": 1,  # of smaller images, which are cut otherwise
        "rows": 0,
        "rows on the device": 1,
        "clips and scales": 1,
        "scales on the device": 1,
        "ids on the device": 1,
        "odd images": 2,  # of 245 elements a single tile is enough
        "another layout": 1,
        "another dtype": 1,
        "draws": 1,
        "draws of images": 1,
        "draws of odd images": 2,
        "timesteps": 1,
        "timesteps on the device": 1,
        "losses": 1,
        "losses of images": 1,  # where there are as many elements as 128 threads take
        "losses at timesteps on the device": 1,
        "their sums": 0,  # compiled with the first of the losses
        "terms": 1,
        "terms of images": 1,
        "their totals": 0,
        "codes for parts of a batch, images": 1,
        "codes for parts of a batch, 12 elements": 1,
        "codes for parts of a batch, 63 elements": 1,
        "codes for parts of a batch, 63 elements in channels_last": 1,
    }


def test_the_document_says_what_is_so(answers):
    """The table in docs/triton.md, within what another version of the compiler changes."""
    document = (machine_code.ROOT / "docs" / "triton.md").read_text()
    table = re.findall(r"^\| (.*?) \| ([\d.]+) \| (\d+) \|$", document, re.M)
    found = {k["name"]: k for k in answers["90"] if k["layout"] == "contiguous"}
    assert [name for name, *_ in table] == list(found)
    for name, instructions, registers in table:
        assert found[name]["per element"] == pytest.approx(float(instructions), rel=0.06), name
        assert found[name]["REG"] == pytest.approx(int(registers), rel=0.15), name
