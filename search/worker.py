"""One worker: a model in memory, and the jobs a study needs done on it.

A worker reads what it needs from the study's cache folder, so that it can start
anew after a crash and every worker of a node maps the same files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compression import sealed
from evaluators.texts import TextSet
from search.cache_files import load_text, text_digests
from search.evidence_jobs import EvidenceJobs
from search.machine_memory import peak_resident
from search.repair_jobs import RepairJobs

if TYPE_CHECKING:
    from compression.variant_bank import Remote


@dataclass(frozen=True)
class Setup:
    """Where a worker finds its inputs; plain values, so that it travels to any process.

    Attributes:
        checkpoint: Folder of the model.
        name: What the model is called in files.
        cache: Folder of calibration, windows, base states and bank.
        runtime: Name in `spaces.runtimes.RUNTIMES`.
        tasks: lm-eval tasks, with the items of each (`limit`) and a user's task folder.
        threads: Threads of torch.
        exportable: Whether the tokenizer goes into the inventory's metadata.
        stream: Whether the model is streamed layer by layer instead of held in memory.
        types: The only types to choose from; () for all.
        cache_bytes: Dequantized weights each worker may keep at hand, bytes.
        feedback: Whether tensors may be quantized with error feedback between columns.
    """

    checkpoint: str
    name: str
    cache: str
    runtime: str = "any"
    tasks: tuple[str, ...] = ()
    limit: int = 100
    tasks_path: str | None = None
    threads: int = 1
    exportable: bool = True
    stream: bool = False
    types: tuple[str, ...] = ()
    cache_bytes: int = 0
    feedback: bool = False


class Worker(RepairJobs, EvidenceJobs):
    """Runs jobs by name: every public method is one.

    Args:
        setup: Its inputs.
        remote: The driver's bank, where the cache is a copy on another machine.
    """

    anywhere = ("quantize", "register", "costs", "slopes", "score", "peak_memory")
    """Jobs that need no more of the driver's disk than checkpoint, calibration, texts, base states and bank,
    and write nothing but variants; the others find their files, and leave them, where the driver does."""

    def __init__(self, setup: Setup, remote: Remote | None = None) -> None:
        import torch

        torch.set_num_threads(setup.threads)
        self.setup, self.remote = setup, remote
        self.cache = Path(setup.cache)
        self._texts: dict[tuple[str, int], TextSet] = {}

    @cached_property
    def checkpoint(self) -> Any:
        from compression.checkpoint import open_checkpoint

        return open_checkpoint(Path(self.setup.checkpoint), self.setup.name)

    @cached_property
    def calibration(self) -> Any:
        from compression.calibration import Calibration

        file = self.cache / "calibration.npz"
        sealed.check(file, self._made_of("calibration"))
        return Calibration.load(file)

    @cached_property
    def model(self) -> Any:
        from compression.candidate_model import CandidateModel

        model = CandidateModel(
            self.checkpoint, self.inventory, self.bank, self.setup.stream, cache=self.setup.cache_bytes
        )
        if not self.setup.stream:
            self._choose_experts(model)
        return model

    def _choose_experts(self, model: Any) -> None:
        """Takes the implementation this study measured as fastest, so that all workers agree in every bit."""
        from compression.expert_kernels import fastest_experts, use_experts

        file = self.cache / "experts.json"
        if file.exists():
            use_experts(model, json.loads(sealed.read(file, self._made_of()))["chosen"])
            return
        seconds = fastest_experts(model)
        if seconds:
            chosen = json.dumps({"chosen": next(iter(seconds)), "seconds": seconds}) + "\n"
            sealed.write(file, chosen, self._made_of())

    def choose_experts(self) -> None:
        """Notes the fastest implementation of experts for all workers, if there is a choice."""
        if not self.setup.stream:
            _ = self.model

    @cached_property
    def settings(self) -> Any:
        from compression.setting import Settings

        return Settings(self.inventory)

    @cached_property
    def inventory(self) -> Any:
        from compression.gguf_export import with_tokenizer

        return with_tokenizer(self.checkpoint) if self.setup.exportable else self.checkpoint.inventory

    @cached_property
    def bank(self) -> Any:
        from compression.variant_bank import VariantBank

        return VariantBank(self.cache / "bank", keep=not self.setup.stream, remote=self.remote)

    @cached_property
    def space(self) -> Any:
        from compression.expert_pruning import rankings
        from compression.expert_sets import read_sets
        from spaces.space import Space

        inventory, file = self.checkpoint.inventory, self.cache / "expert_sets.json"
        ranked = rankings(self.calibration, inventory.moe_layers)
        sets = {}
        if file.exists():
            sealed.check(file, self._made_of_sets())
            sets = read_sets(file, inventory)
        return Space(inventory, ranked, self.setup.runtime, self.setup.types, sets)

    @cached_property
    def harness(self) -> Any:
        from compression.checkpoint import load_tokenizer
        from evaluators.harness import Harness, task_context

        return Harness(
            load_tokenizer(self.checkpoint.path),
            self.setup.tasks,
            limit=self.setup.limit,
            tasks_path=Path(self.setup.tasks_path) if self.setup.tasks_path else None,
            max_length=task_context(self.checkpoint.family.config),
        )

    def _made_of(self, *texts: str) -> dict[str, str]:
        """What a file of this model and some texts is made of."""
        return {"model": self.checkpoint.fingerprint, **text_digests(self.cache, *texts)}

    def _made_of_sets(self) -> dict[str, str]:
        calibration = sealed.made_of(self.cache / "calibration.npz")["itself"]
        return self._made_of("calibration") | {"calibration": calibration}

    def _text(self, name: str, tokens: int) -> TextSet:
        if (name, tokens) not in self._texts:
            self._texts[name, tokens] = load_text(name, self.cache).head(tokens)
        return self._texts[name, tokens]

    def _states(self, name: str) -> np.ndarray:
        file = self.cache / f"base-{name}.npy"
        sealed.check(file, self._made_of(name))  # also its length: a mapped file that is cut short kills
        states: np.ndarray = np.load(file, mmap_mode="r")
        return states

    def _spread(self, tokens: int, name: str = "search") -> tuple[TextSet, np.ndarray]:
        """A few tokens of every kind of text, and their base states."""
        text = self._text(name, 10**9).spread(tokens)
        # What is attended to lies before a token, so that the start of a window has the same states alone.
        return text, self._states(name)[:, : text.windows.shape[1]]

    def calibrate(self) -> int:
        """Writes calibration.npz; returns the tokens it took."""
        from compression.calibrate import calibrate

        text = load_text("calibration", self.cache)
        result = calibrate(self.model, text.windows, text.digest)
        result.save(self.cache / "calibration.npz")
        sealed.seal(self.cache / "calibration.npz", self._made_of("calibration"))
        return result.tokens

    def expert_sets(self) -> int:
        """Writes expert_sets.json, the experts to keep of every layer and count; returns how many sets."""
        from compression.expert_pruning import protected
        from compression.expert_sets import expert_sets, write_sets
        from spaces.space import Space

        windows = load_text("calibration", self.cache).windows
        counts = Space(self.checkpoint.inventory, {}).kept_options
        sets = expert_sets(self.model, windows, counts, protected(self.calibration))
        write_sets(sets, self.cache / "expert_sets.json")
        sealed.seal(self.cache / "expert_sets.json", self._made_of_sets())
        return sum(map(len, sets.values()))

    def base_states(self, name: str) -> int:
        """Writes the base model's states on a text; returns its tokens."""
        from evaluators.divergence import base_states

        text = load_text(name, self.cache)
        self.model.reset()
        base_states(self.model, text, self.cache / f"base-{name}.npy")
        sealed.seal(self.cache / f"base-{name}.npy", self._made_of(name))
        return int(text.windows.size)

    def quantize(
        self, tensor: str, types: Sequence[str], feedback: bool = False
    ) -> list[tuple[str, str, str, float]]:
        """(tensor, type, key, error) of each type, added to the bank.

        With `feedback`, errors are fed back between columns and measured so; embeddings stay plain.
        """
        if feedback and not self.setup.feedback:
            raise ValueError("quantizing with error feedback needs Setup.feedback")
        part = self.checkpoint.family.by_name[tensor]
        rows = self.bank.add(
            part.tensor,
            types,
            lambda expert: self.checkpoint.weights.read(part, expert),
            self.calibration.imatrix.get(tensor),
            self.checkpoint.fingerprint,
            self.hessians.of(tensor) if feedback and tensor in self.calibration.imatrix else None,
        )
        return [(tensor, *row) for row in rows]

    def register(self, keys: Sequence[tuple[str, str, str]]) -> None:
        """Tells the worker under which key each (tensor, type) lies in the bank."""
        for tensor, type_name, key in keys:
            self.bank.register(tensor, type_name, key)

    @cached_property
    def hessians(self) -> Any:
        from compression.hessians import Hessians

        return Hessians(self.model, load_text("calibration", self.cache).windows)

    @cached_property
    def population(self) -> Any:
        from evaluators.population import Population

        return Population(self.model)

    def costs(self, options: Sequence[tuple[str, Any]], tokens: int) -> list[float]:
        """KL of each option alone, on about `tokens` search tokens."""
        from evaluators.sensitivity import alone

        settings = [alone(self.settings, self.space, decision, choice) for decision, choice in options]
        text, states = self._spread(tokens)
        measured = self.population.measure(settings, text, states)
        return [d.mean_kl for d in measured]

    def slopes(
        self,
        candidate: str | None,
        tokens: int,
        probes: int,
        seed: int = 0,
        routing: Sequence[tuple[str, Any]] = (),
    ) -> tuple[int, list[tuple[str, Any, float, float]]]:
        """Tokens spent, and (decision, choice, first, second) at a candidate (None: uncompressed).

        Every type of every tensor, and the options of `routing`; see `evaluators.slopes`.
        """
        from evaluators.slopes import Slopes
        from spaces.candidate import Candidate

        slopes, (text, states) = Slopes(self.model, self.space), self._spread(tokens)
        setting = self.settings.base
        if candidate is not None:
            setting = self.settings.of(Candidate.from_json(candidate))
        found = slopes.at(setting, text, states, probes, seed, routing)
        spent = slopes.tokens(text, probes, len(routing), candidate is None)
        return spent, [(decision, choice, s.first, s.second) for (decision, choice), s in found.items()]

    def score(self, candidates: Sequence[str], name: str, tokens: int) -> list[dict[str, list[float]]]:
        """Per-window kl, nll and top1 of candidates on a text; a few tokens of the search text are spread."""
        from spaces.candidate import Candidate

        text, states = self._text(name, tokens), self._states(name)
        if name == "search":
            text, states = self._spread(tokens)
        settings = [self.settings.of(Candidate.from_json(c)) for c in candidates]
        found = self.population.measure(settings, text, states)
        return [{"kl": d.kl.tolist(), "nll": d.nll.tolist(), "top1": d.top1.tolist()} for d in found]

    def tasks(self, candidate: str | None, repaired: bool = False) -> dict[str, dict[str, Any]]:
        """lm-eval scores of a candidate, with its repairs or without, or of the base model for None."""
        from dataclasses import asdict

        from spaces.candidate import Candidate

        if candidate is None:
            self.model.reset()
        else:
            self.model.apply(Candidate.from_json(candidate))
        overrides = self.repairs(Candidate.from_json(candidate)) if candidate and repaired else None
        self.model.use(overrides)
        try:
            # A streamed model is read anew for every pass.
            scores = self.harness.score(self.model.model, tokens=2**14 if self.setup.stream else None)
        finally:
            self.model.use(None)
        return {name: asdict(score) for name, score in scores.items()}

    def tasks_of_file(self, path: str) -> dict[str, dict[str, Any]]:
        """lm-eval scores of an exported GGUF file in llama.cpp."""
        from dataclasses import asdict

        scores = self.harness.score_file(Path(path), threads=self.setup.threads)
        return {name: asdict(score) for name, score in scores.items()}

    def export(self, candidate: str, path: str, repaired: bool = False) -> int:
        """Writes a candidate as a .gguf file, or as a folder; returns its bytes."""
        from compression.checkpoint_export import export_checkpoint
        from compression.gguf_export import export_gguf
        from compression.guards import check_file
        from compression.stored_model import StoredModel
        from spaces.candidate import Candidate

        chosen, out = Candidate.from_json(candidate), Path(path)
        stored = StoredModel(self.checkpoint, self.inventory, self.bank)
        stored.overrides = self.repairs(chosen) if repaired else None
        if out.suffix == ".gguf":
            size = export_gguf(stored, chosen, out)
            check_file(out, stored, chosen)
            return size
        return export_checkpoint(stored, chosen, self.checkpoint, out)

    def peak_memory(self) -> int:
        """Largest resident size of this process so far, bytes."""
        return peak_resident()
