"""lm-eval on a GGUF file in llama.cpp gives what it gives on the transformers model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from compression.checkpoint import load_tokenizer, open_checkpoint
from evaluators import llama_child, llama_tasks
from evaluators.harness import Harness
from evaluators.llama_cpp import file_loglikelihoods
from evaluators.llama_runtime import LlamaModel
from evaluators.llama_tasks import LlamaLM
from evaluators.prefix_lm import PrefixLM
from evaluators.shared_prefix import Item, pack
from experiments.zoo import FAMILIES, REFERENCE, make, save, write_float
from spaces.errors import UserError
from tests.evaluators.test_prefix_lm import LENGTH, agree, requests


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(REFERENCE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, F32 file) of a family, made once."""

    @functools.cache
    def one(name: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp(name)
        model = make(name)
        return model, write_float(open_checkpoint(save(model, folder / "model")), folder / "model.gguf")

    return one


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_log_likelihoods_are_those_of_transformers(name: str, made: Any, tokenizer: Any) -> None:
    model, file = made(name)
    expected = PrefixLM(model, tokenizer, max_length=LENGTH)._loglikelihood_tokens(requests())
    found = LlamaLM(file, tokenizer, max_length=LENGTH)._loglikelihood_tokens(requests())
    agree(found, expected)


def test_tasks_score_alike_in_both(made: Any, tokenizer: Any) -> None:
    model, file = made("deepseek_v3")
    harness = Harness(tokenizer, ["local_cloze", "bb_agreement"], limit=12, max_length=256)
    ours, theirs = harness.score(model), harness.score_file(file)
    assert {name: score.correct for name, score in ours.items()} == {
        name: score.correct for name, score in theirs.items()
    }
    assert ours["local_cloze"].ids == theirs["local_cloze"].ids
    assert 0 < sum(ours["bb_agreement"].correct) < 12


def test_four_choices_cost_about_one_pass(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = made("deepseek_v3")
    sizes = []
    packed = LlamaModel.packed_logits

    def note(self: LlamaModel, tokens: Any, *args: Any) -> np.ndarray:
        sizes.append(len(tokens))
        return packed(self, tokens, *args)

    monkeypatch.setattr(LlamaModel, "packed_logits", note)
    item = Item(tuple(range(100, 150)), tuple((i, 7, 8) for i in range(4)))
    request = {"path": str(file), "threads": 1, "items": [[item.context, item.continuations]]}
    (scores,) = llama_child._loglikelihoods(Path(), request)["scores"]
    assert sizes == [50 + 4 * 2]
    alone = file_loglikelihoods(file, [Item(item.context, (c,)) for c in item.continuations])
    assert [s for s, _ in scores] == pytest.approx([row[0][0] for row in alone], abs=1e-4)


def test_items_of_differing_length_do_not_see_each_other(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = made("deepseek_v3")
    generator = np.random.default_rng(0)
    items = [
        Item(tuple(generator.integers(2, 4000, n).tolist()), ((5, 6), (7,))) for n in (3, 150, 20, 1, 70)
    ]
    assert len(pack(items)) < len(items)
    together = file_loglikelihoods(file, items)
    alone = [file_loglikelihoods(file, [item])[0] for item in items]
    assert [len(row) for row in together] == [2] * 5
    assert np.allclose(
        [[s for s, _ in row] for row in together], [[s for s, _ in row] for row in alone], atol=1e-4
    )


def test_many_continuations_of_one_context(made: Any, tokenizer: Any) -> None:
    model, file = made("deepseek_v3")
    asked = [(None, [5, 6, 7], [i, 9] if i % 2 else [i]) for i in range(10, 410)]
    expected = PrefixLM(model, tokenizer, max_length=LENGTH)._loglikelihood_tokens(asked)
    agree(LlamaLM(file, tokenizer, max_length=LENGTH)._loglikelihood_tokens(asked), expected)


def test_long_texts_and_answers(made: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = made("deepseek_v3")
    text = "The ship left the harbour before dawn, and nobody on the quay had seen it go. " * 8
    ours = PrefixLM(model, tokenizer, max_length=LENGTH)
    theirs = LlamaLM(file, tokenizer, max_length=LENGTH)
    rolling = [Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate((text, text[:50]))]
    found, expected = (m.loglikelihood_rolling(rolling, disable_tqdm=True) for m in (theirs, ours))
    assert found == pytest.approx(expected, abs=1e-2, rel=1e-5)

    def ask(*until: str) -> list[Instance]:
        options = {"until": list(until), "max_gen_toks": 20, "do_sample": False}
        return [Instance("generate_until", {}, (t, options), i) for i, t in enumerate((text, text[:90]))]

    monkeypatch.setattr(llama_tasks, "_STEP", 3)  # several rounds
    whole = ours.generate_until(ask(), disable_tqdm=True)
    assert theirs.generate_until(ask()) == whole
    stop = whole[0][len(whole[0]) // 2 :][:2]
    cut = theirs.generate_until(ask(stop))
    assert cut == ours.generate_until(ask(stop), disable_tqdm=True)
    assert cut[0] == whole[0].split(stop)[0] != whole[0]


def test_bad_files_and_tokens_are_user_errors(made: Any, tokenizer: Any, tmp_path: Path) -> None:
    _, file = made("deepseek_v3")
    harness = Harness(tokenizer, ["bb_agreement"], limit=2, max_length=256)
    with pytest.raises(UserError, match="no such file"):
        harness.score_file(tmp_path / "missing.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"would take \d+ bytes of a file of 100000"):
        harness.score_file(cut)
    for item in (Item((1, 9999), ((1,),)), Item((1,), ((9999,),))):
        with pytest.raises(UserError, match=r"token ids? .*9999"):
            file_loglikelihoods(file, [item])
    assert file_loglikelihoods(file, []) == []
