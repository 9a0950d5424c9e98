"""Jobs that explain a candidate: what each part of it costs, and how it routes.

What they find lies in cache/evidence/KEY.json (KEY-repaired.json with its repairs), version 1:

    version, candidate, repaired
    tokens  {parts, details, routing}: of report text, per setting
    parts   [{kind, name, kl, kl_se}]: see `evaluators.contributions`; KL in nats per token, without repairs
    windows {kl, sources}: KL of the candidate on each of the windows of `tokens.parts`, and their sources
    routing [{layer, kept_mass, ...}]: see `evaluators.routing`; with repairs where `repaired`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compression import sealed
from evaluators.texts import TextSet
from search.cache_files import material, text_digests
from spaces.candidate import Candidate

if TYPE_CHECKING:
    from compression.overrides import Overrides

VERSION = 1
PART_TOKENS = 4608
"""Of every lever, alone and taken away; also of routing."""

DETAIL_TOKENS = 1152
"""Of every role and layer alone."""


def evidence_file(cache: Path, key: str, repaired: bool) -> Path:
    """Where the evidence of a candidate lies."""
    return cache / "evidence" / f"{key}{'-repaired' if repaired else ''}.json"


class EvidenceJobs:
    """Mixed into `search.worker.Worker`, whose attributes it uses."""

    cache: Path
    model: Any
    checkpoint: Any
    settings: Any
    population: Any

    def _spread(self, tokens: int, name: str = "search") -> tuple[TextSet, np.ndarray]:
        raise NotImplementedError

    def _text(self, name: str, tokens: int) -> TextSet:
        raise NotImplementedError

    def _states(self, name: str) -> np.ndarray:
        raise NotImplementedError

    def repairs(self, candidate: Candidate) -> Overrides:
        raise NotImplementedError

    def evidence(self, candidate: str, repaired: bool = False) -> dict[str, Any]:
        """Evidence of a candidate on report text; what was found before is read again."""
        chosen = Candidate.from_json(candidate)
        file = evidence_file(self.cache, chosen.key, repaired)
        made_of = material(self.cache, "report")
        if repaired:
            made_of["repairs"] = self.repairs(chosen).digest
        if file.exists():
            known: dict[str, Any] = json.loads(sealed.read(file, made_of))
            if known["version"] == VERSION:
                return known
        parts, sizes, windows = self._parts(chosen)
        routed, sizes["routing"] = self._routing(chosen, repaired)
        found = {
            "version": VERSION,
            "candidate": chosen.key,
            "repaired": repaired,
            "tokens": sizes,
            "parts": parts,
            "windows": windows,
            "routing": routed,
        }
        sealed.write(file, json.dumps(found) + "\n", made_of)
        return found

    def base_scores(self, name: str) -> dict[str, list[float]]:
        """Per-window kl (nothing), nll and top1 of the uncompressed model on a text; kept in a file."""
        file = self.cache / f"base-{name}.json"
        made_of = {"model": self.checkpoint.fingerprint, **text_digests(self.cache, name)}
        if not file.exists():
            text, states = self._text(name, 10**9), self._states(name)
            (found,) = self.population.measure([self.settings.base], text, states)
            columns = {"kl": found.kl.tolist(), "nll": found.nll.tolist(), "top1": found.top1.tolist()}
            sealed.write(file, json.dumps(columns), made_of)
        known: dict[str, list[float]] = json.loads(sealed.read(file, made_of))
        return known

    def _parts(
        self, candidate: Candidate
    ) -> tuple[list[dict[str, Any]], dict[str, int], dict[str, list[Any]]]:
        """KL of every part, the tokens each was measured on, and the candidate's windows."""
        from evaluators.contributions import parts

        rows, sizes, windows = [], {}, dict[str, list[Any]]()
        wanted = parts(self.settings, candidate)
        levers = [p for p in wanted if p.kind in ("all", "only", "without")]
        for name, some, tokens in (
            ("parts", levers, PART_TOKENS),
            ("details", [p for p in wanted if p not in levers], DETAIL_TOKENS),
        ):
            text, states = self._spread(tokens, "report")
            sizes[name] = int(text.windows.size)
            found = self.population.measure([p.setting for p in some], text, states)
            for part, d in zip(some, found, strict=True):
                error = float(d.kl.std(ddof=1) / np.sqrt(len(d.kl))) if len(d.kl) > 1 else 0.0
                rows.append({"kind": part.kind, "name": part.name, "kl": d.mean_kl, "kl_se": error})
                if part.kind == "all":
                    windows = {"kl": [round(float(x), 6) for x in d.kl], "sources": list(text.sources)}
        return rows, sizes, windows

    def _routing(self, candidate: Candidate, repaired: bool) -> tuple[list[dict[str, Any]], int]:
        """Routing of every MoE layer, and the tokens it was measured on."""
        from evaluators.routing import routing

        text, _ = self._spread(PART_TOKENS, "report")
        overrides = self.repairs(candidate) if repaired else None
        try:
            found = routing(
                self.model,
                self.settings.of(candidate),
                self.settings.base,
                text,
                lambda ours: self.model.use(overrides if ours else None),
            )
        finally:
            self.model.use(None)
        return [r.to_dict() for r in found], int(text.windows.size)
