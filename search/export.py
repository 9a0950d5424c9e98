"""`python -m search.export --study NAME`: scores a trial again and writes it as a model."""

from __future__ import annotations

from pathlib import Path

from search.commands import run_command
from search.options import Parser, study_name


def _parser() -> Parser:
    parser = Parser(
        prog="python -m search.export",
        description="Rebuilds a trial of a study, scores it again beside its record, and writes the model: "
        "a .gguf file for a portable trial, a folder for a ragged one.",
    )
    add = parser.add_argument
    add("--study", required=True, metavar="NAME", help="name of the study")
    add(
        "--trial",
        default="best",
        metavar="best|N",
        help="the study's winner, or a trial's number (default: best)",
    )
    add("--storage", metavar="URL", help="Optuna storage of the study (default: runs/NAME/study.journal)")
    add("--out", type=Path, metavar="FILE", help="where the model goes: a .gguf file or a folder "
        "(default: runs/NAME/trial-N.gguf, or runs/NAME/trial-N)")  # fmt: skip
    return parser


def main() -> None:
    """Parses the command line, re-scores the trial and exports it."""
    args = _parser().parse_args()
    study_name(args.study)
    from rich.table import Table

    from search.console import console
    from search.rebuild import OpenStudy
    from search.results import write_winner
    from spaces.budget import format_size
    from spaces.errors import UserError

    opened = OpenStudy.open(args.study, args.storage)
    trial = opened.trial(args.trial)
    candidate = opened.candidate(trial)
    default = f"trial-{trial.number}" + (".gguf" if candidate.portable else "")
    path = args.out or Path(opened.settings["out"]) / default
    if not opened.settings["export"]:
        raise UserError(f"study {args.study} was made with --no-export; run it without to write models")
    if path.suffix == ".gguf" and not candidate.portable:
        raise UserError(
            f"--out {path}: trial {trial.number} is ragged (expert counts or top-k differ by layer), which "
            "no .gguf can hold; give --out a folder, or choose a portable trial"
        )

    recorded, again = trial.user_attrs["scores"], opened.rescore(trial)
    table = Table(title=f"trial {trial.number} of {args.study}, {recorded['tokens']} tokens")
    for column in ("score", "recorded", "re-run", "difference"):
        table.add_column(column, justify="right")
    for name in ("kl", "kl_se", "perplexity", "bits_per_byte", "top1"):
        table.add_row(
            name, f"{recorded[name]:.6f}", f"{again[name]:.6f}", f"{again[name] - recorded[name]:+.1e}"
        )
    console.print(table)
    if abs(again["kl"] - recorded["kl"]) > 1e-4 + 1e-3 * recorded["kl"]:
        raise UserError(
            f"trial {trial.number}: KL {again['kl']:.6f} where {recorded['kl']:.6f} was recorded; the model, "
            "the bank or a library changed since; run the search again"
        )

    size = opened.worker.export(candidate.to_json(), str(path))
    side = path.with_suffix(".files") if path.suffix == ".gguf" else path.with_name(path.name + ".files")
    criteria = {i: str(trial.params[f"blk.{i}.criterion"]) for i in opened.worker.space.inventory.moe_layers}
    write_winner(candidate, criteria, opened.carry(), side)
    console.print(
        f"{path}: {format_size(size)} ({size:,} bytes)\n{side}: candidate.json, recipe.json, tensor-types.txt"
    )


if __name__ == "__main__":
    run_command(main)
