"""The child process of `compression.tokenizer_trial`: `python -m compression.tokenizer_child FILE`.

It ends with 0 where the tokenizer loads and the texts can be tokenized, else with 1 and one line.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from compression.panics import panics_raised
from compression.vocabulary_probe import TEXTS

_RUNS = tuple(letter * 4096 + " ab 1.\n!" for letter in "a 1\n.")
"""What a regular expression that searches for ever does so on."""
_ADDRESS_SPACE = 2**33
"""Bytes. Tokenizers of 262,144 tokens take less than 2 GiB of it."""


def _load(file: Path) -> Any:
    if file.suffix == ".json":
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(file))
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(file.parent, local_files_only=True, trust_remote_code=False)
    return loaded.backend_tokenizer


def _child(file: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # memory of many threads would count to the limit
    with suppress(ImportError, ValueError, OSError):  # not every system has it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    try:
        with panics_raised():
            tokenizer = _load(file)
            encoded = tokenizer.encode_batch([*TEXTS, *_RUNS])
            tokenizer.decode_batch([e.ids for e in encoded])
    except Exception as error:  # the tokenizers library raises bare Exception
        sys.exit(" ".join(f"{error}".split())[:200] or type(error).__name__)


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
