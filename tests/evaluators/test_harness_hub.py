"""lm-eval's own tasks by name: its definitions, with rows of our own in place of the hub's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pytest

from compression.checkpoint import load_tokenizer
from evaluators import task_files
from evaluators.harness import Harness, TaskScore, paired_difference, task_context
from experiments.zoo import REFERENCE, make
from spaces.errors import UserError


def _hellaswag(i: int) -> dict[str, Any]:
    return {
        "activity_label": "Sailing", "ctx_a": f"Boat {i} leaves the harbour.", "ctx_b": "it",
        "endings": [f"sinks {i}", f"sails {i} on", "burns", "is sold"], "label": str(i % 4),
    }  # fmt: skip


def _gsm8k(i: int) -> dict[str, Any]:
    return {"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"}


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definitions of two tasks, as reading all takes long, and rows for them."""
    folder = Path(lm_eval.tasks.__file__).parent
    paths = [str(folder / name) for name in ("hellaswag", "gsm8k")]
    manager = lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False)
    monkeypatch.setattr(task_files, "_hub", lambda: manager)

    def rows(path: str, **_: Any) -> dict[str, Any]:
        make_row = {"Rowan/hellaswag": _hellaswag, "openai/gsm8k": _gsm8k}[path]
        parts = {"train": range(1000, 1040), "validation": range(60), "test": range(60)}
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list([make_row(i) for i in part]) for split, part in parts.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", rows)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(REFERENCE)


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return [make("deepseek_v3", seed) for seed in (0, 1)]


def _score(tokenizer: Any, task: str, limit: int, model: Any) -> TaskScore:
    harness = Harness(tokenizer, [task], limit=limit, max_length=task_context(model.config))
    return harness.score(model)[task]


def test_an_ordered_task_is_sampled_and_nested_alike_for_every_model(tokenizer: Any, models: Any) -> None:
    few, more = (_score(tokenizer, "hellaswag", n, models[0]) for n in (10, 30))
    other = _score(tokenizer, "hellaswag", 30, models[1])
    assert few.ids == more.ids[:10]
    assert few.correct == more.correct[:10]
    assert max(few.ids) >= 30
    assert more.ids == other.ids
    assert more.correct != other.correct
    difference, error = paired_difference(more, other)
    assert difference == pytest.approx(other.value - more.value)
    assert error > 0
    assert paired_difference(few, more) == (0.0, 0.0)


def test_generated_answers_are_scored_and_prompts_depend_on_their_item_alone(
    tokenizer: Any, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evaluators.prefix_lm import PrefixLM

    asked: list[dict[int, str]] = []

    def answer(self: Any, requests: Any, disable_tqdm: bool = False) -> list[str]:
        asked.append({r.doc["question"]: r.args[0] for r in requests})
        right = [int(r.doc["answer"].split()[-1]) for r in requests]
        return [f"#### {n}" if n % 4 else "nothing" for n in right]

    monkeypatch.setattr(PrefixLM, "generate_until", answer)
    few, more = (_score(tokenizer, "gsm8k", n, models[0]) for n in (4, 12))
    assert more.metric == "exact_match"
    assert more.correct == tuple(i % 2 for i in more.ids)  # twice the number is asked for
    assert few.correct == more.correct[:4]
    assert few.ids == more.ids[:4]
    assert asked[0].items() <= asked[1].items()
    prompts = list(asked[1].values())
    assert all(prompt.count("Question:") == 6 for prompt in prompts)
    assert len({prompt.rsplit("Question:", 1)[0] for prompt in prompts}) > 1


def test_a_model_generates_answers(tokenizer: Any, models: Any) -> None:
    score = _score(tokenizer, "gsm8k", 2, models[0])
    assert (score.metric, score.items, len(score.correct)) == ("exact_match", 2, 2)


def test_a_task_that_leaves_no_room_or_samples_is_refused(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"'gsm8k' generates 256 tokens.*context of 256"):
        Harness(tokenizer, ["gsm8k"], limit=2, max_length=256)
    harness = Harness(tokenizer, ["gsm8k"], limit=2, max_length=512)
    harness._tasks["gsm8k"].config.generation_kwargs["do_sample"] = True
    with pytest.raises(UserError, match="samples its answers"):
        task_files.check("gsm8k", harness._tasks["gsm8k"], 512)


def test_a_failing_hub_is_one_line(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError) as caught:
        Harness(tokenizer, ["hellaswag"], limit=2, max_length=256)
    message = str(caught.value)
    assert message.startswith("task 'hellaswag' needs the Hugging Face hub, which failed (ConnectionError")
    assert "\n" not in message
    assert message.endswith(f"tasks that need no hub: {', '.join(task_files.known_tasks())}")
