"""What surrounds the vocabulary: special tokens, padding, chat templates, bad files, no tokenizer at all."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from compression import llama_symbols as llama
from compression.checkpoint import load_tokenizer
from compression.tokenizer import gguf_tokenizer, no_tokenizer
from compression.tokenizer_from_gguf import fast_tokenizer
from compression.tokenizer_settings import named_tokens
from tests.compression.support import refused
from tests.compression.tokenizer_kinds import END, GPT2_BYTES, START, LlamaIds, byte_level, save

ROWS = 640


@pytest.fixture(scope="module")
def trained() -> str:
    return byte_level([GPT2_BYTES], size=600).to_str()


@pytest.fixture
def folder(trained: str, tmp_path: Path) -> Path:
    return save(Tokenizer.from_str(trained), tmp_path / "model", eos_token=END)


def edit(file: Path, change: Callable[[Any], object]) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    change(values)
    file.write_text(json.dumps(values))


def entries(folder: Path, rows: int = ROWS) -> dict[str, Any]:
    metadata = gguf_tokenizer(folder, rows)
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in metadata.items()}


def test_only_the_special_tokens_that_are_named_are_written(folder: Path) -> None:
    values = entries(folder)
    assert {key: v for key, v in values.items() if key.endswith("_id")} == {"eos_token_id": 0}


def test_the_tokenizers_own_names_come_before_the_models_numbers(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 7, "pad_token_id": 9, "eos_token_id": 3}))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": [5, 6], "eos_token_id": [4]}))
    edit(folder / "tokenizer_config.json", lambda c: c.update(eot_token={"content": START}, pad_token=None))
    values = entries(folder)
    found = [values[f"{name}_token_id"] for name in ("bos", "eos", "padding", "eot")]
    assert found == [5, 0, 9, 1]


@pytest.mark.parametrize(
    ("around", "bos", "eos"),
    [
        ("$A", False, False),
        (f"{START} $A", True, False),
        (f"$A {END}", False, True),
        (f"{START} $A {END}", True, True),
        (f"{START} {END} $A", False, False),
    ],
)
def test_what_is_put_around_a_text_is_what_the_tokenizer_puts(
    trained: str, tmp_path: Path, around: str, bos: bool, eos: bool
) -> None:
    tokenizer = Tokenizer.from_str(trained)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(END, 0), (START, 1)]
    )
    save(tokenizer, tmp_path, bos_token=END)
    # The config may say otherwise: the tokenizer's behaviour counts.
    edit(tmp_path / "tokenizer_config.json", lambda c: c.update(add_bos_token=not bos))
    assert load_tokenizer(tmp_path)("x")["input_ids"] == tokenizer.encode("x").ids
    values = entries(tmp_path)
    assert (values["add_bos_token"], values["add_eos_token"]) == (bos, eos)
    assert values["bos_token_id"] == (1 if bos else 0)
    assert values.get("eos_token_id") == (0 if eos else None)
    if tuple(around.split()[:2]) != (START, END):
        text = "some text"
        expected = tokenizer.encode(text).ids
        assert fast_tokenizer(gguf_tokenizer(tmp_path, ROWS))(text)["input_ids"] == expected


def test_rows_without_a_token_are_unused(folder: Path, tmp_path: Path) -> None:
    values = entries(folder)
    assert len(values["tokens"]) == len(values["token_type"]) == ROWS
    assert values["tokens"][600:] == tuple(f"[PAD{i}]" for i in range(600, ROWS))
    assert set(values["token_type"][600:]) == {5}
    assert LlamaIds(gguf_tokenizer(folder, ROWS), tmp_path)("[PAD600]")[0] != 600


def test_a_token_without_a_row_is_refused(folder: Path) -> None:
    entries(folder, 600)
    refused(lambda: entries(folder, 599), folder / "tokenizer.json", "599")


def test_no_text_is_used_twice() -> None:
    tokens, kinds = named_tokens([("a", 0, 1), ("a", 2, 1), ("[PAD3]", 1, 1), ("", 4, 1)], 5, Path("f"))
    assert len(set(tokens)) == 5
    assert tokens[:2] == ["a", "[PAD3]"]
    assert kinds == [1, 1, 1, 5, 1]


def test_an_answer_is_kept_while_the_files_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gguf_tokenizer(folder, ROWS)
    start, calls = subprocess.Popen, []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kw: calls.append(args) or start(*args, **kw))
    assert gguf_tokenizer(folder, ROWS) == first
    assert not calls
    edit(folder / "tokenizer_config.json", lambda c: c.update(eos_token=START))
    assert gguf_tokenizer(folder, ROWS)["tokenizer.ggml.eos_token_id"].value == 1
    assert calls


# Chat templates

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}é"


def test_a_chat_template_in_the_config_is_carried(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=TEMPLATE))
    metadata = gguf_tokenizer(folder, ROWS)
    assert metadata["tokenizer.chat_template"].value == TEMPLATE
    assert "tokenizer.chat_templates" not in metadata
    back = fast_tokenizer(metadata)
    assert back.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<|user|>\nxé"


def test_a_chat_template_of_its_own_file_comes_first(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template="older"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    metadata = gguf_tokenizer(folder, ROWS)
    assert metadata["tokenizer.chat_template"].value == TEMPLATE
    assert metadata["tokenizer.chat_template.rag"].value == "rag"


def test_chat_templates_by_name_are_all_carried(folder: Path) -> None:
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool-use", "template": "tools"}]
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=named))
    metadata = gguf_tokenizer(folder, ROWS)
    assert metadata["tokenizer.chat_template"].value == TEMPLATE
    assert metadata["tokenizer.chat_template.tool_use"].value == "tools"
    assert metadata["tokenizer.chat_templates"].value == ("tool_use",)
    assert fast_tokenizer(metadata).chat_template == {"default": TEMPLATE, "tool_use": "tools"}


def test_no_chat_template_is_none(folder: Path) -> None:
    assert not [key for key in gguf_tokenizer(folder, ROWS) if "chat" in key]


@pytest.mark.parametrize(
    "bad", [7, ["text"], [{"name": "default"}], [{"name": 1, "template": "x"}], {"a": 1}]
)
def test_a_chat_template_that_is_no_text_is_refused(folder: Path, bad: Any) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=bad))
    refused(lambda: gguf_tokenizer(folder, ROWS), folder / "tokenizer", ".json")


# Bad files


@pytest.mark.parametrize(
    "raw", ["", "{", "[]", "{}", '{"model": null}', '{"model": {"type": "BPE"}}', "[" * 20000, "\ud800"]
)
def test_a_damaged_tokenizer_json_is_refused(folder: Path, raw: str) -> None:
    (folder / "tokenizer.json").write_bytes(raw.encode("utf-8", "surrogatepass"))
    refused(lambda: gguf_tokenizer(folder, ROWS), folder / "tokenizer.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["model"].pop("vocab"),
        lambda t: t["model"].update(merges=None),
        lambda t: t["model"].update(merges=[["never", "seen"]]),
        lambda t: t["model"].update(merges=7),
        lambda t: t["model"].update(type="WordPiece"),
        lambda t: t["model"].update(type="Unigram"),
        lambda t: t["model"]["vocab"].update(zz="q"),
        lambda t: t["model"]["vocab"].update(zz=-5),
        lambda t: t["model"]["vocab"].update(zz=1.5),
        lambda t: t["model"]["vocab"].update({"a b": 610}) or t["model"]["merges"].append(["a b", "c"]),
        lambda t: t.update(added_tokens=[{}]),
        lambda t: t.update(added_tokens=7),
        lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}}),
        lambda t: t.update(pre_tokenizer=None),
    ],
)
def test_a_tokenizer_json_that_does_not_fit_together_is_refused(
    folder: Path, change: Callable[[Any], object]
) -> None:
    edit(folder / "tokenizer.json", change)
    refused(lambda: gguf_tokenizer(folder, ROWS), folder / "tokenizer.json")


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize("raw", ["{", "[]"])
def test_a_damaged_config_is_refused(folder: Path, name: str, raw: str) -> None:
    (folder / name).write_text(raw)
    refused(lambda: gguf_tokenizer(folder, ROWS), folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    refused(lambda: gguf_tokenizer(tmp_path, ROWS), tmp_path / "tokenizer.json", "missing", "--no-export")


def test_llama_cpp_counts_the_ids_of_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    vocabulary = LlamaIds(no_tokenizer("llama", 77), tmp_path).vocabulary
    assert llama.library().llama_vocab_n_tokens(vocabulary) == 77
    assert llama.library().llama_vocab_type(vocabulary) == llama.VOCAB_NONE
