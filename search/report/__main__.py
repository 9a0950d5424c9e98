"""`python -m search.report`: one page about a study's winner or any of its trials."""

from __future__ import annotations

from pathlib import Path

from search.commands import run_command
from search.options import Parser, place, study_name
from spaces.errors import UserError


def parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m search.report",
        description="Writes a self-contained HTML page, and the same as Markdown, about the winner of a "
        "finished study or about any of its trials: how good it is beside the baselines, what it costs "
        "and where, "
        "what is wrong with it and what to try next. Prints the diagnosis.",
    )
    parser.add_argument("--study", metavar="NAME", required=True, help="name of the study")
    parser.add_argument(
        "--trial", metavar="best|N", default="best", help="the winner, or a trial's number (default: best)"
    )
    parser.add_argument(
        "--storage", metavar="URL", help="Optuna storage of the study (default: runs/NAME/study.journal)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where the page goes, .html; the Markdown lies beside it (default: report.html in the study's "
        "folder, report-trial-N.html for --trial N)",
    )
    return parser


def main() -> None:
    """Parses the command line and writes the report."""
    args = parser().parse_args()
    study_name(args.study)
    if args.out is not None and args.out.suffix != ".html":
        raise UserError(f"--out {args.out}: must end in .html; the Markdown takes the same name with .md")
    if args.out is not None:
        place("--out", args.out)

    from search.console import console
    from search.rebuild import OpenStudy
    from search.report.build import write
    from search.report.diagnosis import findings
    from search.report.facts import Facts
    from search.report.words import summary

    facts = Facts.read(OpenStudy.open(args.study, args.storage), args.trial)
    name = "report.html" if args.trial == "best" else f"report-trial-{facts.number}.html"
    written = write(facts, args.out or facts.folder / name)
    for text in (*summary(facts), *(f.text for f in findings(facts))):
        console.print(text, highlight=False)
    for path in written:
        console.print(f"[bold]{path}[/bold]")


if __name__ == "__main__":
    run_command(main)
