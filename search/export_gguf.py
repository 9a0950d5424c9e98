"""The part of `search.export` that compresses a GGUF file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from compression.files import write_text
from compression.gguf_candidate import check_candidate, completed, doubts
from compression.gguf_file import GgufFile
from compression.gguf_imatrix import Imatrix
from compression.gguf_inventory import describe_gguf
from compression.gguf_requantize import requantize
from search.console import Stages, console, describe
from spaces.budget import format_size
from spaces.candidate import Candidate
from spaces.errors import MALFORMED, UserError, unknown
from spaces.json_text import read_text
from spaces.quant_types import WEIGHT_TYPES


def export_candidate(args: argparse.Namespace) -> None:
    """Applies a candidate to a GGUF file; see `search.export` for the options.

    Raises:
        UserError: A file is bad, or the candidate is not one of this model.
    """
    source = GgufFile.open(args.model)
    inventory = describe_gguf(source)
    _say(describe(inventory))
    if args.uniform is not None:
        if args.uniform not in WEIGHT_TYPES:
            raise unknown("--uniform", args.uniform, WEIGHT_TYPES)
        name, candidate = f"--uniform {args.uniform}", Candidate.uniform(inventory, args.uniform)
    else:
        name = str(args.candidate)
        candidate = completed(inventory, _read(args.candidate), name)
    if args.out.suffix == ".json":
        write_text(args.out, _editable(candidate))
        return _say(f"{args.out}: change experts, top_k and types, then give it as --candidate")
    imatrix = None if args.imatrix is None else Imatrix(args.imatrix)
    check_candidate(inventory, candidate, imatrix, name)
    for line in doubts(inventory, candidate, imatrix):
        _say(f"warning: {line}")
    total = inventory.file_bytes(candidate.plan)
    with Stages(lambda: 0).stage(f"writing {format_size(total)}") as advance:
        size = requantize(
            source,
            candidate,
            args.out,
            imatrix,
            lambda done: advance(done >> 20, total >> 20, "MiB" if done < total else ""),
            name=name,
            threads=args.threads,
        )
    _say(f"{args.out}: {format_size(size)} ({size:,} bytes)")


def _say(line: str) -> None:
    """One line, however long; names in it are not formatting, and may be no Unicode."""
    console.print(line.encode("utf-8", "backslashreplace").decode(), markup=False, soft_wrap=True)


def _read(path: Path) -> Candidate:
    try:
        text = read_text(path)
    except MALFORMED as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); give a candidate.json") from error
    return Candidate.from_json(text, str(path))


def _editable(candidate: Candidate) -> str:
    """The candidate's JSON, a line for each layer and each tensor."""
    data = json.loads(candidate.to_json())
    layers = ",\n".join(f"  {json.dumps(m)}" for m in data["layers"])
    types = ",\n".join(f"  {json.dumps(n)}: {json.dumps(t)}" for n, t in data["types"].items())
    return f'{{"version": {data["version"]},\n"layers": [\n{layers}\n],\n"types": {{\n{types}\n}}}}\n'
