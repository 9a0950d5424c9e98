"""A worker's jobs on repairs: mending a candidate at no bytes, and scoring it as it then is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression import sealed
from search.cache_files import material
from spaces.candidate import Candidate

if TYPE_CHECKING:
    from compression.overrides import Overrides
    from evaluators.texts import TextSet


class RepairJobs:
    """Mixed into `search.worker.Worker`, whose attributes it uses."""

    cache: Path
    model: Any

    def _text(self, name: str, tokens: int) -> TextSet:
        raise NotImplementedError

    def _states(self, name: str) -> Any:
        raise NotImplementedError

    def repairs(self, candidate: Candidate) -> Overrides:
        """The repairs of a candidate that were made before.

        Raises:
            UserError: They are gone or damaged.
        """
        from compression.overrides import Overrides

        file = self.cache / "repairs" / f"{candidate.key}.safetensors"
        found = Overrides.load(file, self.model.inventory, candidate)
        sealed.check(file, material(self.cache, "calibration", "repair"))
        return found

    def repair(self, candidate: str) -> int:
        """Quantizes a candidate again with error feedback and re-fits its scales, norms and routers.

        Does nothing where that was done before.

        Returns:
            Tokens it takes, a backward pass counting as two of forward.
        """
        from compression.requantize import requantized
        from evaluators.tuning import Recipe, Tuner

        chosen, recipe = Candidate.from_json(candidate), Recipe()
        text, calibration = self._text("repair", 10**9), self._text("calibration", 10**9)
        file = self.cache / "repairs" / f"{chosen.key}.safetensors"
        if not file.exists():
            start = requantized(self.model, chosen, calibration.windows)
            Tuner(self.model, chosen, recipe).run(text, start=start).save(file)
            sealed.seal(file, material(self.cache, "calibration", "repair"))
        # The inputs of every tensor are looked at in one pass, the re-fit takes the rest.
        return int(calibration.windows.size) + 3 * recipe.steps * recipe.windows * int(text.windows.shape[1])

    def score_repaired(self, candidate: str, name: str, tokens: int) -> dict[str, list[float]]:
        """As `score`, of a candidate with its repairs."""
        from evaluators.divergence import measure

        chosen = Candidate.from_json(candidate)
        overrides = self.repairs(chosen)
        self.model.apply(chosen)
        self.model.use(overrides)
        try:
            found = measure(self.model, self._text(name, tokens), self._states(name))
        finally:
            self.model.use(None)
        return {"kl": found.kl.tolist(), "nll": found.nll.tolist(), "top1": found.top1.tolist()}
