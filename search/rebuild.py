"""Opens a finished or running study again, with all that scoring and exporting a trial needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from compression.checkpoint import open_checkpoint
from search.cache_files import bank_index, load_text
from search.memory import streams
from search.problem import Problem, make_problem
from search.study import finished, open_storage, window_scores
from search.worker import Setup, Worker
from spaces.candidate import Candidate
from spaces.carry import Carry
from spaces.devices import Device
from spaces.errors import UserError, unknown

_NEEDED = {"out", "model", "name", "runtime", "export", "target", "budget", "device", "context"}
_DIGITS = 9  # of a trial's number


@dataclass
class OpenStudy:
    """A study with its settings and one worker in this process."""

    study: optuna.Study
    settings: dict[str, Any]
    worker: Worker

    @classmethod
    def open(cls, name: str, storage: str | None) -> OpenStudy:
        """Finds the study in `storage`, or in runs/NAME.

        Raises:
            UserError: No such study, or its folder is gone.
        """
        default = Path("runs") / name / "study.journal"
        if storage is None and not default.exists():
            known = sorted(p.parent.name for p in Path("runs").glob("*/study.journal"))
            if known:
                raise unknown("--study", name, known)
            raise UserError(
                f"--study {name}: no study in {default.parent}; give --storage, or run search.run"
            )
        if storage is not None and "://" not in storage and not Path(storage).is_file():
            raise UserError(f"--storage {storage}: no such journal file")
        opened = open_storage(storage, default)
        names = [s.study_name for s in opened.get_all_studies()]
        if not names:
            raise UserError(f"{storage or default}: holds no study")
        if name not in names:
            raise unknown("--study", name, names)
        study = optuna.load_study(study_name=name, storage=opened)
        settings = study.user_attrs.get("settings")
        if settings is None:
            raise UserError(f"--study {name}: was not made by search.run")
        if not settings.keys() >= _NEEDED:
            raise UserError(f"--study {name}: was made by another version; run the search again")
        cache = Path(settings["out"]) / "cache"
        if not (cache / "calibration.npz").exists() or not (cache / "bank.json").exists():
            raise UserError(f"{cache}: the study's calibration and bank are gone; run the search again")
        inventory = open_checkpoint(Path(settings["model"]), settings["name"]).inventory
        worker = Worker(
            Setup(
                str(settings["model"]),
                settings["name"],
                str(cache),
                settings["runtime"],
                exportable=settings["export"],
                stream=settings["streamed"] if "streamed" in settings else streams("auto", inventory, 1),
                types=tuple(settings.get("types", ())),
            )
        )
        worker.register([(n, t, key) for (n, t), (key, _) in bank_index(cache).items()])
        return cls(study, settings, worker)

    def trial(self, which: str) -> FrozenTrial:
        """The trial called `best` (lowest KL among complete portable ones, else among all) or a number.

        Raises:
            UserError: No such trial, or one without scores.
        """
        done = finished(self.study)
        if which == "best":
            complete = [t for t in done if t.state == TrialState.COMPLETE]
            if not complete:
                raise UserError(f"study {self.study.study_name} has no complete trial yet; run the search on")
            chosen = self._winner()
            if chosen is not None:
                return next(t for t in complete if t.number == chosen)
            portable = [t for t in complete if self.candidate(t).portable]
            return min(portable or complete, key=lambda t: (t.user_attrs["scores"]["kl"], t.number))
        if not which.isdecimal() or len(which) > _DIGITS:
            raise UserError(f"--trial must be best or a trial's number, got {which!r}")
        for t in done:
            if t.number == int(which):
                return t
        numbers = [t.number for t in done]
        span = f"{min(numbers)}..{max(numbers)}" if numbers else "none"
        raise UserError(f"--trial {which}: no trial of that number has scores (there are {span})")

    def _winner(self) -> int | None:
        """The winner the finished run chose on the selection text."""
        won = self.study.user_attrs.get("winners") or {}
        number = won.get("portable") if won.get("portable") is not None else won.get("ragged")
        return None if number is None else int(number)

    def candidate(self, trial: FrozenTrial) -> Candidate:
        return self.worker.space.candidate(trial.params)

    def problem(self) -> Problem:
        """What the study is about, from its settings."""
        s = self.settings
        return make_problem(
            self.worker.inventory, Path(s["model"]), s["target"], s["budget"], Device(**s["device"]),
            s["context"], tuple(s.get("types", ())),
        )  # fmt: skip

    def carry(self) -> Carry:
        """From the searched model to the target."""
        return self.problem().carry

    def rescore(self, trial: FrozenTrial) -> dict[str, Any]:
        """Quality scores of a trial, measured again on the tokens it was measured on."""
        tokens = int(trial.user_attrs["scores"]["tokens"])
        columns, *_ = self.worker.score([self.candidate(trial).to_json()], "search", tokens)
        text = load_text("search", self.worker.cache)
        return window_scores(columns, text.bytes_per_token, int(text.spread(tokens).windows.size))
