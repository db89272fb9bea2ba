"""The page of numbers, and the figures in the documents: of the results, and of nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report
import report_blocks
import report_charts as charts
from report_data import Device, duration, longer, quoted_device, read_devices, significant
from report_figures import BLOCKS
from report_page import describe
from report_render import Figure, Table, Text, figures, markdown

ROOT = Path(__file__).parent.parent
OURS = "ddpm_fast"


def row(case: str, shape: list[int], ours: float = 10.0, **others: Any) -> dict[str, Any]:
    """As a run leaves it; ``others``: microseconds by candidate, or what else it holds."""
    times = {k.replace("_", " "): v for k, v in others.items() if isinstance(v, float)}
    elements = 1
    for size in shape:
        elements *= size
    return {
        "op": case.split()[0].strip(","),
        "case": f"{case} {shape}",
        "shape": shape,
        "dtype": "float32",
        "elements": elements,
        "bytes": 12 * elements,
        "flops": None,
        "microseconds": {OURS: ours, **times},
        "ratio": {name: round(us / ours, 2) for name, us in times.items()},
        "gigabytes_per_second": round(12e-3 * elements / ours, 2),
        "percent_of_copy": 50.0,
        "date": "2030-01-02",
        "copy_gigabytes_per_second": 40.0,
        "quick": False,
        **{k: v for k, v in others.items() if not isinstance(v, float)},
    }


def save(folder: Path, name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub('[^A-Za-z0-9]+', '-', name)}.json"
    whole = {"device": name, "date": "2030-01-02", "torch": "2.13.0", "backend": "avx2"}
    path.write_text(json.dumps({**whole, "ddpm_fast": "0", "quick": False, "rows": rows, **more}))
    return path


def steps(*batches: int, **others: Any) -> list[dict[str, Any]]:
    return [row("reverse_step float32", [n, 3, 32, 32], 4.0 * n, **others) for n in batches]


def trajectories(sides: tuple[int, ...] = (32, 64)) -> list[dict[str, Any]]:
    return [
        row("sample, small UNet, DDIM", [n, 3, side, side], 1e4 * n * side, eager=2.5e4 * n * side,
            images=n, steps=50)
        for side in sides
        for n in (1, 4)
    ]  # fmt: skip


@pytest.fixture
def devices(tmp_path: Path) -> list[Device]:
    """Two, one of which has less."""
    save(tmp_path, "Big CPU", [*steps(1, 16, 1024, eager=99.0), *trajectories()])
    late = [r | {"date": "2030-02-03"} for r in steps(1, 16, eager=50.0)]
    save(tmp_path, "Small CPU", late, date="2030-02-03")
    return read_devices(tmp_path)


def drawn(parts: list[Any]) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures(parts)}


def said(parts: list[Any]) -> str:
    return "\n".join(part.text for part in parts if isinstance(part, Text))


def test_documents_agree_with_the_results():
    """README, docs and the page; `python benchmarks/report.py --update` makes them agree."""
    found = report.disagreements(ROOT, read_devices(ROOT / "benchmarks/results"))
    assert not found, "\n".join(found)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "benchmarks/results", tmp_path / "results")
    return tmp_path


def checked(root: Path) -> int:
    return report.main(["--root", str(root), "--results", str(root / "results"), "--check"])


@pytest.mark.parametrize("name", ["README.md", "docs/plan.md", "docs/numbers.md"])
def test_an_edited_figure_is_found(copied, name, capsys):
    assert checked(copied) == 0
    path = copied / name
    text = path.read_text()
    start = text.index("<!-- figures:") if "<!-- figures:" in text else text.index("Every row")
    table = text.index("| --", start)
    changed = re.sub(r"\d(?= ms|×)", lambda d: str((int(d[0]) + 1) % 10), text[table:], count=1)
    path.write_text(text[:table] + changed)
    assert checked(copied) == 1
    printed = capsys.readouterr().out
    assert f"--- {name}" in printed
    assert "report.py --update" in printed


def test_other_results_are_found_and_written(copied, capsys):
    """A new run: documents, page and drawings disagree, and --update brings them."""
    path = next((copied / "results").glob("AMD*.json"))
    results = json.loads(path.read_text())
    for each in results["rows"]:
        each["microseconds"] = {name: 1.5 * us + 1 for name, us in each["microseconds"].items()}
    path.write_text(json.dumps(results))
    assert checked(copied) == 1
    printed = capsys.readouterr().out
    assert "--- README.md" in printed
    assert re.search(r"numbers-step-\S+svg: drawn from other results", printed)


def test_update_writes_what_check_accepts(tmp_path, capsys):
    save(tmp_path / "results", "Big CPU", [*steps(16, 1024, eager=99.0), *trajectories()])
    (tmp_path / "docs/images").mkdir(parents=True)
    (tmp_path / "docs/images/numbers-step-gone.svg").write_text("<svg/>")
    blocks = "\n\n".join(f"<!-- figures: {name} -->\nold\n<!-- end figures -->" for name in BLOCKS)
    (tmp_path / "README.md").write_text(f"# Before\n\n{blocks}\n\nafter\n")
    assert checked(tmp_path) == 1
    arguments = ["--root", str(tmp_path), "--results", str(tmp_path / "results")]
    assert report.main([*arguments, "--update"]) == 0
    assert checked(tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("\n\nafter\n")
    assert "\nold\n" not in text
    assert text.count("Not measured on this device (Big CPU).") == len(BLOCKS) - 2
    assert "| `reverse_step` | 64.0 µs | 1.55× | 4.10 ms | 0.02× | 50 % |" in text
    assert "*Big CPU, 2030-01-02; 50 steps; bold: the fastest of the others.*" in text
    assert "can pass those of a copy, which is far larger.*" in text
    assert not (tmp_path / "docs/images/numbers-step-gone.svg").exists()
    assert (tmp_path / "build/numbers.html").exists()


def test_drawings_are_the_same_each_time_and_whole(devices):
    from report_drawing import svg

    for figure in drawn(describe(devices)).values():
        first = svg(figure.chart, figure.title)
        assert first == svg(figure.chart, figure.title)
        assert f'data-chart="{charts.digest(figure.chart)}"' in first
        assert not re.search(r"<dc:date|#[0-9a-f]{6}(?![\w-])(?!;)", first.split("</style>")[1])
        used = set(re.findall(r"(?:href=\"|url\()#([\w.-]+)", first))
        assert used <= set(re.findall(r' id="([^"]+)"', first))


class Loads(HTMLParser):
    """What a page would fetch, and the names it gives twice."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "object", "embed", "img"):
            self.found.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action") and value[:1] != "#":
                self.found.append(f"{tag} {name}={value}")


def test_html_is_self_contained(tmp_path):
    page = tmp_path / "page.html"
    save(tmp_path / "results", "A <b> & CPU", [*steps(1, 16, eager=99.0), *trajectories()])
    arguments = ["--root", str(tmp_path), "--results", str(tmp_path / "results")]
    assert report.main([*arguments, "--html", str(page)]) == 0
    text = page.read_text()
    loads = Loads()
    loads.feed(text)
    assert loads.found == []
    assert not re.search(r"@import|url\((?!#)", text)
    assert text.count("<svg") > 3
    assert "A &lt;b&gt; &amp; CPU" in text
    assert "A <b>" not in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert all(f'id="{link}"' in text for link in re.findall(r'<a href="#([^"]+)"', text))
    assert len(set(ids)) == len(ids)


def numbers(cell: str) -> list[str]:
    return re.findall(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?", cell)


def is_of(shown: str, values: list[float]) -> bool:
    """It is one of these, rounded to as many digits."""
    plain = shown.replace(",", "")
    decimals = len(plain.partition(".")[2])
    form = ".1e" if "e" in plain else f".{decimals}f"
    return any(format(value, form) == plain for value in values)


def held(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for each in value.values() for number in held(each)]
    if isinstance(value, list):
        return [number for each in value for number in held(each)]
    return [float(value)] if isinstance(value, (int, float)) else []


def test_numbers_of_the_tables_stand_in_the_results():
    """Every row has a line, and every figure in it is one of the row's or a ratio of two."""
    devices = read_devices(ROOT / "benchmarks/results")
    tables = [part for part in describe(devices) if isinstance(part, Table) and part.folded]
    lines = [(table, line) for table in tables for line in table.rows]
    rows = [each for device in devices for each in device.rows]
    assert len(lines) == len(rows)
    found = 0
    for table, line in lines:
        device = next(d for d in devices if f"{d.title}, " in table.caption)
        each = next(r for r in device.rows if r["case"] == line[0])
        times = each["microseconds"]
        values = held(each) + [us / times[OURS] for us in times.values()]
        values += [times[OURS] / 1e3 / each["images"]] if each.get("images") else []
        values += [each["flops"] / times[OURS] / 1e3] if each.get("flops") else []
        for cell in line[1:]:
            for shown in numbers(re.sub(r"\d{4}-\d\d-\d\d|\+?[\w.]+: ", "", cell)):
                assert is_of(shown, values), (line[0], cell)
                found += 1
    assert found > 5 * len(rows)


def test_several_devices_stand_side_by_side(devices):
    parts = describe(devices)
    found = drawn(parts)
    assert {"numbers-bandwidth-big-cpu", "numbers-bandwidth-small-cpu"} <= set(found)
    assert found["numbers-bandwidth-small-cpu"].caption == "Small CPU, 2030-02-03"
    table = next(p for p in parts if isinstance(p, Table) and "Big CPU" in p.head)
    assert table.head == ("", "Small CPU", "Big CPU")
    assert table.rows[0] == (
        "reverse_step float32 [1, 3, 32, 32]",
        "4.00 µs, eager 12.5×",
        "4.00 µs, eager 24.8×",
    )


def test_what_is_missing_is_said_and_not_drawn(devices):
    parts = describe(devices)
    assert "Not measured on Small CPU: whole trajectories" in said(parts)
    assert "Not measured on Small CPU; Big CPU: sessions." in said(parts)
    assert "Nothing here was measured on a GPU." in said(parts)
    assert not any("small-cpu" in name for name in drawn(parts) if "trajectories" in name)
    assert "There are no results yet" in said(describe([]))


def test_every_op_without_a_row_is_said(tmp_path):
    save(tmp_path, "CPU", steps(1, 16))
    save(tmp_path, "NVIDIA X", steps(1, 16))
    text = said(describe(read_devices(tmp_path)))
    host, gpu = (
        next(line for line in text.splitlines() if line.startswith(f"Not measured on {name}: W"))
        for name in ("CPU", "NVIDIA X")
    )
    assert (
        "Whole trajectories, A step of sampling, The rewrites of a plan, randn, add_noise" in host
    )
    assert "`reverse_step guidance`" in host
    assert "reverse_step float32" not in host
    assert "What a launch costs" in gpu
    assert "What a launch costs" not in host


def test_bandwidth_is_held_against_the_copy_of_its_own_run(tmp_path):
    rows = steps(1, 16)
    rows[0] |= {"percent_of_copy": 140.0, "copy_gigabytes_per_second": 10.0}
    save(tmp_path, "CPU", rows)
    chart = charts.bandwidth(read_devices(tmp_path)[0])
    assert chart.lines == (charts.Line("reverse_step", ((3072, 140.0), (49152, 50.0))),)
    assert chart.level == ("a copy beyond all caches", 100.0)


def test_the_fastest_of_the_others_is_bold(tmp_path):
    rows = trajectories(sides=(32,))[:1]
    ours = rows[0]["microseconds"][OURS]
    rows[0]["microseconds"] |= {"torch.compile, channels_last": 2 * ours, f"{OURS}, exact": ours}
    save(tmp_path, "CPU", rows)
    lines = BLOCKS["end-to-end"](read_devices(tmp_path)[0]).splitlines()
    bold = [line for line in lines if "×**" in line]
    assert bold == ["| torch.compile, channels_last | **2.0×** |"]


@pytest.mark.parametrize("large", [256, 1024])
def test_the_largest_size_of_pipelines_is_shown(tmp_path, large):
    shapes = [[n, 3, 32, 32] for n in (1, 16, 256, large)]
    rows = [row("OpenAI p_sample learned_range", s, 1.0 * s[0], OpenAI=2.0 * s[0]) for s in shapes]
    rows = [each | {"op": "openai"} for each in {each["case"]: each for each in rows}.values()]
    save(tmp_path, "CPU", rows)
    assert f"2.0× ([{large}, 3, 32, 32], " in BLOCKS["pipelines"](read_devices(tmp_path)[0])


def test_scaling_with_batch_and_size(devices):
    big = next(device for device in devices if device.name == "Big CPU")
    by_batch = charts.scaling_with_batch(big.of("sample"), "time")
    assert list(by_batch) == [
        "sample, small UNet, DDIM, 3×32×32",
        "sample, small UNet, DDIM, 3×64×64",
    ]
    ours = by_batch["sample, small UNet, DDIM, 3×32×32"].lines[0]
    assert ours == charts.Line(OURS, ((1.0, pytest.approx(0.32)), (4.0, pytest.approx(0.32))))
    by_size = charts.scaling_with_size(big.of("sample"), "time")
    assert [
        line.points[-1][0] for line in by_size["sample, small UNet, DDIM, 4 at a time"].lines
    ] == [
        4096.0,
        4096.0,
    ]
    bars = charts.end_to_end(big.of("sample"), "time")
    assert [bar.text for bar in bars.panels[0].groups[1].bars] == [
        "ddpm_fast 320 ms",
        "eager 800 ms, 2.5×",
    ]


def test_intensity_where_operations_are_known(tmp_path):
    known = row("conv float32", [1, 3, 32, 32], 10.0, flops=36864)
    save(tmp_path, "CPU", [known, *steps(1, 2)])
    chart = charts.intensity(read_devices(tmp_path)[0])
    assert chart.lines == (charts.Line("conv", ((1.0, pytest.approx(3.6864)),)),)
    assert chart.slope == ("memory's limit", 40.0)


def test_every_kind_of_chart_is_drawn(tmp_path):
    """What no device of today has, too."""
    from report_drawing import svg

    rows = [row("conv float32", [n, 3, 32, 32], 10.0 * n, flops=36864 * n) for n in (1, 4)]
    save(tmp_path, "CPU", rows)
    text = svg(charts.intensity(read_devices(tmp_path)[0]), "")
    assert "memory's limit, 40.0 GB/s" in text
    assert "floating-point operations a byte" in text


def test_baselines_are_others(tmp_path):
    rows = steps(2, eager=99.0)
    rows[0]["microseconds"] |= {"our float32": 9.0, "reference": 9999.0, "torch.compile": 80.0}
    save(tmp_path, "CPU", rows)
    chart = charts.speedups(read_devices(tmp_path)[0].rows)
    (group,) = chart.panels[0].groups
    assert [bar.text for bar in group.bars] == ["torch.compile 10.0×", "eager 12.4×"]


def test_failed_rows_have_no_speed(tmp_path):
    wrong = row("reverse_step float32", [16, 3, 32, 32], 1.0)
    wrong |= {"microseconds": {}, "ratio": {}, "failed": "wrong result (max error 3)"}
    save(tmp_path, "CPU", [*steps(1, 1024, eager=99.0), wrong])
    (device,) = read_devices(tmp_path)
    assert len(device.measured) == 2
    text = markdown("T", describe([device]), "images")
    assert "| reverse_step float32 [16, 3, 32, 32] | failed: wrong result (max error 3) |" in text
    assert "failed" not in BLOCKS["kernels"](device)


def test_quick_runs_are_shown_only_if_wanted(tmp_path):
    save(tmp_path, "CPU quick", steps(1, eager=9.0), quick=True, device="CPU")
    assert read_devices(tmp_path) == []
    (device,) = read_devices(tmp_path, quick=True)
    assert device.title == "CPU (quick run)"
    assert quoted_device([device]) is None


def test_rows_of_before_the_schema(tmp_path):
    old = {
        "case": "reverse_step float32",
        "elements": 49152,
        "microseconds": {OURS: 20.0, "eager": 160.0},
        "ratio": {"eager": 8.0},
    }
    save(tmp_path, "CPU", [old], copy_gigabytes_per_second=40.0)
    (device,) = read_devices(tmp_path)
    assert device.source() == "CPU, 2030-01-02"
    assert "| `reverse_step` | 20.0 µs | 8.0× |  |  |" in BLOCKS["kernels"](device)


def test_the_newest_full_results_are_quoted(devices):
    assert quoted_device(devices).name == "Big CPU"  # Small CPU has two rows of seven
    small = next(device for device in devices if device.name == "Small CPU")
    assert quoted_device([*devices, dataclasses.replace(small, rows=small.rows * 2)]).name == (
        "Small CPU"
    )
    text = "<!-- figures: steps of Small CPU -->\n<!-- end figures -->"
    assert "this device (Small CPU)" in report_blocks.rewritten(text, devices)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<!-- figures: steps -->\n", "begin and end on lines of their own"),
        ("<!-- figures: nothing -->\n<!-- end figures -->", "nothing: no such block; there are "),
        ("<!-- figures: steps of X -->\n<!-- end figures -->", "steps: no results of X"),
    ],
)
def test_blocks_that_cannot_be_written(tmp_path, text, error, capsys):
    save(tmp_path / "results", "CPU", steps(1))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(text)
    assert checked(tmp_path) == 2
    assert error in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": 3}', '{"rows": []}', '{"rows": [{}]}'])
def test_files_that_are_no_results(tmp_path, text, capsys):
    (tmp_path / "bad.json").write_text(text)
    assert report.main(["--root", str(tmp_path), "--results", str(tmp_path)]) == 2
    assert "bad.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"microseconds": 3}, {"microseconds": {OURS: "fast"}}, {"shape": [1, "3"]}, {"flops": []}],
)
def test_rows_that_are_none(tmp_path, change, capsys):
    save(tmp_path, "CPU", [{**steps(1)[0], **change}])
    assert report.main(["--root", str(tmp_path), "--results", str(tmp_path)]) == 2
    assert "CPU.json: the row 'reverse_step float32 [1, 3, 32, 32]' is" in capsys.readouterr().err


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path / "no"), "--check"]) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (0.0123, "12.3 ms"), (0.9996, "1.00 s"), (2.5e-7, "250 ns"), (4321.0, "4,321 s")],
)
def test_durations(value, shown):
    assert duration(value) == shown


def test_other_numbers():
    assert [longer(r) for r in (0.97, 1.994, 1.996, 12.66, 99.6)] == [
        "0.97×",
        "1.99×",
        "2.0×",
        "12.7×",
        "100×",
    ]
    assert [significant(v) for v in (43.85, 1234.5, 0.00123)] == ["43.9", "1,234", "0.00123"]


TIMING = re.compile(r"\d ?(?:µs|ms)\b|\d×(?![\d ]*\d)")
QUOTING = [
    "README.md",
    *(f"docs/{name}.md" for name in ("pipelines", "plan", "sessions", "training")),
]
QUOTING += sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/pipelines/*.md"))


@pytest.mark.parametrize("name", QUOTING)
def test_no_timing_stands_outside_a_block(name):
    """But those that were taken by hand, whose paragraph says when."""
    paragraphs = report_blocks.BLOCK.sub("", (ROOT / name).read_text()).split("\n\n")
    timed = [each for each in paragraphs if TIMING.search(each)]
    assert not [each for each in timed if not re.search(r"\b20\d\d-\d\d-\d\d\b", each)]
