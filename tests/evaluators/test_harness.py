from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluators import task_files
from evaluators.harness import Harness, TaskScore, known_tasks, paired_difference
from experiments.reference_model.network import Shape
from spaces.errors import UserError

_ROOT = Path(__file__).parents[2]
_WINDOW = 256
_SHIPPED = ["bb_agreement", "bb_hyperbaton", "local_cloze", "local_hellaswag100", "local_lastword"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_ROOT / "experiments/reference_model/checkpoint")


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = Shape(
        len(tokenizer), hidden=32, layers=2, dense_width=32, experts=4, top_k=2, expert_width=16, heads=2,
        q_rank=16, kv_rank=16, nope=8, rope=8, value=8,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.config()), dtype=torch.float32)


def _harness(tokenizer: Any, tasks: list[str], limit: int = 10, **options: Any) -> Harness:
    return Harness(tokenizer, tasks, limit=limit, max_length=_WINDOW, **options)


def _write_task(folder: Path, name: str, items: list[dict[str, Any]], **fields: str) -> None:
    metric = "[{metric: acc, aggregation: mean, higher_is_better: true}]"
    fields = {"doc_to_text": "ctx", "doc_to_target": "label", "metric_list": metric} | fields
    if "output_type" not in fields:
        fields |= {"output_type": "multiple_choice", "doc_to_choice": "endings"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}\n"
    body = "".join(f"{key}: {value}\n" for key, value in fields.items())
    (folder / f"{name}.yaml").write_text(head + "test_split: test\n" + body)


def _short_or_long(labels: list[int]) -> list[dict[str, Any]]:
    """Items a random model always answers 0: the other ending has many times as many tokens."""
    endings = ["yes", "no, " * 30 + "never"]
    return [{"ctx": f"Question {i}:", "endings": endings, "label": y} for i, y in enumerate(labels)]


def test_shipped_tasks_load_and_fit_the_window(tokenizer: Any) -> None:
    assert known_tasks() == _SHIPPED
    for name in ("local_cloze", "local_lastword"):
        path = task_files.task_files()[name].with_suffix(".jsonl")
        items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(items) >= 400
        for item in items:
            for ending in item.get("endings", [item.get("target")]):
                assert len(tokenizer(f"{item['ctx']} {ending}").input_ids) <= _WINDOW
            assert len({len(ending.split()) for ending in item.get("endings", ["one"])}) == 1
        if name == "local_cloze":
            assert np.bincount([item["label"] for item in items[:100]]).tolist() == [25] * 4


def test_random_model_is_at_chance_quietly(tokenizer: Any, model: Any, capfd: Any, caplog: Any) -> None:
    harness = _harness(tokenizer, ["local_cloze", "local_lastword"], limit=40)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    model.train()
    before = random.getstate()[1], np.random.get_state()[1].copy(), torch.get_rng_state()
    scores = harness.score(model)
    after = random.getstate()[1], np.random.get_state()[1], torch.get_rng_state()
    assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))
    assert model.training
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])

    torch.manual_seed(6)
    assert harness.score(model) == scores
    assert list(scores) == ["local_cloze", "local_lastword"]
    score = scores["local_cloze"]
    assert (score.metric, score.items, score.value) == ("acc", 40, pytest.approx(np.mean(score.correct)))
    assert abs(score.value - 1 / 4) < 3 * math.sqrt(3 / 16 / 40)
    assert score.standard_error == pytest.approx(np.std(score.correct, ddof=1) / math.sqrt(40))
    lastword = scores["local_lastword"]  # of which lm-eval reports perplexity first
    assert (lastword.metric, lastword.value) == ("acc", 0.0)


def test_a_smaller_subset_is_a_part_of_a_larger_one(tokenizer: Any, model: Any) -> None:
    few, more, every = (
        _harness(tokenizer, ["bb_agreement"], n).score(model)["bb_agreement"] for n in (7, 30, 10**6)
    )
    assert (few.items, more.items, every.items) == (7, 30, len(set(every.ids)))
    assert few.ids == more.ids[:7] == every.ids[:7]
    assert few.correct == more.correct[:7] == every.correct[:7]
    assert more.correct == every.correct[:30]
    assert list(every.ids) != sorted(every.ids)
    assert max(few.ids) > 60  # not the first of the file
    assert 0 < sum(more.correct) < 30


def test_results_belong_to_their_items(tokenizer: Any, model: Any, tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2, 50).tolist()
    _write_task(tmp_path, "short", _short_or_long(labels))
    score = _harness(tokenizer, ["short"], 20, tasks_path=tmp_path).score(model)["short"]
    assert score.correct == tuple(1 - labels[i] for i in score.ids)
    assert 0 < sum(score.correct) < 20


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_must_be_positive(tokenizer: Any, limit: int) -> None:
    with pytest.raises(UserError, match=f"task limit {limit}"):
        _harness(tokenizer, ["local_cloze"], limit=limit)


def test_tasks_of_a_users_folder(tokenizer: Any, model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    labels = [0, 1, 1, 0, 0, 1]
    _write_task(tmp_path / "mine" / "deeper", "short", _short_or_long(labels))
    rolling = {"output_type": "loglikelihood", "doc_to_target": "ctx", "doc_to_text": "ctx"}
    metrics = "[{metric: perplexity, aggregation: perplexity, higher_is_better: false}]"
    _write_task(tmp_path / "mine", "ppl", _short_or_long(labels), **rolling, metric_list=metrics)
    monkeypatch.chdir(tmp_path)  # a relative folder, and data relative to the task file
    assert known_tasks(Path("mine")) == sorted([*_SHIPPED, "short", "ppl"])
    scores = _harness(tokenizer, ["short", "ppl"], limit=100, tasks_path=Path("mine")).score(model)
    short = scores["short"]
    assert sorted(zip(short.ids, short.correct, strict=True)) == [(i, 1 - y) for i, y in enumerate(labels)]
    ppl = scores["ppl"]
    assert (ppl.metric, ppl.standard_error, ppl.correct) == ("perplexity", math.inf, ())
    assert ppl.value > 100
    with pytest.raises(ValueError, match="paired"):
        paired_difference(scores["ppl"], scores["ppl"])


def test_bad_user_folders(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        known_tasks(tmp_path / "nowhere")
    _write_task(tmp_path / "twice", "local_cloze", [])
    with pytest.raises(UserError, match="'local_cloze' is also in"):
        known_tasks(tmp_path / "twice")
    (tmp_path / "bad.yaml").write_text("task: [")
    with pytest.raises(UserError, match=r"bad\.yaml"):
        known_tasks(tmp_path)
    for name, break_it, message in (
        ("lost", lambda path: path.unlink(), r"task data .*lost\.jsonl"),
        ("torn", lambda path: path.write_text('{"ctx": '), r"task data .*torn\.jsonl"),
        ("odd", lambda path: path.write_text('{"other": 1}\n'), r"task 'odd' of .*odd\.yaml"),
    ):
        _write_task(tmp_path / name, name, [])
        break_it(tmp_path / name / f"{name}.jsonl")
        with pytest.raises(UserError, match=message):
            _harness(tokenizer, [name], tasks_path=tmp_path / name)


_CHILD = """
import sys
from pathlib import Path
import lm_eval.tasks
from evaluators import task_files
from evaluators.harness import Harness
from spaces.errors import UserError
if sys.argv[1] == "one":  # the whole index takes long to read
    folder = Path(lm_eval.tasks.__file__).parent / "hellaswag"
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    task_files._hub = lambda: manager
Harness(None, ["local_cloze"], limit=5, max_length=99)
for name in ("hellaswag", "helaswag", "local_close"):
    try:
        Harness(None, ["local_cloze", name], limit=5, max_length=99)
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("index", ["one", pytest.param("all", marks=pytest.mark.slow)])
def test_hub_and_unknown_tasks_offline(tmp_path: Path, index: str) -> None:
    home = tmp_path / "home"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    child = [sys.executable, "-c", _CHILD, index]
    done = subprocess.run(child, cwd=_ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    offline, near_hub, near_local = done.stdout.splitlines()
    assert "'hellaswag' needs the Hugging Face hub" in offline
    assert offline.endswith(f"tasks that need no hub: {', '.join(_SHIPPED)}")
    assert near_hub.startswith("unknown task 'helaswag'; did you mean 'hellaswag'?")
    assert near_local.startswith("unknown task 'local_close'; did you mean 'local_cloze'?")
    assert not list(home.rglob("*.arrow"))


def test_paired_difference() -> None:
    ids = (4, 2, 0, 1)
    base = TaskScore("acc", 0.5, 0.29, 4, ids, (1, 1, 0, 0))
    other = TaskScore("acc", 0.25, 0.25, 4, ids, (1, 0, 0, 0))
    assert paired_difference(base, other) == (-0.25, 0.25)
    assert paired_difference(other, base) == (0.25, 0.25)
    assert paired_difference(base, base) == (0.0, 0.0)
    more = TaskScore("acc", 0.6, 0.24, 5, (1, 0, 9, 2, 4), (1, 0, 1, 0, 1))  # in another order, and one more
    assert paired_difference(base, more) == (0.0, pytest.approx(math.sqrt(2 / 3 / 4)))
    with pytest.raises(ValueError, match="1 and 4"):
        paired_difference(TaskScore("acc", 1.0, 0.0, 1, (7,), (1,)), base)
