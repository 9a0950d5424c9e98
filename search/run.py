"""`python -m search.run --budget SIZE`: searches, reports and emits a compressed model."""

from __future__ import annotations

from search.commands import run_command
from search.options import Options, parse


def main() -> None:
    """Parses the command line and runs the search."""
    options = parse()
    from search.engine import Search

    search = Search.open(options)
    if options.dry_run:
        search.dry_run()
    else:
        check_addresses(options)
        search.run()


def check_addresses(options: Options) -> None:
    """Refuses servers that are not there before anything is written.

    Raises:
        UserError: No Ray cluster, or no tracking server, answers at its address.
    """
    if options.ray_address is not None:
        from search.cluster.session import check_reachable

        check_reachable(options.ray_address)
    if options.tracking_uri is not None:
        from search.tracking import check_tracking

        check_tracking(options.tracking_uri)


if __name__ == "__main__":
    run_command(main)
