"""What happens before the first trial: texts, calibration, quantization, option costs.

Each stage leaves files in the study's cache folder and finds them there when
the same command runs again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from compression.files import naming, write_text
from compression.variant_bank import VariantBank
from evaluators.texts import TextSet, make_windows, read_documents, split_documents
from search.cache_files import bank_index, load_text, material, save_bank_index, save_text, sweep
from search.console import console
from search.costs import (
    STREAMED,
    CostModel,
    Effort,
    Option,
    Probe,
    count_probes,
    ranking_probes,
    routing_estimates,
    type_probes,
)
from search.pool import Job, Pool
from spaces.errors import MALFORMED, UserError
from spaces.space import Space

SEARCH_TOKENS = 16384
SELECTION_TOKENS = 24576
REPORT_TOKENS = 24576
CALIBRATION_TOKENS = 16384
REPAIR_TOKENS = 98304
_TOGETHER = 16  # options measured in one job

Estimate = tuple[Option, int, int]
"""An option, and the tokens and draws of labels of the gradients."""

Progress = Callable[[int, int], None]
"""Called with (done, total) of a stage."""


def scored_documents(shipped: Path, text: Path | None) -> dict[str, list[tuple[str, str]]]:
    """Documents of the search, selection and report text: the shipped ones, or `text` dealt to the three.

    Raises:
        UserError: A text cannot be read.
    """
    names = ("search", "selection", "report")
    if text is not None:
        return split_documents(read_documents(text, "--text"), names)
    return {n: read_documents(shipped / f"{n}.jsonl", "text") for n in names}


def prepare_texts(
    tokenizer: Any, shipped: Path, text: Path | None, calibration: Path | None
) -> dict[str, TextSet]:
    """Cuts the four disjoint texts into windows.

    Raises:
        UserError: A text cannot be read or is too short, or calibration is on what is scored.
    """
    sizes = {"search": SEARCH_TOKENS, "selection": SELECTION_TOKENS, "report": REPORT_TOKENS}
    documents = scored_documents(shipped, text)
    source = calibration or shipped / "calibration.jsonl"
    scored = {body for some in documents.values() for _, body in some}
    documents["calibration"] = read_documents(source, "--calibration")
    if any(body in scored for _, body in documents["calibration"]):
        raise UserError(
            f"--calibration {source}: shares documents with the text that configs are scored on; "
            "give calibration text of its own"
        )
    sizes["calibration"] = CALIBRATION_TOKENS
    # Repairs are fitted on text of the calibration's kind: as much of it as there is.
    documents["repair"], sizes["repair"] = documents["calibration"], REPAIR_TOKENS
    return {name: make_windows(name, documents[name], tokenizer, tokens) for name, tokens in sizes.items()}


def stale(cache: Path, identity: dict[str, Any]) -> bool:
    """Whether the cache belongs to another model or other texts."""
    try:
        return bool(json.loads((cache / "identity.json").read_text("utf-8")) != identity)
    except MALFORMED:
        return False  # none, or damaged: every file says itself what it is of


def keep_texts(cache: Path, texts: dict[str, TextSet], identity: dict[str, Any]) -> None:
    """Puts texts where workers find them, and notes what the cache is of."""
    cache.mkdir(parents=True, exist_ok=True)
    for text in texts.values():
        save_text(text, cache)
    write_text(cache / "identity.json", json.dumps(identity, indent=2, sort_keys=True))


def calibrate(pool: Pool, cache: Path, progress: Progress) -> None:
    """Calibration first (the bank hangs on it), then expert sets (so does the space) and base states.

    Whatever the cache holds that is damaged or of something else is removed before.
    """
    sweep(cache)
    names = ("search", "selection", "report")
    sizes = {n: int(load_text(n, cache).windows.size) for n in (*names, "calibration")}
    total, done = sum(sizes.values()) + sizes["calibration"], 0

    def advance(name: str) -> None:
        nonlocal done
        done += sizes[name]
        progress(done, total)

    if not (cache / "calibration.npz").exists():
        pool.run([("calibrate", ())])
        sweep(cache)  # what another calibration led to
    elif not (cache / "experts.json").exists():
        pool.run([("choose_experts", ())])  # else each worker would measure for itself
    advance("calibration")
    if not (cache / "expert_sets.json").exists():
        pool.run([("expert_sets", ())])
        sweep(cache)
    advance("calibration")
    missing = [n for n in names if not (cache / f"base-{n}.npy").exists()]
    for name in set(names) - set(missing):
        advance(name)
    pool.run([("base_states", (n,)) for n in missing], lambda i, _: advance(missing[i]))


def quantize(pool: Pool, space: Space, cache: Path, progress: Progress) -> dict[tuple[str, str], float]:
    """Fills the bank with every tensor in every type of its ladder; returns the error of each."""
    bank = VariantBank(cache / "bank")
    index = {name: row for name, row in bank_index(cache).items() if bank.holds(row[0])}
    jobs: list[Job] = []
    weights: list[int] = []
    total = done = 0
    # Largest first, so that the last worker is not left with the longest job.
    for tensor in sorted(space.inventory.quantizable, key=lambda t: -t.parameters):
        missing = [t for t in space.ladder(tensor) if (tensor.name, t) not in index]
        total += tensor.parameters * len(space.ladder(tensor))
        done += tensor.parameters * (len(space.ladder(tensor)) - len(missing))
        for chunk in [missing] if tensor.parameters < 2**18 else [[t] for t in missing]:
            if chunk:
                jobs.append(("quantize", (tensor.name, chunk)))
                weights.append(tensor.parameters * len(chunk))
    progress(done, total)

    def collect(i: int, rows: list[tuple[str, str, str, float]]) -> None:
        nonlocal done
        for tensor_name, type_name, key, error in rows:
            index[tensor_name, type_name] = (key, error)
        done += weights[i]
        progress(done, total)
        if i % 16 == 0:
            save_bank_index(cache, index)

    try:
        pool.run(jobs, collect)
    finally:
        save_bank_index(cache, index)
    pool.broadcast("register", [(n, t, key) for (n, t), (key, _) in index.items()])
    return {name: error for name, (_, error) in index.items()}


@dataclass
class CostFile:
    """Costs measured so far, a JSON line each; a line cut short by a crash is measured again.

    A line ends with a hash of its row and of what costs hang on, so that one that is damaged or of
    another calibration or quantizer is not used; those of another effort are, where their tokens agree.

    Attributes:
        file: JSON lines of [row, hash].
        made_of: See `search.cache_files.material`.
        unsound: Lines that the last `read` did not use.
    """

    file: Path
    made_of: Mapping[str, str] = field(default_factory=dict)
    unsound: int = field(default=0, init=False)

    def _line(self, row: Sequence[Any]) -> str:
        text = json.dumps(row)
        digest = hashlib.sha256(f"{sorted(self.made_of.items())} {text}".encode()).hexdigest()[:16]
        return json.dumps([row, digest])

    def read(self) -> tuple[dict[Probe, float], dict[Estimate, float]]:
        """Measured (option, tokens) and estimated (option, tokens, probes) costs."""
        measured: dict[Probe, float] = {}
        estimated: dict[Estimate, float] = {}
        self.unsound = 0
        if self.file.exists():
            for line in self.file.read_text("utf-8", errors="replace").splitlines():
                try:
                    row, _ = json.loads(line)
                    if self._line(row) != line:
                        raise ValueError("its hash does not hold")
                    decision, choice, tokens, cost, *probes = row
                except (ValueError, TypeError):
                    self.unsound += 1
                    continue
                option = (decision, tuple(choice) if isinstance(choice, list) else choice)
                if probes:
                    estimated[option, tokens, probes[0]] = cost
                else:
                    measured[option, tokens] = cost
        return measured, estimated

    @staticmethod
    def _whole(stream: IO[bytes]) -> bool:
        """Whether the last line ends."""
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"

    def append(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Adds (decision, choice, tokens, cost) rows; estimates have their draws of labels as a fifth."""
        with self.file.open("a+b") as stream:
            # A line that a crash cut short must not swallow the next one.
            if stream.tell() and not self._whole(stream):
                stream.write(b"\n")
        with naming(self.file), self.file.open("a", encoding="utf-8") as stream:
            stream.writelines(self._line(row) + "\n" for row in rows)


def measure_costs(
    pool: Pool,
    space: Space,
    errors: dict[tuple[str, str], float],
    cache: Path,
    progress: Progress,
    effort: Effort = STREAMED,
) -> tuple[CostModel, int]:
    """Estimates types and top-k by gradients and measures the probed options one at a time.

    Returns:
        The cost model, and the tokens of forward pass it took in all (now or earlier).
    """
    file = CostFile(cache / "option_costs.jsonl", material(cache, "search"))
    measured, known = file.read()
    if file.unsound:
        console.print(
            f"note: {file.file}: {file.unsound} lines are cut short, damaged or of another calibration or "
            "quantizer: measured anew",
            soft_wrap=True,
        )
    spent = 0
    estimated: dict[Option, float] = {}
    if effort.slope_tokens:
        at = effort.slope_tokens, effort.slope_probes
        routing = routing_estimates(space, effort)
        types = {(t.name, kind) for t in space.inventory.quantizable for kind in space.ladder(t)}
        wanted = types | {*routing}
        if not {(option, *at) for option in wanted} <= known.keys():
            (_, rows), *_ = pool.run([("slopes", (None, *at, 0, routing))])
            file.append((name, choice, at[0], second, at[1]) for name, choice, _, second in rows)
            _, known = file.read()
        estimated = {option: known[option, *at] for option in wanted}
        spent = effort.estimate_tokens(space)
    first = [*ranking_probes(space, effort), *type_probes(space, effort)]
    _measure(pool, file, first, measured, progress)
    counts = count_probes(space, effort, {p: measured[p] for p in first})
    _measure(pool, file, counts, measured, progress)
    probes = [*first, *counts]
    spent += sum(tokens for _, tokens in probes)
    found = {option: measured[option, tokens] for option, tokens in probes}
    return CostModel(space, found, errors, estimated), spent


def _measure(
    pool: Pool, file: CostFile, wanted: Sequence[Probe], measured: dict[Probe, float], progress: Progress
) -> None:
    """Adds what is missing to `measured` and to the file."""
    missing = [p for p in wanted if p not in measured]
    done = len(wanted) - len(missing)
    progress(done, len(wanted))
    # Neighbours share the blocks before the one they change, so they go to a worker together.
    groups: dict[int, list[Option]] = {}
    for option, tokens in missing:
        groups.setdefault(tokens, []).append(option)
    chunks = [
        (options[i : i + _TOGETHER], tokens)
        for tokens, options in groups.items()
        for i in range(0, len(options), _TOGETHER)
    ]

    def collect(i: int, costs: list[float]) -> None:
        nonlocal done
        options, tokens = chunks[i]
        file.append((d, choice, tokens, cost) for (d, choice), cost in zip(options, costs, strict=True))
        for option, cost in zip(options, costs, strict=True):
            measured[option, tokens] = cost
        done += len(costs)
        progress(done, len(wanted))

    pool.run([("costs", chunk) for chunk in chunks], collect)
