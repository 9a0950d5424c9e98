"""Everything a report is made of, read from a study's files; nothing is measured here but evidence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from compression.calibration import Calibration
from search.cache_files import bank_index, load_text
from search.costs import LEAN, STREAMED, CostModel
from search.pool import LocalPool
from search.problem import Problem
from search.rebuild import OpenStudy
from search.stages import measure_costs
from spaces.candidate import Candidate
from spaces.errors import MALFORMED, UserError
from spaces.inventory import Inventory
from spaces.plan import Plan
from spaces.space import PORTABLE, RAGGED, Space


@dataclass(frozen=True)
class Quality:
    """Scores of a config on the report text.

    Attributes:
        kl, kl_se: Nats per token, and the standard error over windows.
        perplexity, top1: As in result.json.
        windows: (n,) KL of every window; None where only the mean was kept.
    """

    kl: float
    kl_se: float
    perplexity: float
    top1: float
    windows: np.ndarray | None

    @classmethod
    def of(cls, scores: dict[str, Any]) -> Quality:
        windows = scores.get("windows_kl")
        return cls(
            scores["kl"], scores["kl_se"], scores["perplexity"], scores["top1"],
            None if windows is None else np.array(windows),
        )  # fmt: skip


class _Nothing(LocalPool):
    """Stands where a pool is asked for: a report measures no costs anew."""

    def __init__(self) -> None:
        pass

    def run(self, jobs: Any, on_result: Any = None) -> list[Any]:
        if jobs:
            raise UserError(
                "the study's option costs are not complete; run the same search.run command again"
            )
        return []


@dataclass
class Facts:
    """A study and the trial the report is about.

    Args:
        opened: The study, its settings and a worker.
        result: Content of result.json.
        number: The trial; None for the winner.
    """

    opened: OpenStudy
    result: dict[str, Any]
    number: int

    @classmethod
    def read(cls, opened: OpenStudy, trial: str) -> Facts:
        """Of `best` or a trial's number.

        Raises:
            UserError: The study has not finished, or there is no such trial.
        """
        file = Path(opened.settings["out"]) / "result.json"
        if not file.exists():
            raise UserError(
                f"{file}: not there yet; the report is of a finished study: run the same search.run command "
                "to its end first"
            )
        number = opened.trial(trial).number
        try:
            result = json.loads(file.read_text("utf-8"))
            if not isinstance(result, dict):
                raise TypeError(f"holds a {type(result).__name__}")
        except MALFORMED as error:
            raise UserError(f"{file}: damaged ({error}); run the same search.run command again") from error
        if not {"finals", "repairs", "trial_stage", "winners"} <= result.keys():
            raise UserError(f"{file}: is of an older version; run the same search.run command again")
        if number not in {t["number"] for t in result["trials"]}:
            raise UserError(f"--trial {number}: newer than {file}; run search.run to its end first")
        return cls(opened, result, number)

    @property
    def folder(self) -> Path:
        return Path(self.opened.settings["out"])

    @cached_property
    def trial(self) -> dict[str, Any]:
        """The trial's record."""
        return next(t for t in self.result["trials"] if t["number"] == self.number)

    @cached_property
    def candidate(self) -> Candidate:
        return Candidate.from_json(json.dumps(self.trial["candidate"]))

    @cached_property
    def repaired(self) -> bool:
        """Whether the trial ships with repairs."""
        return bool(self.result["repairs"].get(str(self.number), {}).get("used"))

    @property
    def form(self) -> str:
        return PORTABLE if self.candidate.portable else RAGGED

    @cached_property
    def winners(self) -> set[int]:
        return {n for n in self.result["winners"].values() if n is not None}

    @cached_property
    def problem(self) -> Problem:
        return self.opened.problem()

    @property
    def source(self) -> Inventory:
        return self.problem.source

    @property
    def target(self) -> Inventory:
        return self.problem.target

    @cached_property
    def target_plan(self) -> Plan:
        """What the candidate is for the target."""
        return self.problem.carry.plan(self.candidate.plan)

    @cached_property
    def space(self) -> Space:
        space: Space = self.opened.worker.space
        return space

    @cached_property
    def calibration(self) -> Calibration:
        found: Calibration = self.opened.worker.calibration
        return found

    @cached_property
    def errors(self) -> dict[tuple[str, str], float]:
        """(tensor, type) to sum(h * (w - q)^2) / sum(h * w^2), h the imatrix."""
        return {name: error for name, (_, error) in bank_index(self.opened.worker.cache).items()}

    @cached_property
    def costs(self) -> CostModel:
        """The study's own cost model, from its file."""
        effort = STREAMED if self.opened.worker.setup.stream else LEAN
        worker = self.opened.worker
        model, _ = measure_costs(
            _Nothing(), self.space, self.errors, worker.cache, lambda done, total: None, effort
        )
        return model

    @cached_property
    def evidence(self) -> dict[str, Any]:
        """See `search.evidence_jobs`; measured now where it was not before."""
        found: dict[str, Any] = self.opened.worker.evidence(self.candidate.to_json(), self.repaired)
        return found

    def quality(self, number: int, repaired: bool = False) -> Quality | None:
        """Scores of a trial on the report text; None where it was not scored there."""
        if repaired:
            return Quality.of(self.result["repairs"][str(number)]["report"])
        scores = self.result["finals"].get(str(number), {}).get("report")
        return None if scores is None else Quality.of(scores)

    @cached_property
    def own(self) -> Quality:
        """The trial as it ships on the report text, or else on the search text it was scored on."""
        found = self.quality(self.number, self.repaired)
        return found or Quality.of(self.trial["scores"])

    @cached_property
    def on_report(self) -> bool:
        """Whether `own` is of the report text."""
        return self.quality(self.number, self.repaired) is not None

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Source of every window of the report text."""
        return load_text("report", self.opened.worker.cache).sources

    @cached_property
    def label(self) -> str:
        """What the trial is called in tables."""
        return f"{self.kind} (trial {self.number})"

    @property
    def kind(self) -> str:
        """Winner or baseline, and form."""
        name = self.trial.get("baseline")
        kind = f"baseline {name}, {self.form}" if name else self.form
        return f"winner, {kind}" if self.number in self.winners else kind
