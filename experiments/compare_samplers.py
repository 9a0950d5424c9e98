"""All samplers on the same space, bank and tokens: `python -m experiments.compare_samplers OUT`.

Each sampler gets a study of its own over one shared cache, with as many trials;
what counts is the best KL among the trials the sampler itself proposed, within
the budget, re-scored on the selection text. Resumes like every search.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from spaces.space import PORTABLE


def proposals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Complete trials that are no baseline."""
    return [t for t in result["trials"] if t["state"] == "COMPLETE" and not t["baseline"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the studies; OUT/cache is shared")
    parser.add_argument("--budget", default="103GB")
    parser.add_argument("--trials", type=int, default=44)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samplers", default="knapsack,tpe,nsgaii,random")
    parser.add_argument("--json", type=Path, help="file for the table's figures")
    args = parser.parse_args()
    (args.out / "cache").mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(args.seeds):
        for sampler in args.samplers.split(","):
            folder = args.out / f"{sampler}-{seed}"
            folder.mkdir(exist_ok=True)
            if not (folder / "cache").exists():
                (folder / "cache").symlink_to((args.out / "cache").resolve())
            command = [
                sys.executable, "-m", "search.run", "--budget", args.budget, "--sampler", sampler,
                "--seed", str(seed), "--trials", str(args.trials), "--tasks", "none", "--no-export",
                "--study", f"compare-{sampler}-{seed}", "--out", str(folder),
            ]  # fmt: skip
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            result = json.loads((folder / "result.json").read_text())
            own = proposals(result)
            kl = {form: [t["scores"]["kl"] for t in own if t["portable"] == (form == PORTABLE)] for form in
                  (PORTABLE, "ragged")}  # fmt: skip
            rows.append(
                {
                    "sampler": sampler,
                    "seed": seed,
                    "proposed": len([t for t in result["trials"] if not t["baseline"]]),
                    "best_portable_kl": min(kl[PORTABLE], default=None),
                    "best_ragged_kl": min(kl["ragged"], default=None),
                }
            )
            print(rows[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
