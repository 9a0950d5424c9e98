"""docs/bad-inputs.md, from the table: `python -m experiments.bad_inputs docs/bad-inputs.md`."""

from __future__ import annotations

from pathlib import Path

from compression.files import write_text
from experiments.bad_inputs.page import page
from search.commands import run_command
from search.options import Parser


def main() -> None:
    parser = Parser(prog="python -m experiments.bad_inputs", description=__doc__)
    parser.add_argument("out", type=Path)
    write_text(parser.parse_args().out, page())


if __name__ == "__main__":
    run_command(main)
