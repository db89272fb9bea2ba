"""docs/command-line.md, made of the parsers. ``python tests/command_line_page.py --write`` renews
it."""

from __future__ import annotations

import argparse
import html
import sys
from pathlib import Path

from ddpm_fast.cli import COMMANDS

PAGE = Path(__file__).parent.parent / "docs" / "command-line.md"
HEAD = """\
# The command line

`ddpm-fast COMMAND --help` says the same; `python -m ddpm_fast.cli` is the same command. Where
all went well the status is 0. It is 2 where the arguments, what they name or the packages that are
installed do not fit, before anything is written; 1 where something failed under way; 130 and 143
after Ctrl-C and SIGTERM. One line on stderr says why.
"""


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by its name."""
    subparsers = argparse.ArgumentParser(prog="ddpm-fast").add_subparsers()
    for command in COMMANDS:
        command.add_parser(subparsers)
    return dict(subparsers.choices)


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_section(name, parser) for name, parser in parsers().items())])


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    about = _sentence(parser.description or _help_of(name))
    lines = [f"## ddpm-fast {name}", "", _escaped(about), ""]
    rows = [
        f"| {_code(_form(action))} | {_escaped(_help(parser, action))} |"
        for action in sorted(parser._actions, key=lambda action: bool(action.option_strings))
        if action.dest != "help"
    ]
    if rows:
        lines += ["| argument | |", "|---|---|", *rows, ""]
    if parser.epilog:
        lines += [_escaped(parser.epilog), ""]
    return "\n".join(lines)


def _help_of(name: str) -> str:
    """What ``ddpm-fast --help`` says of a command."""
    subparsers = argparse.ArgumentParser(prog="ddpm-fast").add_subparsers()
    for command in COMMANDS:
        command.add_parser(subparsers)
    return next(a.help or "" for a in subparsers._choices_actions if a.dest == name)


def _form(action: argparse.Action) -> str:
    """--name VALUE, as it is given."""
    value = "" if action.nargs == 0 else action.metavar or action.dest.upper()
    if action.choices and not action.metavar:
        value = "|".join(map(str, action.choices))
    form = f"{', '.join(action.option_strings)} {value}".strip()
    return f"{form} (required)" if action.required and action.option_strings else form


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return (action.help or "") % {**vars(action), "prog": parser.prog}


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _code(text: str) -> str:
    return f"<code>{_escaped(text)}</code>"


def _escaped(text: str) -> str:
    """For a cell: letters that mean something to HTML, Markdown or a table are no letters there."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return escaped.translate({ord(c): f"&#{ord(c)};" for c in "|*`[]"})


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/command_line_page.py --write")
    PAGE.write_text(page(), encoding="utf-8")
