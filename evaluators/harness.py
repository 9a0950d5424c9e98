"""Subsets of lm-eval tasks, scored on a transformers model in memory.

lm-eval's caches of model answers stay off: they do not depend on the weights.
Its bootstrap does too: standard errors come from the items.
"""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from evaluators.task_files import known_tasks, load, task_files
from spaces.errors import UserError

__all__ = ["Harness", "TaskScore", "known_tasks", "paired_difference"]

# Before anything imports huggingface_hub, which reads them once.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

_SEED = 1234  # lm-eval's own; few-shot examples and sampled answers are the same for every model


@dataclass(frozen=True)
class TaskScore:
    """A model's score on the first items of one task.

    Attributes:
        metric: lm-eval's name of the metric: `acc` where the task has it, else its first.
        value: The metric over all items.
        standard_error: Of `value`, over items; infinite where the metric is not a mean over items.
        items: Number of items scored.
        correct: 0 or 1 per item in document order; empty where the metric is not 0 or 1 per item.
    """

    metric: str
    value: float
    standard_error: float
    items: int
    correct: tuple[int, ...]


def paired_difference(base: TaskScore, other: TaskScore) -> tuple[float, float]:
    """Mean of `other - base` over the items both were scored on, and its standard error.

    Pairing removes how hard the items are: most of the error of a difference of two scores.

    Raises:
        ValueError: The scores have no per-item results, or not of the same number of items.
    """
    if not base.correct or len(base.correct) != len(other.correct):
        raise ValueError(f"{len(base.correct)} and {len(other.correct)} per-item results cannot be paired")
    return _mean(np.subtract(other.correct, base.correct))


class Harness:
    """The first `limit` items of some tasks, to score any number of models on."""

    def __init__(
        self,
        tokenizer: Any,
        tasks: Sequence[str],
        *,
        limit: int,
        tasks_path: Path | None = None,
        max_length: int,
        batch_size: int = 16,
    ) -> None:
        """Loads the tasks.

        Args:
            tokenizer: The models' transformers tokenizer.
            tasks: Names of tasks; a group of lm-eval's stands for its tasks.
            limit: Items per task; a task with fewer is used whole.
            tasks_path: Folder with a user's task files, searched recursively.
            max_length: Tokens a model sees; a longer context loses its start.
            batch_size: Requests per forward pass; every choice of an item is one request.

        Raises:
            UserError: A bad limit, an unknown task, or one that cannot be loaded.
        """
        if limit < 1:
            raise UserError(f"task limit {limit}: give the number of items per task, 1 or more")
        self._tokenizer, self._limit = tokenizer, limit
        self._max_length, self._batch_size = max_length, batch_size
        self._tasks: dict[str, Any] = {}
        files = task_files(tasks_path)
        with _undisturbed():
            for name in dict.fromkeys(tasks):
                self._tasks |= load(name, files)

    def score(self, model: Any) -> dict[str, TaskScore]:
        """Scores by task name, in the order the tasks were given.

        They depend on the model alone: no global random state is read or changed.

        Args:
            model: A transformers causal language model, scored on its device in evaluation mode.
        """
        if not self._tasks:
            return {}
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        training = model.training
        with _undisturbed():
            for task in self._tasks.values():
                task.set_fewshot_seed(_SEED)
            language_model = HFLM(
                pretrained=model,
                tokenizer=self._tokenizer,
                backend="causal",
                max_length=self._max_length,
                batch_size=self._batch_size,
                softmax_dtype="float32",  # sums of bf16 log-probabilities would tie
            )
            try:
                results = evaluator.evaluate(
                    language_model, {"tasks": self._tasks}, limit=self._limit, bootstrap_iters=0
                )
            finally:
                model.train(training)
        return {name: _score(results["results"][name], results["samples"][name]) for name in self._tasks}


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Mean of (n,) values and its standard error."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.mean()), float(error)


def _score(results: dict[str, Any], samples: list[dict[str, Any]]) -> TaskScore:
    """From what lm-eval reports of one task: metrics by "metric,filter", and a record per item and filter."""
    keys = [key for key in results if "," in key and "_stderr," not in key]
    key = next((key for key in keys if key.startswith("acc,")), keys[0])
    metric, _, kind = key.partition(",")
    values = [sample[metric] for sample in samples if sample["filter"] == kind and metric in sample]
    value, error = float(results[key]), math.inf
    correct: tuple[int, ...] = ()
    if all(isinstance(v, int | float | np.number) for v in values):
        mean, spread = _mean(np.array(values, dtype=np.float64))
        # Some metrics record more than they average: perplexity, for one, log-likelihoods.
        error = spread if math.isclose(mean, value) else math.inf
        correct = tuple(int(v) for v in values) if set(values) <= {0, 1} else ()
    return TaskScore(metric, value, error, len(values), correct)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Silences lm-eval, and fixes every global random state to put it back afterwards."""
    import torch
    from lm_eval.api import model, task
    from lm_eval.models import huggingface
    from tqdm import tqdm

    def no_bar(*args: Any, **options: Any) -> Any:
        return tqdm(*args, **{**options, "disable": True})

    logger = logging.getLogger("lm_eval")
    level, python, array = logger.level, random.getstate(), np.random.get_state()
    # To ask for the state of a GPU nobody uses would start it up.
    gpus = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(range(gpus)))
        # lm-eval has no switch for its progress bar over documents.
        for module in (model, task, huggingface):
            stack.enter_context(mock.patch.object(module, "tqdm", no_bar))
        logger.setLevel(logging.CRITICAL)
        random.seed(_SEED)
        np.random.seed(_SEED)
        torch.default_generator.manual_seed(_SEED)
        if gpus:
            torch.cuda.manual_seed_all(_SEED)
        try:
            yield
        finally:
            logger.setLevel(level)
            random.setstate(python)
            np.random.set_state(array)
