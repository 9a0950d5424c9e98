"""`python -m tests.faults.worker_peak CHECKPOINT CACHE hold|stream`: a worker at its largest jobs.

Prints the bytes that were planned for it and its largest resident size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from compression.checkpoint import load_tokenizer, open_checkpoint
from search.cache_files import save_text
from search.memory import make_plan, worker_bytes
from search.options import SHIPPED_TEXTS
from search.runner import ROUND, SLOPE_PROBES, SLOPE_TOKENS
from search.stages import SEARCH_TOKENS, prepare_texts
from search.worker import Setup, Worker

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_0", "Q8_0", "IQ4_NL")


def main(checkpoint: str, cache: str, stream: bool) -> None:
    """Does every kind of job once, the scores of a round several times."""
    folder = Path(cache)
    folder.mkdir(parents=True, exist_ok=True)
    inventory = open_checkpoint(Path(checkpoint)).inventory
    texts = prepare_texts(load_tokenizer(Path(checkpoint)), SHIPPED_TEXTS, None, None)
    for name in ("calibration", "search"):
        save_text(texts[name], folder)
    kept = min(
        make_plan(inventory, 1, "yes" if stream else "no").cache_bytes,
        4 * inventory.parameters() * len(TYPES),
    )
    worker = Worker(
        Setup(checkpoint, "m", cache, exportable=False, stream=stream, types=TYPES, cache_bytes=kept)
    )
    worker.calibrate()
    worker.base_states("search")
    rows = []
    for tensor in inventory.quantizable:
        rows += worker.quantize(tensor.name, worker.space.ladder(tensor))
    worker.register([row[:3] for row in rows])
    space = worker.space
    candidates = []
    for i in range(ROUND):
        ladders = {t.name: space.ladder(t) for t in inventory.quantizable}
        types = {name: ladder[(i + j) % len(ladder)] for j, (name, ladder) in enumerate(ladders.items())}
        candidates.append(space.candidate(space.params(types, space.kept_options[-1], space.criteria[0])))
    if not stream:
        worker.slopes(None, SLOPE_TOKENS, SLOPE_PROBES)
        worker.slopes(candidates[0].to_json(), SLOPE_TOKENS, SLOPE_PROBES)
    worker.score([c.to_json() for c in candidates], "search", SEARCH_TOKENS)
    planned = worker_bytes(inventory, stream, kept)
    print(json.dumps({"planned": planned, "peak": worker.peak_memory()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "stream")
