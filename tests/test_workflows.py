"""Continuous integration and releases: the workflows name what is there, and the changelog is of
the form that it claims."""

from __future__ import annotations

import re
import shlex
from datetime import date
from pathlib import Path
from typing import Any

import pytest

import ddpm_fast

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SECTIONS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
RELEASE = re.compile(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})( \[YANKED\])?")


def read(path: Path) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(path.read_text())


def project() -> dict[str, Any]:
    return pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())


def jobs(name: str) -> dict[str, Any]:
    return read(ROOT / ".github" / "workflows" / name)["jobs"]


def commands(job: dict[str, Any]) -> list[list[str]]:
    lines = "\n".join(step.get("run", "") for step in job["steps"]).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow(path):
    """No job may write or wait for ever, and none runs an action of no stated version."""
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    assert True in workflow, "no triggers"  # YAML 1.1 reads the key `on` as true
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 120, name
        assert job.get("permissions", {}) in ({}, {"id-token": "write"}), name
        for needed in job.get("needs", []):
            assert needed in workflow["jobs"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            if "uses" in step:
                assert re.fullmatch(
                    r"[\w.-]+/[\w./-]+@(v\d+|release/v\d+|[0-9a-f]{40})", step["uses"]
                )
                if step["uses"].startswith("actions/checkout@"):
                    assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_targets_and_files_that_workflows_name(path):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):(?!=)", makefile, re.MULTILINE))
    for name, job in read(path)["jobs"].items():
        for program, *arguments in commands(job):
            if program == "make":
                named = {word for word in arguments if "=" not in word}
                assert named <= targets, name
            for word in arguments:
                if word.startswith(("tests/", "benchmarks/", "docs/")):
                    assert (ROOT / word).exists(), word


def test_ci_does_all_that_it_should():
    wanted = {"lint", "tests", "unpinned", "instruction-sets", "sanitize", "docs", "slow"}
    assert set(jobs("ci.yml")) == wanted
    run = {word for job in jobs("ci.yml").values() for words in commands(job) for word in words}
    assert {"lint", "typecheck", "test", "test-long", "sanitize", "docs"} <= run
    assert set(jobs("wheels.yml")) == {"sdist", "wheels", "publish"}
    # Only what has a tag is published, and only once all of it was built and tried.
    publish = jobs("wheels.yml")["publish"]
    assert publish["needs"] == ["sdist", "wheels"]
    assert "startsWith(github.ref, 'refs/tags/v')" in publish["if"]


def test_python_versions_agree():
    """What is declared, what wheels are made for and what the tests run on."""
    settings = project()
    classifiers = settings["project"]["classifiers"]
    declared = [c.split(" :: ")[-1] for c in classifiers if re.search(r"Python :: 3\.\d+$", c)]
    assert settings["project"]["requires-python"] == f">={declared[0]}"
    minors = [int(version.split(".")[1]) for version in declared]
    assert minors == list(range(minors[0], minors[-1] + 1))

    built = settings["tool"]["cibuildwheel"]["build"].split()
    assert built == [f"cp{version.replace('.', '')}-*" for version in declared]

    ci = jobs("ci.yml")
    tested = [ci[job]["strategy"]["matrix"]["python"] for job in ("tests", "unpinned")]
    assert sorted(v for versions in tested for v in versions) == sorted(declared)


def test_pinned_tools_are_those_of_the_constraints():
    """`build` makes the source distribution in the tests and in the workflow."""
    (pinned,) = re.findall(r"^build==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert ["pipx", "run", f"build=={pinned}", "--sdist"] in commands(jobs("wheels.yml")["sdist"])


def changelog() -> list[tuple[str, list[str]]]:
    """Headings of the second level, and the lines below each."""
    parts = re.split(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    return [(parts[i], parts[i + 1].splitlines()) for i in range(1, len(parts), 2)]


def test_changelog_says_what_form_it_has():
    head = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[0]
    assert head.startswith("# Changelog\n")
    assert "https://keepachangelog.com/en/1.1.0/" in head
    assert "https://semver.org/" in head


def test_changelog_sections():
    """Those of Keep a Changelog 1.1, each once, and none without an entry."""
    for title, lines in changelog():
        sections = [line.removeprefix("### ") for line in lines if line.startswith("### ")]
        assert sections, title
        assert set(sections) <= set(SECTIONS), title
        assert len(set(sections)) == len(sections), title
        assert all(not line.startswith("####") for line in lines)
        for section in "\n".join(lines).split("### ")[1:]:
            assert re.search(r"^- \S", section, re.MULTILINE), f"{title}, {section!r}"


def test_changelog_versions():
    """Unreleased first, then releases from the last to the first, with their dates."""
    titles = [title for title, _ in changelog()]
    assert titles[0] == "[Unreleased]"
    matches = [RELEASE.fullmatch(title) for title in titles[1:]]
    assert all(matches), titles
    versions = [tuple(map(int, m[1].split("."))) for m in matches if m]
    assert versions == sorted(set(versions), reverse=True)
    dates = [date.fromisoformat(m[2]) for m in matches if m]
    assert dates == sorted(dates, reverse=True)
    current = tuple(int(part) for part in re.findall(r"\d+", ddpm_fast.__version__)[:3])
    assert not versions or current >= versions[0], "the package is older than its last release"


def test_changelog_links():
    """A link that is defined is of a version that is there."""
    text = (ROOT / "CHANGELOG.md").read_text()
    defined = re.findall(r"^\[([^\]]+)\]: https://\S+$", text, re.MULTILINE)
    titles = {title.split("]")[0].lstrip("[") for title, _ in changelog()}
    assert set(defined) <= titles
    assert not defined or set(defined) == titles, "links for some of the versions alone"
