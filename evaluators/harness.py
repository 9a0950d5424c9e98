"""Subsets of lm-eval tasks, scored on a transformers model in memory or on a GGUF file in llama.cpp.

Which items a subset has depends on the task and the number of items alone, and so does
what an item is asked with. lm-eval's caches of model answers stay off: they do not depend
on the weights. Its bootstrap does too: standard errors come from the items.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from evaluators.task_files import check, known_tasks, load, sandboxed_templates, task_files
from spaces.errors import UserError

__all__ = ["Harness", "TaskScore", "known_tasks", "paired_difference", "task_context"]

# Before anything imports huggingface_hub, which reads them once.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

_SEED = 1234  # lm-eval's own
_CONTEXT = 4096  # tokens; no common task asks for more, and a mask takes their square


@dataclass(frozen=True)
class TaskScore:
    """A model's score on some items of one task.

    Attributes:
        metric: lm-eval's name of the metric: `acc` where the task has it, else its first.
        value: The metric over all items.
        standard_error: Of `value`, over items; infinite where the metric is not a mean over items.
        items: Number of items scored.
        ids: Their places in the task's documents, in an order of which a smaller subset has the start.
        correct: 0 or 1 for each of `ids`; empty where the metric is not 0 or 1 per item.
    """

    metric: str
    value: float
    standard_error: float
    items: int
    ids: tuple[int, ...]
    correct: tuple[int, ...]


def task_context(config: Any) -> int:
    """Tokens of a model to ask tasks with: its own context, up to 4096, by its transformers config."""
    return min(int(config.max_position_embeddings), _CONTEXT)


def paired_difference(base: TaskScore, other: TaskScore) -> tuple[float, float]:
    """Mean of `other - base` over the items both were scored on, and its standard error.

    Pairing removes how hard the items are: most of the error of a difference of two scores.

    Raises:
        ValueError: The scores have no per-item results, or no item in common.
    """
    known = dict(zip(base.ids, base.correct, strict=False))
    pairs = [(c, known[i]) for i, c in zip(other.ids, other.correct, strict=False) if i in known]
    if not pairs:
        raise ValueError(f"{len(base.correct)} and {len(other.correct)} per-item results cannot be paired")
    return _mean(np.subtract(*np.array(pairs).T))


class Harness:
    """The same `limit` items of some tasks, to score any number of models on."""

    def __init__(
        self,
        tokenizer: Any,
        tasks: Sequence[str],
        *,
        limit: int,
        tasks_path: Path | None = None,
        max_length: int,
    ) -> None:
        """Loads the tasks.

        Items are drawn at random, as a task may lie in any order; a smaller limit has a part of a
        larger one's.

        Args:
            tokenizer: The models' transformers tokenizer.
            tasks: Names of tasks; a group of lm-eval's stands for its tasks.
            limit: Items per task; a task with fewer is used whole.
            tasks_path: Folder with a user's task files, searched recursively.
            max_length: Tokens a model sees; a longer context loses its start.

        Raises:
            UserError: A bad limit, an unknown task, or one that cannot be loaded or asked.
        """
        if limit < 1:
            raise UserError(f"task limit {limit}: give the number of items per task, 1 or more")
        self._tokenizer, self._max_length = tokenizer, max_length
        self._tasks: dict[str, Any] = {}
        self._ids: dict[str, list[int]] = {}
        files = task_files(tasks_path)
        with _undisturbed():
            for name in dict.fromkeys(tasks):
                self._tasks |= load(name, files)
            for name, task in self._tasks.items():
                check(name, task, max_length)
                _seed_by_item(task)
                order = np.random.default_rng(_SEED).permutation(len(task.eval_docs))
                self._ids[name] = order[:limit].tolist()

    def score(self, model: Any, *, tokens: int | None = None) -> dict[str, TaskScore]:
        """Scores by task name, in the order the tasks were given.

        They depend on the model alone: no global random state is read or changed.

        Args:
            model: A transformers causal language model, scored on its device in evaluation mode.
            tokens: Tokens of a forward pass, about; `prefix_lm.TOKENS` by default.
        """
        if not self._tasks:
            return {}
        from evaluators.prefix_lm import TOKENS, PrefixLM

        training = model.training
        try:
            with _undisturbed():
                return self._evaluate(
                    PrefixLM(model, self._tokenizer, max_length=self._max_length, tokens=tokens or TOKENS)
                )
        finally:
            model.train(training)

    def score_file(self, path: Path, *, threads: int = 1) -> dict[str, TaskScore]:
        """As `score`, of a GGUF file of a model with the same tokenizer, in llama.cpp.

        Args:
            path: GGUF file.
            threads: CPU threads.

        Raises:
            UserError: llama.cpp does not load the file, or dies of it.
        """
        if not self._tasks:
            return {}
        from evaluators.llama_tasks import LlamaLM

        with _undisturbed():
            return self._evaluate(
                LlamaLM(path, self._tokenizer, max_length=self._max_length, threads=threads)
            )

    def requests(self) -> dict[str, list[Any]]:
        """lm-eval's requests by task name."""
        out = {}
        with _undisturbed():
            for name, task in self._tasks.items():
                task.build_all_requests(samples=self._samples().get(name))
                out[name] = list(task.instances)
        return out

    def _samples(self) -> dict[str, list[int]]:
        """In document order, by which lm-eval numbers the items; a task that is not named is used whole."""
        return {n: sorted(i) for n, i in self._ids.items() if len(i) < len(self._tasks[n].eval_docs)}

    def _evaluate(self, language_model: Any) -> dict[str, TaskScore]:
        from lm_eval import evaluator

        samples = self._samples()
        results = evaluator.evaluate(
            language_model, {"tasks": self._tasks}, samples=samples, bootstrap_iters=0
        )
        return {
            name: _score(results["results"][name], results["samples"][name], ids)
            for name, ids in self._ids.items()
        }


def _seed_by_item(task: Any) -> None:
    """Draws the few-shot examples of an item by the item, so that they do not depend on the others."""
    own = task.fewshot_context

    def fewshot_context(doc: Any, *args: Any, **options: Any) -> Any:
        text = json.dumps(doc, sort_keys=True, default=str)
        task.set_fewshot_seed(_SEED + zlib.crc32(text.encode()))
        return own(doc, *args, **options)

    task.fewshot_context = fewshot_context


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Mean of (n,) values and its standard error."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.mean()), float(error)


def _score(results: dict[str, Any], samples: list[dict[str, Any]], ids: list[int]) -> TaskScore:
    """From what lm-eval reports of one task: metrics by "metric,filter", and a record per item and filter."""
    keys = [key for key in results if "," in key and "_stderr," not in key]
    key = next((key for key in keys if key.startswith("acc,")), keys[0])
    metric, _, kind = key.partition(",")
    by_id = {s["doc_id"]: s[metric] for s in samples if s["filter"] == kind and metric in s}
    scored = tuple(i for i in ids if i in by_id)
    values = [by_id[i] for i in scored]
    value, error = float(results[key]), math.inf
    correct: tuple[int, ...] = ()
    if all(isinstance(v, int | float | np.number) for v in values):
        mean, spread = _mean(np.array(values, dtype=np.float64))
        # Some metrics record more than they average: perplexity, for one, log-likelihoods.
        error = spread if math.isclose(mean, value) else math.inf
        correct = tuple(int(v) for v in values) if set(values) <= {0, 1} else ()
    return TaskScore(metric, value, error, len(values), scored, correct)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Silences lm-eval and the hub, and fixes every global random state to put it back afterwards."""
    import torch
    from jinja2 import TemplateError
    from lm_eval import utils
    from lm_eval.api import model, task
    from lm_eval.models import huggingface
    from tqdm import tqdm

    def no_bar(*args: Any, **options: Any) -> Any:
        return tqdm(*args, **{**options, "disable": True})

    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels, python, array = [x.level for x in loggers], random.getstate(), np.random.get_state()
    # To ask for the state of a GPU nobody uses would start it up.
    gpus = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(range(gpus)))
        # lm-eval has no switch for its progress bar over documents.
        for module in (model, task, huggingface):
            stack.enter_context(mock.patch.object(module, "tqdm", no_bar))
        stack.enter_context(mock.patch.object(utils, "env", sandboxed_templates()))
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        random.seed(_SEED)
        np.random.seed(_SEED)
        torch.default_generator.manual_seed(_SEED)
        if gpus:
            torch.cuda.manual_seed_all(_SEED)
        try:
            yield
        except TemplateError as error:
            raise UserError(f"a task's template fails: {error}; correct the task file") from error
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            random.setstate(python)
            np.random.set_state(array)
