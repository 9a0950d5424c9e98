"""What native code cannot take ends a child process or is refused before it; never this process."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from compression.checkpoint import load_tokenizer
from compression.child import run_module
from compression.families import family
from compression.tokenizer_from_gguf import fast_tokenizer
from evaluators.llama_cpp import probe_file
from evaluators.texts import make_windows
from experiments import zoo
from spaces.errors import UserError
from spaces.gguf_layout import Value
from tests.compression.support import refused
from tests.hostile.seeds import CONFIG, gguf_parts

REFERENCE = Path(__file__).parents[2] / "experiments/reference_model/checkpoint"

# Tokenizers.


def split_by(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pre_tokenizer", split_by("(a|a)*b$")),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "//////////8="}),
        ("post_processor", {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                            "single": [{"SpecialToken": {"id": "q", "type_id": 0}}]}),
        ("model", {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]],
                   "continuing_subword_prefix": "#" * 99}),
        ("padding", {"strategy": {"Fixed": 10**15}, "direction": "Right", "pad_to_multiple_of": None,
                     "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}),
    ],
    ids=["regex without end", "charsmap too short", "charsmap of 16 GiB", "unknown special token",
         "prefix too long", "padding without end"],
)  # fmt: skip
def test_a_tokenizer_that_panics_or_aborts_is_one_line(field: str, value: Any, tmp_path: Path) -> None:
    spec = json.loads((REFERENCE / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, field: value}))
    refused(lambda: load_tokenizer(tmp_path), tmp_path, "cannot be loaded")


def test_a_tokenizer_that_panics_on_a_text_is_one_line() -> None:
    from tokenizers import Tokenizer

    spec = json.loads((REFERENCE / "tokenizer.json").read_text("utf-8"))
    bad = Tokenizer.from_str(json.dumps({**spec, "pre_tokenizer": split_by("(a|a)*b$")}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bad)
    refused(lambda: make_windows("search", [("mine", "a" * 5000 + " b!")], tokenizer, 10), "text of mine")


def test_a_gguf_token_of_a_million_characters_is_refused() -> None:
    """SentencePiece's merges are all ways to cut a token in two."""
    values = {
        "model": Value("str", "llama"), "tokens": Value("str", ("<unk>", "a" * 10**6)),
        "scores": Value("f32", (0.0, 0.0)), "token_type": Value("i32", (2, 1)),
    }  # fmt: skip
    metadata = {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    refused(lambda: fast_tokenizer(metadata), "1000000 characters")


# Configs.


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("qwen3_moe", {"num_experts": 10**9}),
        ("qwen3_moe", {"head_dim": 10**12}),
        ("qwen3_moe", {"head_dim": -1}),
        ("qwen3_moe", {"head_dim": float("nan")}),
        ("mixtral", {"hidden_size": 2**31}),
        ("deepseek_v2", {"num_hidden_layers": 10**9}),
        ("deepseek_v2", {"partial_rotary_factor": 1e9}),
        ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                         "partial_rotary_factor": 1e9}}),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_of_absurd_numbers_is_refused(name: str, fields: dict[str, Any]) -> None:
    refused(lambda: family({**zoo.config(name), **fields}, "model").inventory(), "config.json")


def test_a_layer_count_that_is_no_number_is_refused() -> None:
    refused(
        lambda: family({**CONFIG, "num_hidden_layers": "10000000000"}, "model").inventory(), "config.json"
    )


# Children.


def test_a_header_is_refused_before_llama_cpp_sees_it(tmp_path: Path) -> None:
    """ggml itself would take a table of tensors that lie over one another."""
    parts = gguf_parts()
    at = max(i for i, part in enumerate(parts[:-2]) if len(part) == 8)
    parts[at] = bytes(8)  # the last offset: that of the first tensor
    (tmp_path / "a.gguf").write_bytes(b"".join(parts))
    refused(lambda: probe_file(tmp_path / "a.gguf", [1], generate=1), "a.gguf", "overlap")


CHILDREN: dict[str, tuple[str, Callable[[int, str], bool]]] = {
    "aborts": ("import os; os.abort()", lambda code, _: code == -6),
    "is killed": ("import os; os.kill(os.getpid(), 9)", lambda code, _: code == -9),
    "floods": (
        "import sys\nfor _ in range(400): sys.stderr.write('x' * 10**5)\nsys.stderr.write('the end')",
        lambda code, text: code == 0 and len(text) <= 2**16 and text.endswith("the end"),
    ),
    "offers itself": (
        "import sys; sys.stderr.write(open('/proc/self/oom_score_adj').read())",
        lambda code, text: code == 0 and text == "1000",
    ),
}


@pytest.mark.parametrize("what", CHILDREN)
def test_a_child_that(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, right = CHILDREN[what]
    (tmp_path / "bad_child.py").write_text("import time\ntime.sleep(0.05)\n" + source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, text = run_module("bad_child", "", 60)
    assert right(code, text), (code, text[-200:])


def test_a_child_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "import os, time, sys\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(600)"
    (tmp_path / "bad_child.py").write_text(own)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(subprocess.TimeoutExpired):
        run_module("bad_child", str(tmp_path / "pid"), 2)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_tokenizer_that_takes_too_long_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compression import tokenizer_trial

    monkeypatch.setattr(tokenizer_trial, "_SECONDS", 0.01)
    spec = json.loads((REFERENCE / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, "version": "1.0 "}))
    with pytest.raises(UserError, match="not done with"):
        load_tokenizer(tmp_path)
