"""`python -m search.export`: writes a trial of a study, or a candidate of a GGUF file, as a model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from search.commands import run_command
from search.options import MOST_THREADS, Parser, at_least, at_most, place, study_name
from spaces.errors import UserError

_OF_A_STUDY = ("trial", "storage")
_OF_A_FILE = ("candidate", "uniform", "imatrix", "threads")


def parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m search.export",
        description="With --study: rebuilds a trial of a study, scores it again beside its record, and "
        "writes the model: a .gguf file for a portable trial, a folder for a ragged one. With --model: "
        "applies a candidate to a GGUF file of any Mixture-of-Experts model that llama.cpp runs.",
    )
    study = parser.add_argument_group("a trial of a study")
    study.add_argument("--study", metavar="NAME", help="name of the study")
    study.add_argument(
        "--trial", metavar="best|N", help="the study's winner, or a trial's number (default: best)"
    )
    study.add_argument(
        "--storage", metavar="URL", help="Optuna storage of the study (default: runs/NAME/study.journal)"
    )
    file = parser.add_argument_group("a candidate of a GGUF file")
    file.add_argument(
        "--model",
        type=Path,
        metavar="FILE",
        help="the model, best in F16, BF16 or Q8_0; of a split one, any part",
    )
    file.add_argument(
        "--candidate",
        type=Path,
        metavar="FILE",
        help="candidate.json; tensors its types leave out keep the type they have",
    )
    file.add_argument(
        "--uniform",
        metavar="TYPE",
        help="in place of --candidate: every expert, every tensor in TYPE; with --out FILE.json the "
        "candidate itself is written, as a start for one of your own",
    )
    file.add_argument(
        "--imatrix", type=Path, metavar="FILE", help="importance matrix by llama-imatrix, in GGUF format"
    )
    file.add_argument("--threads", type=int, metavar="N", help="threads that quantize (default: all)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where the model goes: a .gguf file, or a folder for a ragged trial "
        "(default for a trial: runs/NAME/trial-N.gguf, or runs/NAME/trial-N)",
    )
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked.

    Raises:
        UserError: The first option that is wrong or does not go with another.
    """
    args = parser().parse_args(arguments)
    if (args.study is None) == (args.model is None):
        raise UserError(
            "give --study NAME to export a trial, or --model FILE.gguf with --candidate FILE to compress "
            f"a GGUF file, {'not both' if args.study is not None else 'one of them'} (see --help)"
        )
    chosen, other = ("--study", _OF_A_FILE) if args.model is None else ("--model", _OF_A_STUDY)
    for option in other:
        if getattr(args, option) is not None:
            raise UserError(f"--{option} does not go with {chosen} (see --help)")
    if args.model is None:
        study_name(args.study)
        if args.out is not None:
            place("--out", args.out, folder=args.out.suffix != ".gguf")
        return args
    if (args.candidate is None) == (args.uniform is None):
        raise UserError("--model needs one of --candidate FILE and --uniform TYPE (see --help)")
    if args.out is None:
        raise UserError("--model needs --out FILE.gguf (see --help)")
    suffixes = (".gguf",) if args.uniform is None else (".gguf", ".json")
    if args.out.suffix not in suffixes:
        raise UserError(f"--out {args.out}: must end in {' or '.join(suffixes)} with --model")
    place("--out", args.out)
    if args.threads is None:
        args.threads = os.cpu_count() or 1
    at_most("--threads", at_least("--threads", args.threads, 1), MOST_THREADS)
    return args


def main() -> None:
    """Parses the command line and writes a model."""
    args = parse()
    if args.model is None:
        _export_trial(args)
    else:
        from search.export_gguf import export_candidate

        export_candidate(args)


def _export_trial(args: argparse.Namespace) -> None:
    """Re-scores the trial and exports it."""
    from rich.table import Table

    from search.console import console
    from search.rebuild import OpenStudy
    from search.results import write_winner
    from spaces.budget import format_size

    opened = OpenStudy.open(args.study, args.storage)
    trial = opened.trial(args.trial or "best")
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

    repaired = candidate.key in (opened.study.user_attrs.get("repaired") or ())
    size = opened.worker.export(candidate.to_json(), str(path), repaired)
    if repaired:
        console.print("written with its repairs: scales, norms and routers re-fitted (see result.json)")
    side = path.with_suffix(".files") if path.suffix == ".gguf" else path.with_name(path.name + ".files")
    criteria = {i: str(trial.params[f"blk.{i}.criterion"]) for i in opened.worker.space.inventory.moe_layers}
    write_winner(candidate, criteria, opened.carry(), side)
    console.print(
        f"{path}: {format_size(size)} ({size:,} bytes)\n{side}: candidate.json, recipe.json, tensor-types.txt"
    )


if __name__ == "__main__":
    run_command(main)
