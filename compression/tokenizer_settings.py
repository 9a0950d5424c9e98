"""What surrounds a vocabulary in a GGUF file: special tokens, what is added to a text, chat templates."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spaces.errors import MALFORMED, UserError
from spaces.gguf_layout import Value
from spaces.json_text import read_text

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""`gguf.TokenType`, which SentencePiece's own piece types equal."""

_SPECIAL = (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad"), ("eot", "eot"),
            ("eom", "eom"))  # fmt: skip
_NAME_LETTERS = frozenset(string.ascii_letters + string.digits)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file; UserError where it is something else."""
    if not file.exists():
        return {}
    try:
        values = json.loads(read_text(file))
    except MALFORMED as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: must hold a JSON object, got {type(values).__name__}; download it again")
    return values


def check_ids(ids: Sequence[Any], size: int, file: Path) -> None:
    """Refuses ids that are no rows of an embedding of `size`."""
    for index in ids:
        if type(index) is not int:
            raise UserError(f"{file}: a token's id is {index!r}, not a number; download it again")
        if not 0 <= index < size:
            raise UserError(
                f"{file}: token id {index} is outside the model's vocabulary of {size}; does this tokenizer "
                "belong to the model?"
            )


def named_tokens(
    claims: Sequence[tuple[str, int, int]], size: int, file: Path
) -> tuple[list[str], list[int]]:
    """Text and kind of every id; ids nothing claims are unused.

    llama.cpp refuses a vocabulary in which a text occurs twice, so the later of
    two gets its id appended.

    Args:
        claims: (text, id, kind); a later claim on an id replaces an earlier one.
        size: Rows of the embedding.
        file: What the claims come from, for messages.

    Raises:
        UserError: An id that has no row.
    """
    check_ids([index for _, index, _ in claims], size, file)
    texts: list[str | None] = [None] * size
    kinds = [UNUSED] * size
    for text, index, kind in claims:
        texts[index], kinds[index] = text, kind
    taken = {text for text in texts if text}
    seen: set[str] = set()
    out = []
    for index, claimed in enumerate(texts):
        name = claimed or f"[PAD{index}]"
        while name in seen or (not claimed and name in taken):
            name += f"[{index}]"
        seen.add(name)
        out.append(name)
    return out, kinds


def special_ids(folder: Path, ids: Mapping[str, int]) -> dict[str, int]:
    """Ids of the special tokens the checkpoint names, by their GGUF names.

    tokenizer_config.json's texts come first; where it has none, the ids of
    generation_config.json and config.json (of a list, the first).
    """
    texts = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    numbers = {**read_json(folder / "config.json"), **read_json(folder / "generation_config.json")}
    out = {}
    for gguf_name, name in _SPECIAL:
        token = texts.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        number = numbers.get(f"{name}_token_id")
        if isinstance(number, list) and number:
            number = number[0]
        if isinstance(text, str) and text in ids:
            out[gguf_name] = ids[text]
        elif type(number) is int and 0 <= number < len(ids):
            out[gguf_name] = number
    return out


def special_metadata(folder: Path, tokens: Sequence[str], tokenizer: Any) -> dict[str, Value]:
    """Special ids, and whether the first and last of them are put around a text.

    The latter is what `tokenizer`, of transformers, does; what cannot be said in
    GGUF (more than one token in front or behind) is left to the chat template.
    """
    ids = special_ids(folder, {text: i for i, text in enumerate(tokens)})
    around = {"bos": False, "eos": False}
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    full = tokenizer("x")["input_ids"]
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    if starts:
        for name, added in (("bos", full[: starts[0]]), ("eos", full[starts[0] + len(bare) :])):
            if len(added) == 1:
                around[name], ids[name] = True, added[0]
    return special_values(ids, around["bos"], around["eos"])


def special_values(ids: Mapping[str, int], add_bos: bool, add_eos: bool) -> dict[str, Value]:
    """The entries of special ids and of whether they are added to a text."""
    return {
        "tokenizer.ggml.add_bos_token": Value("bool", add_bos),
        "tokenizer.ggml.add_eos_token": Value("bool", add_eos),
        **{f"tokenizer.ggml.{name}_token_id": Value("u32", i) for name, i in ids.items()},
    }


def chat_templates(folder: Path) -> dict[str, str]:
    """Jinja templates by name, the main one as `default`.

    Format: transformers' chat_template.jinja and additional_chat_templates/NAME.jinja, before them
    tokenizer_config.json's `chat_template`, a text or a list of {name, template}.

    Raises:
        UserError: A template that is no text.
    """
    file = folder / "tokenizer_config.json"
    found = read_json(file).get("chat_template") or read_json(folder / "chat_template.json").get(
        "chat_template"
    )
    if isinstance(found, list):
        try:
            templates = {entry["name"]: entry["template"] for entry in found}
        except (LookupError, TypeError) as error:
            raise UserError(
                f"{file}: chat_template must be a text or a list of {{name, template}}; correct it"
            ) from error
    else:
        templates = {"default": found} if found else {}
    files = {"default": folder / "chat_template.jinja"}
    files |= {f.stem: f for f in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for name, path in files.items():
        if path.exists():
            try:
                templates[name] = path.read_text("utf-8")
            except MALFORMED as error:
                raise UserError(f"{path}: cannot be read as text ({error}); download it again") from error
    if any(not isinstance(part, str) for pair in templates.items() for part in pair):
        raise UserError(f"{file}: chat_template must hold texts; correct it")
    return templates


def chat_metadata(templates: Mapping[str, str]) -> dict[str, Value]:
    """The templates' entries, named as the `gguf` package's `add_chat_template` does."""
    out = {}
    others = []
    for name, template in templates.items():
        if name == "default":
            out["tokenizer.chat_template"] = Value("str", template)
        else:
            others.append("".join(c if c in _NAME_LETTERS else "_" for c in name))
            out[f"tokenizer.chat_template.{others[-1]}"] = Value("str", template)
    if others:
        out["tokenizer.chat_templates"] = Value("str", tuple(others))
    return out
