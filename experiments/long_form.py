"""Long-form behaviour: `python -m experiments.long_form RUN_FOLDER --json FILE [--plot PNG]`.

A finished run's winners, as they were exported (repaired where the run repaired them), against the base
model. KL, perplexity and top-1 agreement by position in the context, on all of the report text in windows
of the model's context: the portable winner as its GGUF in llama.cpp, the ragged one as its folder in
transformers. Then 32 texts of 512 tokens, greedy and sampled, of the portable winner and of the base model
(its F32 GGUF: llama.cpp rounds activations where weights are BF16), paired by prompt; a ragged model is
none that llama.cpp loads. Positions beyond what the base model itself makes use of are marked so, and
trends and texts are given within that too. What was measured stays in --scratch, so that a command killed
goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from compression import load
from compression.candidate_model import CandidateModel
from compression.checkpoint import load_tokenizer, open_checkpoint
from compression.files import atomic, write_text
from compression.gguf_export import export_gguf, with_tokenizer
from compression.variant_bank import VariantBank
from evaluators.divergence import Reference, TokenDivergence, base_states, references, token_divergence
from evaluators.generations import Sampling, compare
from evaluators.llama_cpp import file_generations, logits_in_parts
from evaluators.positions import buckets, by_position, mean_and_error, trend, usable_context
from evaluators.texts import TextSet, make_windows
from experiments.long_form_report import draw, lines
from search.commands import run_command
from search.memory import streams
from search.options import SHIPPED_TEXTS, Parser, at_least
from search.stages import REPORT_TOKENS, scored_documents
from search.study import open_storage
from spaces.candidate import Candidate
from spaces.errors import MALFORMED, UserError

PROMPTS, PROMPT, GENERATED = 32, 32, 512
SAMPLING = {"greedy": None, "sampled": Sampling(tuple(range(PROMPTS)))}
LATE = 32  # the trend is also given from this position on, without the first few words
_WINDOWS = 8  # at least: the standard errors are over them
_AT_ONCE = 8  # prompts of one file in the scratch folder
_TIMEOUT = 24 * 3600.0


class LongForm:
    """A run folder and what is measured on it; arrays stay in the scratch folder once they are there."""

    def __init__(self, folder: Path, context: int | None, scratch: Path | None, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.result, settings = _read(folder)
        self.checkpoint = open_checkpoint(Path(settings["model"]), settings["name"])
        self.tokenizer = load_tokenizer(self.checkpoint.path)
        text = None if settings["text"] is None else Path(settings["text"])
        self.documents = scored_documents(SHIPPED_TEXTS, text)["report"]
        self.context = context or self.checkpoint.inventory.context
        self.windows = self._windows()
        self.prompts = self._prompts()
        self.gguf = folder / "winner" / "model.gguf"
        self.stream = streams(settings.get("stream", "auto"), self.checkpoint.inventory, 1)
        key = hashlib.sha256((folder / "result.json").read_bytes())
        key.update(f"{self.checkpoint.fingerprint} {self.windows.digest} {SAMPLING} {GENERATED}".encode())
        key.update(self.prompts.tobytes())
        self.scratch = (scratch or folder / "long-form") / key.hexdigest()[:12]
        self.scratch.mkdir(parents=True, exist_ok=True)

    def _windows(self) -> TextSet:
        identity = json.loads((self.folder / "cache" / "identity.json").read_text("utf-8"))
        if make_windows("report", self.documents, self.tokenizer, REPORT_TOKENS).digest != identity["report"]:
            raise UserError(f"{self.folder}: its report text has changed since the run; run the search again")
        text = make_windows("report", self.documents, self.tokenizer, 2**62, self.context)
        if len(text.windows) < _WINDOWS:
            raise UserError(
                f"--context {self.context}: the report text holds {len(text.windows)} windows of so many "
                f"tokens where {_WINDOWS} are needed; give a smaller one"
            )
        return text

    def _prompts(self) -> np.ndarray:
        """(n, PROMPT) first tokens of report documents, sources taking turns."""
        queues: dict[str, list[list[int]]] = {}
        for source, body in self.documents:
            tokens = self.tokenizer(body, add_special_tokens=False)["input_ids"]
            if len(tokens) >= PROMPT:
                queues.setdefault(source, []).append(tokens[:PROMPT])
        turns = [q[i] for i in range(max(map(len, queues.values()), default=0)) for q in queues.values()
                 if i < len(q)]  # fmt: skip
        if len(turns) < 2:
            raise UserError(f"the report text of {self.folder} has no two documents of {PROMPT} tokens")
        return np.array(turns[:PROMPTS], np.int32)

    @cached_property
    def model(self) -> CandidateModel:
        """The base model."""
        plain = self.checkpoint.inventory
        inventory = with_tokenizer(self.checkpoint) if self.gguf.exists() else plain
        return CandidateModel(self.checkpoint, inventory, VariantBank(self.scratch / "bank"), self.stream)

    @cached_property
    def states(self) -> np.ndarray:
        """(n, context, hidden) states of the base model on the windows."""
        file = self.scratch / "base.npy"
        if not file.exists():
            base_states(self.model, self.windows, file)
        states: np.ndarray = np.load(file, mmap_mode="r")
        return states

    @cached_property
    def base_gguf(self) -> Path:
        file = self.scratch / "base.gguf"
        if not file.exists():
            candidate, weights = Candidate.uniform(self.model.inventory, "F32"), self.model.weights
            for name, kind in candidate.types:
                part = self.model.family.by_name[name]
                ((_, key, _),) = self.model.bank.add(
                    part.tensor, [kind], lambda e, part=part: weights.read(part, e),  # type: ignore[misc]
                    None, self.checkpoint.fingerprint,
                )  # fmt: skip
                self.model.bank.register(name, kind, key)
            export_gguf(self.model, candidate, file)
            shutil.rmtree(self.scratch / "bank")
        return file

    def _kept(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        file = self.scratch / f"{name}.npy"
        if not file.exists():
            print(f"measuring {name}", flush=True)
            values = make()
            with atomic(file) as stream:
                np.save(stream, values)
        kept: np.ndarray = np.load(file)
        return kept

    def tokens(self, form: str) -> TokenDivergence:
        """The winner of a form, token by token."""
        measure = self._portable if form == "portable" else self._ragged

        def stacked() -> np.ndarray:
            t = measure()
            return np.stack([t.kl, t.nll, t.top1, t.base_nll])

        return TokenDivergence(*self._kept(f"positions-{form}", stacked))

    @cached_property
    def usable(self) -> int:
        """Tokens of context that the base model makes use of, at most those of its config."""
        import torch

        def likelihood() -> np.ndarray:
            windows = torch.from_numpy(self.windows.windows.astype(np.int64))
            return torch.cat([b.nll for _, b in references(self.model, windows, self.states)]).numpy()

        declared = self.checkpoint.inventory.context
        return min(usable_context(self._kept("base-likelihood", likelihood)) or declared, declared)

    def _ragged(self) -> TokenDivergence:
        import torch

        loaded = load(self.folder / "winner" / "ragged")
        windows = torch.from_numpy(self.windows.windows.astype(np.int64))
        bases = references(self.model, windows, self.states)
        return token_divergence(bases, lambda part: loaded(windows[part], use_cache=False).logits)

    def _portable(self) -> TokenDivergence:
        import torch

        def scored(some: slice, rows: np.ndarray) -> TokenDivergence:
            bases = references(self.model, windows[some], self.states[some])
            return token_divergence(bases, lambda part: torch.from_numpy(np.array(rows[part])))

        windows = torch.from_numpy(self.windows.windows.astype(np.int64))
        found = [scored(*part) for part in self._logits(self.gguf, self.windows.windows)]
        columns = zip(*((t.kl, t.nll, t.top1, t.base_nll) for t in found), strict=True)
        return TokenDivergence(*map(np.concatenate, columns))

    def _logits(self, path: Path, windows: np.ndarray) -> Any:
        return logits_in_parts(path, windows, self.scratch, threads=self.threads, timeout=_TIMEOUT)

    def positions(self, form: str) -> dict[str, Any]:
        """The figures of a winner by position."""
        tokens, number = self.tokens(form), self.result["winners"][form]
        rows = [row | {"beyond_context": row["first"] >= self.usable} for row in by_position(tokens)]
        spans = buckets(0, tokens.kl.shape[1])
        within = [s for s in spans if s[0] < self.usable]
        late, beyond = [s for s in within if s[0] >= LATE], spans[len(within) - 1 :]
        trends = [trend(tokens.kl, s) for s in (within, late, beyond) if len(s) > 1]
        return {
            "trial": number,
            "repaired": bool(self.result.get("repairs", {}).get(str(number), {}).get("used")),
            "measured_in": "llama.cpp" if form == "portable" else "transformers",
            "kl_trends": [asdict(t) for t in trends if t],
            "positions": rows,
        }

    def generated(self, name: str, method: str) -> tuple[np.ndarray, np.ndarray]:
        """Texts of `base` or `candidate`, (n, GENERATED) ids, and their likelihood under the base model."""
        path, sampling = self.base_gguf if name == "base" else self.gguf, SAMPLING[method]
        parts = []
        for i in range(0, len(self.prompts), _AT_ONCE):
            prompts = self.prompts[i : i + _AT_ONCE]
            how = sampling and replace(sampling, seeds=sampling.seeds[i : i + len(prompts)])
            parts.append(
                self._kept(
                    f"generated-{name}-{method}-{i}",
                    lambda p=prompts, h=how: file_generations(  # type: ignore[misc]
                        path, p, GENERATED, sampling=h, end=self.tokenizer.eos_token_id,
                        threads=self.threads, timeout=_TIMEOUT,
                    ),
                )
            )  # fmt: skip
        texts = np.concatenate(parts)
        return texts, self._kept(f"likelihood-{name}-{method}", lambda: self._likelihood(texts))

    def _likelihood(self, texts: np.ndarray) -> np.ndarray:
        """(n, GENERATED) negative log-likelihood of generated tokens under the base model."""
        import torch

        windows = np.concatenate([self.prompts, np.maximum(texts, 0)], 1)
        rows = []
        for some, logits in self._logits(self.base_gguf, windows):
            for window, row in zip(windows[some].astype(np.int64), logits, strict=True):
                base = torch.from_numpy(np.array(row))[None]
                rows.append(Reference(base, torch.from_numpy(window)[None]).nll[0, PROMPT - 1 :].numpy())
        return np.stack(rows)

    def generations(self) -> dict[str, Any]:
        """The portable winner's texts against the base model's."""
        within = min(GENERATED, max(0, self.usable - PROMPT))
        out: dict[str, Any] = {
            "prompts": len(self.prompts), "prompt_tokens": PROMPT, "generated_tokens": GENERATED,
            "positions_beyond_context": GENERATED - within,
            "temperature": SAMPLING["sampled"].temperature, "top_p": SAMPLING["sampled"].top_p,  # type: ignore[union-attr]
            "seeds": list(range(len(self.prompts))), "methods": {},
        }  # fmt: skip
        for method in SAMPLING:
            texts, nll = {}, {}
            for name in ("base", "candidate"):
                texts[name], nll[name] = self.generated(name, method)
            out["methods"][method] = {
                "whole": compare(self.prompts, texts, nll, GENERATED),
                "within_context": compare(self.prompts, texts, nll, within),
                "positions": _by_position(texts, nll, self.usable),
            }
        return out


def _by_position(
    texts: dict[str, np.ndarray], nll: dict[str, np.ndarray], context: int
) -> list[dict[str, Any]]:
    """Likelihood of both models' texts under the base model, of the texts that reach a bucket."""
    rows = []
    for first, last in buckets(PROMPT, PROMPT + GENERATED, context):
        row: dict[str, Any] = {"first": first, "last": last, "beyond_context": first >= context}
        some = slice(first - PROMPT, last + 1 - PROMPT)
        for name, tokens in texts.items():
            there = tokens[:, some] >= 0
            reached = there.any(1)
            means = (nll[name][:, some] * there).sum(1)[reached] / there.sum(1)[reached]
            value = mean_and_error(means) if len(means) > 1 else (None, None)
            row |= {f"{name}_nll": value[0], f"{name}_nll_se": value[1], f"{name}_texts": len(means)}
        rows.append(row)
    return rows


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """result.json and the settings of the run's study."""
    try:
        result = json.loads((folder / "result.json").read_text("utf-8"))
        name = result["study"]
    except MALFORMED as error:
        raise UserError(f"{folder}: no finished run of search.run ({error}); give its folder") from error
    journal = folder / "study.journal"
    if not journal.exists():
        raise UserError(f"{journal}: missing; the run's settings are read from it")
    study = optuna.load_study(study_name=name, storage=open_storage(str(journal), journal))
    settings: dict[str, Any] = study.user_attrs["settings"]
    return result, settings


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the figures go")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a window (default: the model's)")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="default: RUN_FOLDER/long-form")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of llama.cpp")
    args = parser.parse_args()
    at_least("--threads", args.threads, 1)
    if args.context is not None:
        at_least("--context", args.context, 2 * LATE)
    run = LongForm(args.run, args.context, args.scratch, args.threads)
    made = {"portable": run.gguf, "ragged": args.run / "winner" / "ragged"}
    forms = [f for f, path in made.items() if run.result["winners"].get(f) is not None and path.exists()]
    if not forms:
        raise UserError(f"{args.run / 'winner'}: holds no exported model; run the search without --no-export")
    figures = {
        "study": run.result["study"], "model": run.result["model"], "target": run.result["target"],
        "budget_bytes": run.result["budget_bytes"], "windows": len(run.windows.windows),
        "window": run.context, "declared_context": run.checkpoint.inventory.context,
        "usable_context": run.usable,
        "winners": {form: run.positions(form) for form in forms},
        "generations": run.generations() if "portable" in forms else None,
    }  # fmt: skip
    write_text(args.json, json.dumps(figures, indent=1) + "\n")
    print("\n".join(lines(figures)))
    if args.plot:
        draw(figures, args.plot)


if __name__ == "__main__":
    run_command(main)
