"""The quick start, from top to bottom: with a small network here, and, slow, as it stands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from documents import DOCS, blocks, commands

from ddpm_fast.cli import main

QUICK_START = DOCS / "quickstart.md"
INSTALLS = re.compile(r"pip install|venv")
SERVES = [block for block in blocks(QUICK_START) if block.code.startswith("ddpm-fast serve")]
# Given to a command beside what the page gives it, so that it takes a moment.
SMALLER = {
    "train": ["--steps", "12", "--batch-size", "16", "--sample-every", "0", "--no-tensorboard"]
    + [f"--set=unet.{field}" for field in ("channels=[8]", "attention_resolutions=[]")]
    + ["--set=unet.norm_groups=4", "--device", "cpu", "--quiet"],
    "sample": ["--device", "cpu", "--quiet"],
    "evaluate": ["--device", "cpu", "--quiet", "--num", "8", "--bits-per-dim"],
}


@pytest.mark.usefixtures("one_thread")
def test_a_small_one(tmp_path, monkeypatch, capsys):
    """Commands in this process, and Python between them, in one folder."""
    monkeypatch.chdir(tmp_path)
    ran, names = [], {}
    for block in blocks(QUICK_START):
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, str(QUICK_START), "exec"), names)
            continue
        for program, *arguments in commands(block):
            if program == "ddpm-fast" and arguments[0] != "serve":
                assert main([*arguments, *SMALLER.get(arguments[0], [])]) == 0, arguments
                ran.append(arguments[0])
    drawn, digits = names["images"].flatten(1), names["digits"]
    assert torch.cdist(drawn, digits).min(1).values.max() < 0.1  # only ones that it has seen
    assert ran == ["info", "train", "sample", "evaluate"]
    assert "bits/dim" in capsys.readouterr().out
    assert {path.name for path in Path().iterdir()} == {"first.png", "run", "images"}
    assert len(list(Path("images").iterdir())) == 101


@pytest.mark.slow
def test_as_it_stands(tmp_path):
    """Every command but those that install, in a shell; then the page answers."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    lines = []
    for i, block in enumerate(blocks(QUICK_START)):
        if block.language == "python":
            # A section's later blocks go on from its earlier ones.
            before = [
                b.code
                for b in blocks(QUICK_START)
                if (b.language, b.section) == ("python", block.section) and b.line < block.line
            ]
            (tmp_path / f"{i}.py").write_text("\n".join([*before, block.code]))
            lines.append(f"python {i}.py")
        elif not INSTALLS.search(block.code) and block not in SERVES:
            lines.append(block.code)
    script = "\n".join(["set -e", *lines])
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=True)
    assert len(list((tmp_path / "images").iterdir())) == 101

    assert_serves(tmp_path, environment)


def assert_serves(folder: Path, environment: dict[str, str]) -> None:
    """The command that the page gives last, at a port that is free."""
    (serve,) = SERVES
    server = subprocess.Popen(
        ["bash", "-c", f"exec {serve.code.strip()} --port 0"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        with urllib.request.urlopen(address_of(server), timeout=10) as answer:
            assert "<html" in answer.read().decode()
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    assert server.returncode == 0


def address_of(server: subprocess.Popen[str]) -> str:
    """Where it says that it listens, once somebody answers there."""
    assert server.stdout is not None
    address = next(
        word.rstrip("/.,")
        for line in server.stdout
        for word in line.split()
        if word.startswith("http://127.0.0.1:")
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return address
        except urllib.error.URLError:
            time.sleep(0.2)
    raise TimeoutError(address)
