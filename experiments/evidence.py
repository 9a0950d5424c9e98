"""docs/evidence.md, from committed results alone: `python -m experiments.evidence docs/evidence.md`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from compression.files import write_text
from experiments import ablation, proxy_validity
from experiments.benchmarks.search_plots import Results
from experiments.long_form_report import lines
from spaces.budget import format_size
from spaces.devices import DEVICES

RESULTS = Path(__file__).with_name("results")
_RANKS, _ROUGHLY = 0.9, 0.6  # of the lower end of Spearman's interval

_HEAD = """# Evidence

What the parts are worth, whether the scores can be trusted, how fast devices are, and what long texts show. Every figure is
of the reference model (17.7M parameters); bytes are DeepSeek-V3's. This page is made by
`python -m experiments.evidence docs/evidence.md` from the JSON files in `experiments/results/`, which the commands named here
made."""


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text("utf-8"))


def levers() -> str:
    """The ablation."""
    results = Results(_read("search.json"))
    text = f"""## What each lever is worth

`python -m experiments.ablation OUT --json experiments/results/search.json`. The same engine, 120,000 tokens of forward pass each,
with levers forbidden; without types, all tensors take one type, the best that fits. *One after the other* prunes first, then
looks at top-k (which saves no bytes, so nothing is taken from it), then gives all tokens to types.

{ablation.markdown(results)}
![KL with levers forbidden](../experiments/results/ablation.png)

"""
    said = []
    for budget in ablation.BUDGETS:
        whole = results.mean(ablation.WHOLE, budget)
        others = {m: results.mean(m, budget) for m in ablation.NAMES if m != ablation.WHOLE}
        single = {m: others[m] for m in ("only experts", "only top-k", "only types")}
        one, best = min(single, key=lambda m: single[m]), min(others, key=lambda m: others[m])
        alone = f"the best single lever ({one.removeprefix('only ')}) has {single[one] / whole:.2f} x its KL"
        if single[one] == float("inf"):
            alone = "no single lever fits"
        said.append(
            f"At {budget:g} GB all three jointly have {whole:.3f}; {alone}; the paper's order has "
            f"{others['sequential'] / whole:.2f} x, with the best ratio "
            f"{others['sequential, tuned'] / whole:.2f} x; the "
            f"nearest is {ablation.NAMES[best]} ({others[best] / whole:.2f} x)."
        )
    return text + "\n".join(f"* {line}" for line in said)


def proxies() -> str:
    """Whether scores rank as outcomes do."""
    found = _read("proxy_validity.json")
    about, rows = found["about"], found["correlations"]
    said = []
    items = about["items"] * len(about["tasks"])
    middle = float(np.median([r["accuracy"] for r in found["rows"]]))
    error = math.sqrt(middle * (1 - middle) / items)
    for proxy, row in rows.items():
        parts = []
        for outcome, value in row.items():
            rho, low, _ = value["spearman"]
            word = (
                "ranks" if low > _RANKS else "ranks roughly" if low > _ROUGHLY else "does not rank reliably"
            )
            parts.append(f"{word} by {proxy_validity.OUTCOMES[outcome]} ({rho:.2f})")
        said.append(f"* **{proxy_validity.PROXIES[proxy]}** {', '.join(parts)}.")
    return f"""## Can the scores be trusted?

`python -m experiments.proxy_validity OUT --study NAME --json experiments/results/proxy_validity.json`: {about["configs"]} portable
configs spread over the space (from the smallest to three times its bytes, a third of them random through and through), {about["report_tokens"]:,}
tokens of report text, {about["llama_tokens"]:,} of them in llama.cpp, {len(about["tasks"])} lm-eval tasks of {about["items"]} items or
less. Spearman's correlation (95 % interval over configs), Kendall's; signs are turned so that 1 is the same order.

{proxy_validity.table(rows)}

Accuracy is a mean over {items} items: its own standard error is {error:.3f}, much of the range between good configs, and no proxy can
rank better than the items do.

Read as: above {_RANKS} at the lower end of the interval ranks, above {_ROUGHLY} ranks roughly.

{chr(10).join(said)}

![Proxies against outcomes](../experiments/results/proxy_validity.png)"""


def devices() -> str:
    """Profiles, and predicted against measured speed here."""
    found = _read("decode_speed.json")
    profiles = "\n".join(
        f"| `{d.name}` | {d.title} | {format_size(d.memory)} | {d.bandwidth / 1e9:.4g} GB/s"
        f"{f' and {d.host_bandwidth / 1e9:.4g} GB/s' if d.host_bandwidth else ''} | {d.source} |"
        for d in DEVICES.values()
    )
    measured = "\n".join(
        f"| {name} | {c['predicted']:.1f} | {c['measured']:.1f} | {c['error']:+.1%} | "
        f"{c['roofline']:.1f} ({c['roofline_error']:+.0%}) |"
        for name, c in found["candidates"].items()
    )
    rates = sorted(found["rates"].items(), key=lambda item: item[1])
    slow, fast = rates[:3], rates[-3:]

    def listed(some: list[tuple[str, float]]) -> str:
        return ", ".join(f"{n} {r / 1e9:.1f}" for n, r in some)

    return f"""## Devices and speed

| `--device` | device | memory | bandwidth | source |
|---|---|---|---|---|
{profiles}

tokens/s are predicted: bytes a token reads over the bandwidth that decoding reaches, and on a CPU never faster than the
type decodes. The rates were measured through llama.cpp on one machine ({found["cpu"]}, {found["threads"]} thread), by
`python -m experiments.decode_speed DIR --json experiments/results/decode_speed.json --rates spaces/decode_rates.json`: a random
Mixture-of-Experts model of {found["parameters"] / 1e9:.2f}B parameters in every type, then {len(found["candidates"])} other
candidates of mixed types and top-k predicted and measured. Fewer bits are not faster there: the slowest are {listed(slow)} Gweights/s,
the fastest {listed(fast)}, and the model says so.

| candidate | predicted tokens/s | measured | error | bandwidth alone would say |
|---|---|---|---|---|
{measured}

Median error {found["median_error"]:.1%}, largest {found["largest_error"]:.1%}; bandwidth alone is off by {found["roofline_median_error"]:.0%}.
The other devices were not at hand: their figures are estimates.

![Predicted against measured tokens/s](../experiments/results/decode_speed.png)"""


def long_form() -> str:
    """Positions and long generations."""
    found = _read("long_form.json")
    said = "\n".join(lines(found))
    return f"""## Long texts

`python -m experiments.long_form runs/NAME --json experiments/results/long_form.json --plot experiments/results/long_form.png`, the
winners of study {found["study"]} as exported (± standard errors, paired over windows or prompts).

```
{said}
```

![Damage by position, repetition](../experiments/results/long_form.png)"""


def page() -> str:
    """The whole page."""
    return "\n\n".join([_HEAD, levers(), proxies(), devices(), long_form()]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    write_text(parser.parse_args().out, page())


if __name__ == "__main__":
    main()
