"""What is shown of long jobs: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import sys

import pytest
from tiny_run import write_run

from ddpm_fast import progress
from ddpm_fast.cli import main
from ddpm_fast.progress import job, per_second, span

pytestmark = pytest.mark.usefixtures("one_thread")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock.monotonic)
    return clock


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (59.9, "59.9 s"),
        (59.96, "0:01:00"),
        (3599.6, "1:00:00"),
        (360_000, "100:00:00"),
    ],
)
def test_spans(seconds, text):
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("count", "seconds", "text"),
    [
        (64, 2, "32 images/s"),
        (99, 1.0006, "98.9 images/s"),
        (12800, 10, "1280 images/s"),
        (64, 7200, "0.00889 images/s"),
    ],
)
def test_rates(count, seconds, text):
    assert per_second(count, seconds) == text


def test_lines_now_and_then(clock, monkeypatch):
    """What was there counts in the total, and neither in the rate nor in the time that is left."""
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with job(True, 50_000, 12_800, "drawing") as shown:
        assert log.getvalue() == "drawing: 12800/50000 images\n"
        clock.now += 2
        shown.update(64)
        clock.now += 2
        shown.update(64)
        for _ in range(2000):
            clock.now += 0.0625
            shown.update(8)
    lines = log.getvalue().splitlines()[1:]
    assert lines[0] == "drawing: 12864/50000 images, 32 images/s, ETA 0:19:20"
    assert lines[1] == "drawing: 16512/50000 images, 116 images/s, ETA 0:04:49"
    assert [int(line.split()[1].partition("/")[0]) for line in lines] == [
        12864,
        16512,
        20352,
        24192,
        28032,
    ]
    assert "\r" not in log.getvalue()


def test_what_is_found_later_counts_as_there(clock, monkeypatch):
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with job(True, 1000, 100, "drawing") as shown:
            clock.now += 100
            shown.update(50, 350)
        assert "500/1000" in stream.getvalue()
        assert "0.5 images/s" in stream.getvalue()


def test_nothing_but_what_was_there(clock, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with job(True, 1000, 1000, "drawing") as shown:
        clock.now += 100
        shown.update(0)
    assert log.getvalue() == "drawing: 1000/1000 images\n"


def test_a_bar_on_a_terminal(monkeypatch):
    """Its rate is images a second below one too, the mean of all that were drawn."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with job(True, 50_000, 12_800, "drawing") as shown:
        for count, there in ((64, 0), (0, 1000), (192, 0)):
            shown._began -= 1000
            shown._bar.start_t -= 1000
            shown._bar.last_print_t -= 1000
            shown.update(count, there)
    bars = terminal.getvalue().split("\r")
    assert "| 12800/50000 [00:00<?]" in bars[1]
    assert bars[-1].startswith("drawing:  28%|")
    # (50000 − 14056) images at 256 in 3000 s
    for shown_bar in bars[-2:]:  # closed, and before
        assert "| 14056/50000 [50:00<117:00:" in shown_bar
    assert bars[-1].endswith("0.0853 images/s]\n")


def test_lines_on_a_terminal_that_processes_share(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with job(True, 8, 0, "process 1 draws", lines=True):
        pass
    assert terminal.getvalue() == "process 1 draws: 0/8 images\n"


def test_nothing_where_it_is_not_wanted(capsys):
    with job(False, 10, 0, "drawing") as shown:
        shown.update(4, 2)
    assert capsys.readouterr() == ("", "")


def test_a_log_that_cannot_be_written_stops_nothing(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError("No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    with job(True, 10, 0, "drawing") as shown:
        shown.update(4)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_command_shows_it(tmp_path, capsys, monkeypatch, world_size):
    run = write_run(tmp_path / "run")
    command = [
        "sample",
        str(run),
        "--num",
        "12",
        "--batch-size",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert main([*command, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    (tmp_path / "out" / "000005.png").unlink()
    assert main(command) == 0
    first, second = capsys.readouterr().err.splitlines()
    if world_size == 1:
        assert first == "drawing: 10/12 images"
        assert second.startswith("drawing: 12/12 images, ")
    else:
        assert first == "process 0 draws: 4/6 images"
    assert second.endswith(" images/s, ETA 0.0 s")
