"""The command line of `search.run`, checked before anything is loaded."""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from search.sampler_names import SAMPLERS
from spaces.budget import parse_size
from spaces.devices import DEFAULT_DEVICE, DEVICES, Device, device
from spaces.errors import UserError, unknown
from spaces.inventory import published_targets
from spaces.quant_types import LADDER
from spaces.runtimes import RUNTIMES

DEFAULT_TARGET = "deepseek-v3"
DEFAULT_TASKS = ("local_cloze", "local_lastword", "bb_agreement")
REFERENCE_MODEL = Path(__file__).resolve().parent.parent / "experiments/reference_model/checkpoint"
REFERENCE_NAME = "moefit-reference"
SHIPPED_TEXTS = REFERENCE_MODEL.parent / "texts"
MOST_THREADS = 4096
"""Workers, or threads, that may be asked for: more than any machine has, fewer than would end this one."""
_STUDY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s, so that every bad option ends the same way."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        given = list(sys.argv[1:] if args is None else args)
        for word in given:
            # argparse takes the dashes for the end of the options and gives an empty list as the value.
            if word.startswith("-") and word.endswith("=--"):
                self.error(f"argument {word[:-3]}: expected one argument")
        return super().parse_known_args(given, namespace)


@dataclass(frozen=True)
class Options:
    """`search.run`'s options, parsed; sizes in bytes, paths absolute. See `--help` for each."""

    budget: int
    model: Path
    target: str
    device: Device
    context: int
    runtime: str
    trials: int
    workers: int
    fewer_workers: bool  # whether memory may make them fewer, as nobody said how many
    ray_address: str | None
    types: tuple[str, ...]
    stream: str
    sampler: str
    tasks: tuple[str, ...]
    tasks_path: Path | None
    limit: int
    text: Path | None
    calibration: Path | None
    seed: int
    study: str
    storage: str | None
    tracking_uri: str | None
    out: Path
    export: bool
    repair: str
    dry_run: bool


def parser() -> Parser:
    """The command line of `search.run`."""
    parser = Parser(
        prog="python -m search.run",
        description="Searches expert pruning, top-k and GGUF types together for the least damage that fits "
        "a budget, and writes the winner as a quantized model. Run the same command again to go on.",
    )
    add = parser.add_argument
    add(
        "--budget",
        required=True,
        metavar="SIZE",
        help="bytes the target's weights may take, as 103GB or 96GiB",
    )
    add(
        "--model",
        type=Path,
        metavar="DIR|FILE",
        help="model to search: a checkpoint folder (safetensors), or a .gguf file in F32, F16, BF16 or Q8_0 "
        "(default: the reference model)",
    )
    add(
        "--target",
        metavar="NAME|DIR|FILE",
        help=f"model the budget speaks of: {', '.join(published_targets())} or a "
        "folder with config.json or a .gguf file (default: the model itself with --model, else "
        f"{DEFAULT_TARGET})",
    )
    add(
        "--device",
        default=DEFAULT_DEVICE,
        metavar="NAME",
        help=f"one of {', '.join(DEVICES)} (default: %(default)s)",
    )
    add("--device-memory", metavar="SIZE", help="memory of the device, in place of its profile's")
    add(
        "--context",
        type=int,
        default=4096,
        metavar="N",
        help="tokens the KV cache is sized for (default: %(default)s)",
    )
    add(
        "--runtime",
        default="any",
        metavar="NAME",
        help="; ".join(f"{n}: {r.note}" for n, r in RUNTIMES.items()),
    )
    add(
        "--trials",
        type=int,
        default=160,
        metavar="N",
        help="trials of the study, baselines included (default: %(default)s)",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="Ray workers of one thread each; 0: this process, without Ray (default: one per core, fewer "
        "where they would not fit into free memory)",
    )
    add(
        "--types",
        default="",
        metavar="A,B",
        help="GGUF types to choose from (default: all of " + ", ".join(LADDER) + ")",
    )
    add(
        "--stream",
        default="auto",
        choices=("auto", "yes", "no"),
        help="hold one decoder layer at a time instead of the whole model in every worker (default: auto: "
        "where the workers' models would not fit into free memory)",
    )
    add("--ray-address", metavar="ADDR", help="HOST:PORT of a Ray cluster to join, or auto")
    add(
        "--sampler",
        default="knapsack",
        metavar="NAME",
        help=f"one of {', '.join(SAMPLERS)} (default: %(default)s)",
    )
    add(
        "--tasks",
        default=",".join(DEFAULT_TASKS),
        metavar="A,B",
        help="lm-eval tasks of the winners, shipped or the hub's; 'none' for none (default: %(default)s)",
    )
    add("--tasks-path", type=Path, metavar="DIR", help="folder with more lm-eval task files")
    add("--limit", type=int, default=100, metavar="N", help="items of each task (default: %(default)s)")
    add(
        "--text",
        type=Path,
        metavar="FILE",
        help="text to search, select and report on, split into three disjoint "
        "sets by document (.jsonl with a text field, or plain text; default: the shipped held-out texts)",
    )
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text for routing statistics and imatrix (default: shipped)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the sampler (default: %(default)s)")
    add("--study", metavar="NAME", help="name of the study (default: made of model, target and budget)")
    add(
        "--storage",
        metavar="URL",
        help="Optuna storage: a database URL or a journal file (default: OUT/study.journal)",
    )
    add("--tracking-uri", metavar="URI", help="MLflow tracking server (default: sqlite in OUT)")
    add("--out", type=Path, metavar="DIR", help="folder for everything the run writes (default: runs/STUDY)")
    add(
        "--repair",
        default="auto",
        choices=("auto", "none"),
        help="re-fit block scales, norms and routers of the winners on calibration text, at no bytes, and "
        "keep that where it pays on text it did not see (default: %(default)s)",
    )
    add("--no-export", action="store_true", help="do not write the winner as a model")
    add(
        "--dry-run",
        action="store_true",
        help="print inventory, budget and space, and stop before reading weights",
    )
    return parser  # fmt: skip


def at_least(option: str, value: int, least: int) -> int:
    """`value`, or a `UserError` that names the option."""
    if value < least:
        raise UserError(f"{option} must be at least {least}, got {value}")
    return value


def at_most(option: str, value: int, most: int) -> int:
    """`value`, or a `UserError` that names the option."""
    if value > most:
        raise UserError(f"{option} must be at most {most}, got {value}")
    return value


def _listed(option: str, text: str, what: str) -> list[str]:
    """The names of a comma-separated list; none at all where nothing is given."""
    names = [t.strip() for t in text.split(",") if t.strip()]
    if text and not names:
        raise UserError(f"{option} {text!r} names no {what}; separate names by commas")
    return names


def weight_types(text: str) -> tuple[str, ...]:
    """Distinct types of a comma-separated list, fewest bits first."""
    names = _listed("--types", text, "type")
    for name in names:
        if name not in LADDER:
            raise unknown("--types", name, LADDER)
    return tuple(t for t in LADDER if t in names)


def _real(option: str, path: Path) -> Path:
    """The absolute path, links followed."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or what no path can hold
        raise UserError(f"{option} {str(path)[:200]!r}: is no usable path ({error})") from error


def place(option: str, path: Path, folder: bool = False) -> Path:
    """The absolute path of a file or folder to be written, which may be there already.

    Raises:
        UserError: Something of the other kind is there, or no such path can be made.
    """
    real = _real(option, path)
    try:
        above = next(p for p in real.parents if p.exists())
        if real.exists() and real.is_dir() != folder:
            raise UserError(f"{option} {path}: is {'no' if folder else 'a'} folder; choose another place")
    except OSError as error:  # too long a name
        raise UserError(f"{option} {str(path)[:200]!r}: is no usable path ({error.strerror})") from error
    if not above.is_dir():
        raise UserError(f"{option} {path}: {above} is no folder; choose another place")
    return real


def seed(value: int) -> int:
    """A seed that every sampler takes."""
    if not 0 <= value < 2**32:
        raise UserError(f"--seed must be within 0..{2**32 - 1}, got {value}")
    return value


def study_name(name: str) -> str:
    """A study's name must be usable as a folder's."""
    if not _STUDY.fullmatch(name):
        raise UserError(
            f"--study {name[:100]!r}: use letters, digits, dot, dash and underscore only (100 at most, "
            "the first a letter or digit)"
        )
    return name


def parse(arguments: list[str] | None = None) -> Options:
    """Parses and checks `search.run`'s arguments.

    Raises:
        UserError: The first option that is wrong.
    """
    args = parser().parse_args(arguments)
    unasked = args.workers is None
    args.workers = (os.cpu_count() or 1) if unasked else args.workers
    budget = parse_size(args.budget, "--budget")
    profile = device(args.device)
    if args.device_memory is not None:
        memory = parse_size(args.device_memory, "--device-memory")
        profile = Device(**{**vars(profile), "memory": memory})
    if args.sampler not in SAMPLERS:
        raise unknown("--sampler", args.sampler, SAMPLERS)
    if args.runtime not in RUNTIMES:
        raise unknown("--runtime", args.runtime, RUNTIMES)
    tasks = () if args.tasks == "none" else tuple(_listed("--tasks", args.tasks, "task"))
    model = args.model or REFERENCE_MODEL
    if args.target == "":
        raise UserError("--target '': give a model's name, folder or .gguf file, or leave the option out")
    target = args.target or (str(args.model) if args.model else DEFAULT_TARGET)
    label = "reference" if args.model is None else _real("--model", args.model).name
    goal = "" if args.target is None and args.model else f"-{Path(target).name}"
    default_name = re.sub(r"[^A-Za-z0-9._-]", "-", f"{label}{goal}-{args.budget}").lstrip("._-")[:100]
    name = study_name(default_name if args.study is None else args.study)
    if args.ray_address is not None and args.workers == 0:
        raise UserError("--ray-address needs Ray workers, and --workers 0 has none; give one or the other")
    if args.tasks_path is not None and not args.tasks_path.is_dir():
        raise UserError(f"--tasks-path {args.tasks_path}: no such folder")
    return Options(
        budget=budget,
        model=model,
        target=target,
        device=profile,
        context=at_least("--context", args.context, 1),
        runtime=args.runtime,
        trials=at_least("--trials", args.trials, 1),
        workers=at_most("--workers", at_least("--workers", args.workers, 0), MOST_THREADS),
        fewer_workers=unasked,
        ray_address=args.ray_address,
        types=weight_types(args.types),
        stream=args.stream,
        sampler=args.sampler,
        tasks=tasks,
        tasks_path=args.tasks_path,
        limit=at_least("--limit", args.limit, 1),
        text=args.text,
        calibration=args.calibration,
        seed=seed(args.seed),
        study=name,
        storage=args.storage,
        tracking_uri=args.tracking_uri,
        out=place("--out", args.out or Path("runs") / name, folder=True),
        export=not args.no_export,
        repair=args.repair,
        dry_run=args.dry_run,
    )
