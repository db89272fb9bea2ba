"""The CUDA sources for every architecture: they compile without a warning, and their machine code
has no spills, no local memory, no float64, vectors of 16 bytes, and no more instructions than
tests/data/cuda_instructions.json allows (``python tests/machine_code.py --write`` renews it)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import machine_code
import pytest
from machine_code import Machine

SIZES = {"Float32": 4, "BFloat16": 2, "Float16": 2, "Pixel": 1}
TILES = ["RandnTile", "AddNoiseTile", "ReverseStepTile", "DenoisingLossTile", "VlbTermsTile"]
# Bodies of group_norm_silu: what each reads and writes of the tensors' size.
GROUP_NORM = {
    "GroupNormSiluWhole": (["x", "residual"], ["s", "y"]),
    "GroupNormSiluMoments": (["x", "residual"], ["s"]),
    "GroupNormSiluApply": (["s"], ["y"]),
    "GroupNormSiluSums": (["s", "dy"], []),
    "GroupNormSiluBwd": (["s", "dy", "dsum"], ["dx"]),
}

BUILT = ("80", "90")  # where nobody says for which: these are looked at every time
OTHERS = tuple(arch for arch in machine_code.ARCHS if arch not in BUILT)


@pytest.fixture(
    scope="module", params=[BUILT, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=str
)
def kernels(request) -> list[Machine]:
    if machine_code.missing_tool():
        pytest.skip(f"needs {machine_code.missing_tool()}")
    return machine_code.all_kernels(request.param)


def named(kernel: Machine) -> str:
    return f"{kernel.body} for sm_{kernel.arch}"


def test_every_body_is_built_for_every_architecture(kernels):
    assert {kernel.body.split("<")[0] for kernel in kernels} == {
        *TILES, "RandnBlock", "AddNoiseBlock", "ReverseStepBlock", "DenoisingLossBlock",
        "VlbTermsBlock", "DenoisingLossFinish", "VlbTermsFinish", *GROUP_NORM,
        "GroupNormSiluFinish", "GroupNormSiluSumsFinish",
    }  # fmt: skip
    archs = {kernel.arch for kernel in kernels}
    if archs not in (set(BUILT), set(OTHERS)):
        pytest.skip(f"this nvcc knows only {', '.join(sorted(archs))} of {machine_code.ARCHS}")
    assert len(kernels) == len(archs) * len({kernel.body for kernel in kernels})


def test_no_spills_and_no_local_memory(kernels):
    for kernel in kernels:
        assert kernel.stack == 0, named(kernel)
        assert kernel.count(r"\b(LDL|STL)\b") == 0, named(kernel)


def test_no_float64(kernels):
    for kernel in kernels:
        assert kernel.count(r"\b(DADD|DMUL|DFMA|DSETP|DMNMX)\b|\.F64|RCP64H") == 0, named(kernel)


APPROXIMATE = re.compile(r"\bCALL\b|MUFU\.(?!RSQ)")


def way_of(kernel: Machine) -> tuple[str, ...]:
    """A tile's way without the decoder, which the samples at t = 0 alone take: in the bound's
    kernels that is one piece, before the noise is drawn or past the last vector stored."""
    code = kernel.instructions
    if not kernel.body.startswith("VlbTermsTile"):
        return code
    end = max(i for i, line in enumerate(code) if "STG.E.128" in line) + 1
    begin = max((i + 1 for i, line in enumerate(code[:end]) if APPROXIMATE.search(line)), default=0)
    return code[begin:end]


def test_no_calls_from_tiles(kernels):
    """No subroutine (a division, a root with its special cases), no loop: one way through."""
    for kernel in kernels:
        if "Tile" in kernel.body and not kernel.body.startswith("VlbTerms"):
            assert kernel.count(r"\bCALL\b") == 0, named(kernel)


def test_no_approximate_arithmetic(kernels):
    """Of the units that approximate only the reciprocal root, whose error is corrected after it."""
    for kernel in kernels:
        if kernel.body.startswith(("VlbTermsTile", "VlbTermsBlock", "GroupNorm")):  # the decoder
            continue
        units = [re.search(r"MUFU\.(\w+)", line) for line in kernel.instructions]
        allowed = {"RSQ"} if "Tile" in kernel.body else {"RSQ", "RCP"}  # a division's
        assert {unit[1] for unit in units if unit} <= allowed, named(kernel)


def test_the_bound_does_not_pay_for_the_decoder(kernels):
    """A lane's roots and stores all lie on a way without subroutines, its loads before them."""
    for kernel in kernels:
        if not kernel.body.startswith("VlbTermsTile"):
            continue
        way = way_of(kernel)
        assert sum("MUFU.RSQ" in line for line in way) == kernel.elements // 2, named(kernel)
        assert sum("STG.E.128" in line for line in way) == kernel.count(r"STG\.E\.128")
        assert len(way) / kernel.elements < (90 if "false, false>" in kernel.body else 135)
        assert kernel.registers <= (128 if kernel.elements <= 16 else 168), named(kernel)
        code = kernel.instructions
        first = [next(i for i, line in enumerate(code) if unit in line)
                 for unit in ("LDG.E.128", "MUFU.RSQ")]  # fmt: skip
        assert first[0] < first[1], named(kernel)


def test_vectors_of_16_bytes(kernels):
    """Each tensor as wide as its place in a vector allows, the widest of them 16 bytes."""
    for kernel in kernels:
        name, _, arguments = kernel.body.partition("<")
        if name not in TILES:
            continue
        types = re.findall("|".join(SIZES), arguments)
        wide = 4 if "Float32" in types else 8  # elements of a vector
        vectors = kernel.elements // wide
        outputs = [types[0]] if name == "ReverseStepTile" else [types[-1]]
        inputs = {"RandnTile": [], "AddNoiseTile": types[:1]}.get(name, types)
        loads = sum(SIZES[kind] * wide == 16 for kind in inputs) * vectors
        stores = sum(SIZES[kind] * wide == 16 for kind in outputs) * vectors
        assert kernel.count(r"\bLDG\.E\.128") >= loads, named(kernel)
        assert kernel.count(r"\bSTG\.E\.128") >= stores > 0, named(kernel)
        plain = name in ("RandnTile", "AddNoiseTile") or kernel.body.endswith(", 0>")
        if plain and len(set(types)) == 1:
            assert kernel.count(r"\bSTG\.E\.128") == stores, named(kernel)
            assert kernel.count(r"\bSTG\b") == stores, named(kernel)


def test_group_norm_silu(kernels):
    """Vectors of 16 bytes, four or eight in flight of each tensor; no subroutine; a sigmoid is one
    power and one reciprocal of the units that approximate; room for three blocks on a
    multiprocessor, of what holds whole groups for 512 threads."""
    for kernel in kernels:
        name, _, layout = kernel.body.partition("<")
        if name not in GROUP_NORM:
            continue
        whole = name == "GroupNormSiluWhole"
        assert kernel.registers <= (128 if whole else 168), named(kernel)
        powers, divisions = kernel.count(r"MUFU\.EX2"), kernel.count(r"MUFU\.RCP")
        roots = kernel.count(r"MUFU\.RSQ")
        assert kernel.count("MUFU") == powers + divisions + roots, named(kernel)
        assert roots == whole, named(kernel)
        if name == "GroupNormSiluMoments":
            assert powers == 0, named(kernel)
            assert divisions <= 8, named(kernel)
        else:
            assert powers % kernel.elements == 0 < powers, named(kernel)
            assert powers <= divisions <= powers + 8 * whole, named(kernel)
        if layout == "Singles>":
            continue
        if not (whole and kernel.arch.startswith("8")):  # which leave loops by a CALL, and some RET
            assert kernel.count(r"\bRET\b") == 0, named(kernel)
        reads, writes = GROUP_NORM[name]
        vectors = 8 if whole else 4
        assert kernel.count(r"\bLDG\.E\.128") >= vectors * len(reads), named(kernel)
        assert kernel.count(r"\bSTG\.E\.128") >= vectors * len(writes), named(kernel)
        if name in ("GroupNormSiluApply", "GroupNormSiluBwd"):
            assert kernel.count(r"\bSTG\b") == kernel.count(r"\bSTG\.E\.128"), named(kernel)
        # They are asked for before the first power is taken: none waits for another.
        code = kernel.instructions
        first = next((i for i, line in enumerate(code) if "MUFU.EX2" in line), len(code))
        ahead = sum("LDG.E.128" in line for line in code[:first])
        assert ahead >= vectors * min(len(reads), 2), named(kernel)


def test_budgets(kernels):
    budgets = json.loads(machine_code.BUDGETS.read_text())
    assert set(budgets) == {kernel.body for kernel in kernels}
    for kernel in kernels:
        assert kernel.per_element <= budgets[kernel.body], named(kernel)
    assert budgets["ReverseStepTile<Float32, Float32, Contiguous<4>, 0>"] < 60
    assert budgets["ReverseStepTile<BFloat16, BFloat16, Contiguous<8>, 0>"] < 60


def test_the_document_says_what_is_so(kernels):
    """The table in docs/cuda.md, within what another version of the compiler changes."""
    tile = "ReverseStepTile<{}, Contiguous<{}>, {}>".format
    bodies = {
        "randn float32": "RandnTile<Float32, Contiguous<4>>",
        "add_noise float32": "AddNoiseTile<Float32, Float32, Contiguous<4>>",
        "add_noise uint8 → float32": "AddNoiseTile<Pixel, Float32, Contiguous<4>>",
        "reverse_step float32": tile("Float32, Float32", 4, 0),
        "reverse_step float32, model bfloat16, with bfloat16 output": tile(
            "Float32, BFloat16", 4, 0
        ),
        "reverse_step bfloat16": tile("BFloat16, BFloat16", 8, 0),
        "reverse_step float32 with guidance": tile("Float32, Float32", 4, 1),
        "reverse_step float32 with learned variance": tile("Float32, Float32", 4, 2),
        "denoising_loss float32": "DenoisingLossTile<Float32, Contiguous<4>, false>",
        "denoising_loss bfloat16": "DenoisingLossTile<BFloat16, Contiguous<8>, false>",
        "denoising_loss float32, x_0 in the target": (
            "DenoisingLossTile<Float32, Contiguous<4>, true>"
        ),
        "vlb_terms float32": "VlbTermsTile<Float32, Contiguous<4>, false, false>",
        "vlb_terms float32 with learned variance": (
            "VlbTermsTile<Float32, Contiguous<4>, true, false>"
        ),
        "hybrid_loss float32": "VlbTermsTile<Float32, Contiguous<4>, true, true>",
    }
    document = (machine_code.ROOT / "docs" / "cuda.md").read_text()
    table = re.findall(r"^\| (.*?) \| ([\d.]+) \| (\d+) \| \d+ \|$", document, re.M)
    assert [row[0] for row in table] == list(bodies)
    for name, instructions, registers in table:
        for kernel in kernels:
            if kernel.body == bodies[name]:
                assert kernel.registers == pytest.approx(int(registers), rel=0.15), name
                found = len(way_of(kernel)) / kernel.elements
                assert found == pytest.approx(float(instructions), rel=0.06), name


def test_the_document_says_what_is_so_of_norms(kernels):
    """docs/cuda.md's table of group_norm_silu, on sm_90."""
    document = (machine_code.ROOT / "docs" / "cuda.md").read_text()
    rows = re.findall(r"^\| (float32|bfloat16), (\w+)((?: \| \d+\.\d){5}) \|$", document, re.M)
    assert len(rows) == 4
    on_90 = {kernel.body: kernel.per_element for kernel in kernels if kernel.arch == "90"}
    for dtype, layout, numbers in rows:
        vectors = f"<WholeVectors<{'BFloat16' if dtype == 'bfloat16' else 'Float32'}, "
        vectors += "true>>" if layout == "channels_last" else "false>>"
        said = [float(number) for number in numbers.split(" | ")[1:]]
        found = [on_90[name + vectors] for name in GROUP_NORM] if on_90 else said
        assert found == pytest.approx(said, rel=0.06), vectors


def test_the_square_root_is_the_compilers_own(tmp_path: Path):
    """core/lanes.h spells out the short way of __fsqrt_rn, which rounds correctly. This compiler
    takes that way, for arguments from 2^-101 to 2^126, on every architecture."""
    if machine_code.missing_tool():
        pytest.skip(f"needs {machine_code.missing_tool()}")
    source = tmp_path / "root.cu"
    source.write_text("__global__ void root(float* x) { x[threadIdx.x] = __fsqrt_rn(*x); }")
    for arch in machine_code.known_archs():
        machine_code.compile_cubin(source, arch, tmp_path / "root.cubin")
        (lines,) = machine_code.functions_of(tmp_path / "root.cubin").values()
        code = "\n".join(lines)
        found = re.search(
            r"MUFU\.RSQ (?P<y>R\d+), (?P<x>R\d+)[\s\S]*?"
            r"FMUL\.FTZ (?P<g>R\d+), (?P=x), (?P=y)\s*\n"
            r"FMUL\.FTZ (?P<h>R\d+), (?P=y), 0\.5\s*\n"
            r"FFMA (?P<e>R\d+), -(?P=g), (?P=g), (?P=x)\s*\n"
            r"FFMA R\d+, (?P=e), (?P=h), (?P=g)\s*\n",
            code,
        )
        in_range = re.search(r"ADD\S* (?P<r>R\d+), .*-0xd000000\b[\s\S]*?"
                             r"ISETP\.GT\.U32\.AND \S+ PT, (?P=r), 0x727fffff\b", code)  # fmt: skip
        assert in_range, f"sm_{arch}:\n{code}"
        assert found, f"sm_{arch}:\n{code}"
