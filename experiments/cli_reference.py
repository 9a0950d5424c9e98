"""The command-line reference, from the parsers: `python -m experiments.cli_reference docs/cli.md`."""

from __future__ import annotations

import argparse
from pathlib import Path

from compression.files import write_text
from search import export, options
from search.report import __main__ as report

_PARSERS = (options.parser, report.parser, export.parser)


def _usage(action: argparse.Action) -> str:
    """The option as it is typed."""
    names = ", ".join(f"`{n}`" for n in action.option_strings)
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else None)
    return names if action.nargs == 0 or value is None else f"{names} `{value}`"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    return text.replace("|", "\\|") + (" (required)" if action.required else "")


def section(parser: argparse.ArgumentParser) -> str:
    """One command."""
    lines = [f"## `{parser.prog}`", "", parser.description or ""]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest != "help"]
        if not actions:
            continue
        if group.title not in ("options", "positional arguments"):
            lines += ["", f"**{str(group.title).capitalize()}**"]
        lines += ["", "| option | meaning |", "|---|---|"]
        lines += [f"| {_usage(a).replace('|', chr(92) + '|')} | {_help(parser, a)} |" for a in actions]
    return "\n".join(lines)


def reference() -> str:
    """All commands, as Markdown."""
    head = (
        "# Commands\n\nEvery command ends with 0 when it worked, with one line and 2 on bad input, with 130 "
        "when it was interrupted.\nThis page is made by `python -m experiments.cli_reference docs/cli.md`."
    )
    return "\n\n".join([head, *(section(make()) for make in _PARSERS)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    write_text(parser.parse_args().out, reference())


if __name__ == "__main__":
    main()
