"""`python -m search.run --budget SIZE`: searches, reports and emits a compressed model."""

from __future__ import annotations

from search.commands import run_command
from search.options import parse


def main() -> None:
    """Parses the command line and runs the search."""
    options = parse()
    from search.engine import Search

    search = Search.open(options)
    if options.dry_run:
        search.dry_run()
    else:
        search.run()


if __name__ == "__main__":
    run_command(main)
