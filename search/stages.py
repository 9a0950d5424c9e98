"""What happens before the first trial: texts, calibration, quantization, option costs.

Each stage leaves files in the study's cache folder and finds them there when
the same command runs again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compression.files import write_text
from evaluators.texts import TextSet, make_windows, read_documents, split_documents
from search.costs import CostModel, Option, probes
from search.pool import Job, Pool
from search.worker import bank_index, load_text, save_bank_index, save_text
from spaces.space import Space

SEARCH_TOKENS = 16384
SELECTION_TOKENS = 24576
REPORT_TOKENS = 24576
CALIBRATION_TOKENS = 16384
COST_TOKENS = 2048
_TOGETHER = 16  # options measured in one job

Progress = Callable[[int, int], None]
"""Called with (done, total) of a stage."""


def prepare_texts(
    tokenizer: Any, shipped: Path, text: Path | None, calibration: Path | None, cache: Path
) -> dict[str, TextSet]:
    """Cuts the four disjoint texts into windows and writes them to `cache`.

    Raises:
        UserError: A text cannot be read, or is too short.
    """
    sizes = {"search": SEARCH_TOKENS, "selection": SELECTION_TOKENS, "report": REPORT_TOKENS}
    if text is not None:
        documents = split_documents(read_documents(text, "--text"), tuple(sizes))
    else:
        documents = {n: read_documents(shipped / f"{n}.jsonl", "text") for n in sizes}
    source = calibration or shipped / "calibration.jsonl"
    documents["calibration"] = read_documents(source, "--calibration")
    sizes["calibration"] = CALIBRATION_TOKENS
    out = {}
    for name, tokens in sizes.items():
        out[name] = make_windows(name, documents[name], tokenizer, tokens)
        save_text(out[name], cache)
    return out


def stale(cache: Path, identity: dict[str, Any]) -> bool:
    """Whether the cache belongs to another model or other texts; writes `identity` if it is new."""
    file = cache / "identity.json"
    if not file.exists():
        write_text(file, json.dumps(identity, indent=2, sort_keys=True))
        return False
    return bool(json.loads(file.read_text("utf-8")) != identity)


def calibrate(pool: Pool, cache: Path, progress: Progress) -> None:
    """Calibration first (the bank hangs on it), then the base model's states on the three texts."""
    names = ("search", "selection", "report")
    sizes = {n: int(load_text(n, cache).windows.size) for n in (*names, "calibration")}
    total, done = sum(sizes.values()), 0

    def advance(name: str) -> None:
        nonlocal done
        done += sizes[name]
        progress(done, total)

    if not (cache / "calibration.npz").exists():
        pool.run([("calibrate", ())])
    advance("calibration")
    missing = [n for n in names if not (cache / f"base-{n}.npy").exists()]
    for name in set(names) - set(missing):
        advance(name)
    pool.run([("base_states", (n,)) for n in missing], lambda i, _: advance(missing[i]))


def quantize(pool: Pool, space: Space, cache: Path, progress: Progress) -> dict[tuple[str, str], float]:
    """Fills the bank with every tensor in every type of its ladder; returns the error of each."""
    index = bank_index(cache)
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


def _read_costs(file: Path) -> dict[Option, float]:
    """Costs measured so far; a line cut short by a crash is measured again."""
    out: dict[Option, float] = {}
    if file.exists():
        for line in file.read_text("utf-8").splitlines():
            try:
                decision, choice, cost = json.loads(line)
            except ValueError:
                continue
            out[decision, tuple(choice) if isinstance(choice, list) else choice] = cost
    return out


def measure_costs(
    pool: Pool, space: Space, errors: dict[tuple[str, str], float], cache: Path, progress: Progress
) -> CostModel:
    """Measures the probed options one at a time and completes them to a cost model."""
    file = cache / "costs.jsonl"
    measured = _read_costs(file)
    wanted = probes(space)
    missing = [o for o in wanted if o not in measured]
    # Neighbours share the blocks before the one they change, so they go to a worker together.
    chunks = [missing[i : i + _TOGETHER] for i in range(0, len(missing), _TOGETHER)]
    jobs: list[Job] = [("costs", (chunk, COST_TOKENS)) for chunk in chunks]
    done = len(wanted) - len(missing)
    progress(done, len(wanted))
    with file.open("a", encoding="utf-8") as stream:

        def collect(i: int, costs: list[float]) -> None:
            nonlocal done
            for (decision, choice), cost in zip(chunks[i], costs, strict=True):
                measured[decision, choice] = cost
                stream.write(json.dumps([decision, choice, cost]) + "\n")
            stream.flush()
            done += len(costs)
            progress(done, len(wanted))

        pool.run(jobs, collect)
    return CostModel(space, measured, errors)
