"""The README's table from a finished run: `python -m experiments.readme_table runs/NAME/result.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from search.commands import run_command
from search.options import Parser
from spaces.errors import MALFORMED, UserError


def table(result: dict[str, Any]) -> str:
    """Markdown: winners and baselines on the report text, lowest KL first."""
    trials = {t["number"]: t for t in result["trials"]}
    names = {n: f"baseline `{name}`" for name, n in result["baselines"].items()}
    for form, number in result["winners"].items():
        if number is not None:
            names[number] = f"**winner, {form}**" + (f" (= {names[number]})" if number in names else "")
    rows = []
    shown = [(number, name, result["finals"][str(number)]["report"]) for number, name in names.items()]
    shown += [
        (number, f"**winner, {form}, repaired: as exported**", result["repairs"][str(number)]["report"])
        for form, number in result["winners"].items()
        if result.get("repairs", {}).get(str(number), {}).get("used")
    ]
    for number, name, quality in shown:
        scores = trials[number]["scores"]
        experts = sorted({len(m["experts"]) for m in trials[number]["candidate"]["layers"]})
        kept = str(experts[0]) if len(experts) == 1 else f"{experts[0]}-{experts[-1]}"
        rows.append(
            (
                quality["kl"],
                f"| {name} | {quality['kl']:.3f} ± {quality['kl_se']:.3f} | {quality['perplexity']:.1f} "
                f"| {quality['top1']:.1%} | {kept} | {scores['target_bytes'] / 1e9:.2f} "
                f"| {scores['tokens_per_second']:.1f} |",
            )
        )
    head = "| config | KL (nats) | perplexity | top-1 | experts kept of 16 | target GB | target tokens/s |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *(row for _, row in sorted(rows))])


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("result", type=Path)
    args = parser.parse_args()
    try:
        text = table(json.loads(args.result.read_text("utf-8")))
    except MALFORMED as error:
        raise UserError(f"{args.result}: {error}; give the result.json of a finished run") from error
    print(text)


if __name__ == "__main__":
    run_command(main)
