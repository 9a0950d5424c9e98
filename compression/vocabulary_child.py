"""The child process of `compression.vocabulary_probe`: `python -m compression.vocabulary_child FOLDER`.

It reads FOLDER/request.json and appends one JSON line per name to
FOLDER/answers.jsonl, so that those before an abort are not lost.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from compression import llama_symbols as llama
from compression.llama_symbols import LlamaError, ffi


def _load(file: Path, name: str | None) -> Any:
    """A model of which only the vocabulary is read; `name` replaces its pre-tokenizer's."""
    lib = llama.library()
    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.vocab_only = 0, 1
    overrides = llama.text_override(b"tokenizer.ggml.pre", name) if name else ffi.NULL
    params.kv_overrides = overrides
    llama.forget_errors()
    model = lib.llama_model_load_from_file(os.fsencode(file), params)
    if model == ffi.NULL:
        raise llama.failure("the vocabulary does not load")
    return model


def _answer(request: dict[str, Any], file: Path, name: str | None) -> dict[str, Any]:
    """How far llama.cpp's ids of the texts are those expected."""
    try:
        model = _load(file, name)
    except LlamaError as error:
        return {"name": name, "equal": 0, "error": str(error)}
    lib = llama.library()
    vocab = lib.llama_model_get_vocab(model)
    equal, first = 0, None
    for index, (text, expected) in enumerate(zip(request["texts"], request["expected"], strict=True)):
        found = llama.tokenize(vocab, text)
        equal += found == expected
        if found != expected and first is None:
            first = {"text": index, "found": found}
    lib.llama_model_free(model)
    return {"name": name, "equal": equal, "first": first}


def _child(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text("utf-8"))
    with (folder / "answers.jsonl").open("a", encoding="utf-8") as stream:
        for name in request["names"]:
            answer = _answer(request, folder / "vocabulary.gguf", name)
            stream.write(json.dumps(answer) + "\n")
            stream.flush()
            if answer["equal"] == len(request["texts"]):
                return


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
