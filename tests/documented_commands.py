"""What a command in the documents must hold without being run: the parser of the program that it
names takes its arguments, and the files and targets that it names are there."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Callable, Sequence

from command_line_page import parsers
from documents import ROOT

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_ASSIGNMENT = re.compile(r"[A-Z_]+=")
_REDIRECTION = re.compile(r"[<>]+")


class UnknownCommand(AssertionError):
    """No rule for this program: either it is misspelt, or a rule is missing here."""


def check(words: Sequence[str]) -> None:
    """Raises AssertionError where a command could not be given as it stands."""
    words = [word for word in words]
    while words and _ASSIGNMENT.match(words[0]):
        words = words[1:]
    redirected = next((i for i, word in enumerate(words) if _REDIRECTION.match(word)), len(words))
    program, *arguments = words[:redirected]
    rule = _RULES.get(program.removeprefix(".venv/bin/"))
    if rule is None:
        raise UnknownCommand(f"no rule for {program!r} in tests/documented_commands.py")
    rule(arguments)


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args(arguments)
    except SystemExit as end:
        if end.code:
            raise AssertionError(said.getvalue().strip().splitlines()[-1]) from None
        return argparse.Namespace()  # --help, --version


def ddpm_fast(arguments: Sequence[str]) -> None:
    if arguments[0] in ("--help", "--version"):
        return
    assert arguments[0] in parsers(), f"ddpm-fast has no command {arguments[0]!r}"
    _parsed(parsers()[arguments[0]], arguments[1:])


def _python(arguments: Sequence[str]) -> None:
    if arguments[0] == "-m":
        _MODULES[arguments[1]](arguments[2:])
    elif arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
    else:
        assert (ROOT / arguments[0]).is_file(), f"there is no {arguments[0]}"
        code = (ROOT / arguments[0]).read_text()
        for argument in arguments[1:]:
            if argument.startswith("--"):
                assert f'"{argument}"' in code, f"{arguments[0]} takes no {argument}"


def _torchrun(arguments: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = _parsed(get_args_parser(), arguments)
    assert (parsed.module, parsed.training_script) == (True, "ddpm_fast.cli")
    rest = parsed.training_script_args
    ddpm_fast(rest[1:] if rest[0] == "--" else rest)


def _pip(arguments: Sequence[str]) -> None:
    from packaging.requirements import Requirement
    from pip._internal.commands import create_command

    assert arguments[0] in ("install", "uninstall"), arguments[0]
    options, requirements = create_command(arguments[0]).parse_args(list(arguments[1:]))
    for requirement in [*requirements, *getattr(options, "editables", [])]:
        path, _, extras = requirement.partition("[")
        if path.startswith((".", "/")):
            names, known = set(extras.rstrip("]").split(",")) - {""}, requirement.startswith(".")
        elif path.endswith((".whl", ".tar.gz")):
            continue
        else:
            parsed = Requirement(requirement)
            names, known = parsed.extras, parsed.name.replace("-", "_") == _PROJECT["name"]
        if known:
            missing = names - set(_PROJECT["optional-dependencies"])
            assert not missing, f"the package has no extra {missing}"
    for file in getattr(options, "constraints", []) + getattr(options, "requirements", []):
        assert (ROOT / file).is_file(), f"there is no {file}"


def _make(arguments: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
    for argument in arguments:
        name, given, _ = argument.partition("=")
        if given:
            assert re.search(rf"\$\({name}\)", makefile), f"make knows no {name}"
        else:
            assert argument in targets, f"make has no target {argument}"


def _pytest(arguments: Sequence[str]) -> None:
    from _pytest.config import get_config

    config = get_config()
    config.pluginmanager.load_setuptools_entrypoints("pytest11")
    help_ = config._parser.optparser.format_help()
    ours = (ROOT / "benchmarks" / "conftest.py").read_text()
    for argument in arguments:
        option = argument.partition("=")[0]
        if option.startswith("--"):
            known = re.search(rf"{option}\b", help_) or f'"{option}"' in ours
            assert known, f"pytest takes no {option} here"
        elif "/" in argument and "=" not in argument and "results" not in argument:
            path = argument.partition("::")[0].rstrip("/")
            assert next(ROOT.glob(path), None), f"there is no {argument}"


def _mkdocs(arguments: Sequence[str]) -> None:
    from mkdocs.__main__ import cli

    cli.commands[arguments[0]].make_context(arguments[0], list(arguments[1:]))


def _git(arguments: Sequence[str]) -> None:
    assert arguments[0] in ("clone", "tag", "push", "config"), arguments[0]


def _curl(arguments: Sequence[str]) -> None:
    urls = [word for word in arguments if word.startswith(("http:", "https:", "127.", "localhost"))]
    assert urls, "curl without an address"


def _anything(arguments: Sequence[str]) -> None:
    """Programs of the system, whose arguments are theirs to judge."""


_RULES: dict[str, Callable[[Sequence[str]], None]] = {
    "ddpm-fast": ddpm_fast,
    "python": _python,
    "python3": _python,
    "torchrun": _torchrun,
    "pip": _pip,
    "make": _make,
    "pytest": _pytest,
    "mkdocs": _mkdocs,
    "git": _git,
    "curl": _curl,
    "pre-commit": _anything,
    "cd": _anything,
    ".": _anything,
    "source": _anything,
    "export": _anything,
    "kill": _anything,
}
_MODULES: dict[str, Callable[[Sequence[str]], None]] = {
    "ddpm_fast.cli": ddpm_fast,
    "pytest": _pytest,
    "pip": _pip,
    "mkdocs": _mkdocs,
    "venv": _anything,
    "build": _anything,
}
