"""Random portable candidates in llama.cpp: `python -m experiments.verify_exports --study NAME`.

For each: the file's size against the predicted one, and llama.cpp's perplexity
on the report text against the evaluator's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution

from search.cache_files import load_text
from search.commands import run_command
from search.options import Parser, at_least, seed
from search.pool import LocalPool
from search.rebuild import OpenStudy
from search.verify import verify_gguf
from spaces.space import PORTABLE, Space


def random_params(space: Space, rng: np.random.Generator) -> dict[str, Any]:
    """Every parameter drawn evenly; portable."""
    params: dict[str, Any] = {}
    for name, distribution in space.distributions.items():
        assert isinstance(distribution, CategoricalDistribution)
        params[name] = distribution.choices[int(rng.integers(len(distribution.choices)))]
    return params | {"form": PORTABLE}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--study", required=True)
    parser.add_argument("--storage")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    at_least("--count", args.count, 1)
    seed(args.seed)
    opened = OpenStudy.open(args.study, args.storage)
    worker, rng = opened.worker, np.random.default_rng(args.seed)
    pool = LocalPool(worker.setup)
    pool.worker = worker
    text = load_text("report", worker.cache)
    rows = []
    for number in range(args.count):
        candidate = worker.space.candidate(random_params(worker.space, rng))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            size = worker.export(candidate.to_json(), str(path))
            check = verify_gguf(path, pool, candidate, text, Path(folder), int(text.windows.size))
        row = {
            "candidate": candidate.key,
            "kept": candidate.plan.kept[0][1],
            "top_k": candidate.plan.top_k[0][1],
            "bytes": size,
            "bytes_off": size - worker.model.inventory.file_bytes(candidate.plan),
            **{k: v for k, v in check.items() if k != "generated"},
        }
        rows.append(row)
        print(
            f"{number:3d}  {row['kept']:3d} experts, top-{row['top_k']}  {size:,} bytes"
            f" ({row['bytes_off']} off)"
            f"  llama.cpp {row['perplexity']:9.3f}  evaluator {row['evaluator_perplexity']:9.3f}"
            f"  {row['relative_difference']:+.4%}",
            flush=True,
        )
    worst = max(abs(r["relative_difference"]) for r in rows)
    print(f"largest relative difference {worst:.4%}; bytes off {sum(abs(r['bytes_off']) for r in rows)}")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
