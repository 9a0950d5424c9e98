"""A transformers tokenizer and a GGUF vocabulary compared on the probe texts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compression.vocabulary_probe import Trial, probe_texts, trials
from spaces.gguf_layout import Value

_SHOWN = 60


@dataclass(frozen=True)
class Comparison:
    """Texts and the ids a transformers tokenizer gives for them."""

    tokenizer: Any
    texts: tuple[str, ...]
    expected: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tokenizer: Any, spec: Mapping[str, Any]) -> Comparison:
        """The probe texts, without those on which llama.cpp differs for every model.

        Args:
            tokenizer: A fast tokenizer of transformers.
            spec: Its tokenizer.json.
        """
        return cls(tokenizer, (), ()).on(list(_comparable(probe_texts(tokenizer), spec)))

    def on(self, texts: Sequence[str]) -> Comparison:
        """The comparison on other texts."""
        if not texts:
            return Comparison(self.tokenizer, (), ())
        ids = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return Comparison(self.tokenizer, tuple(texts), tuple(tuple(i) for i in ids))

    def trials(self, metadata: Mapping[str, Value], names: Sequence[str | None] = (None,)) -> list[Trial]:
        """`vocabulary_probe.trials` of these texts."""
        return trials(metadata, self.texts, self.expected, names)

    def difference(self, trial: Trial) -> str:
        """What is different where `trial` first differs, for a message."""
        if trial.text is None:
            return trial.error or "nothing"
        text, wanted, found = self.texts[trial.text], self.expected[trial.text], trial.found
        at = next(
            (i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b),
            min(len(wanted), len(found)),
        )
        if len(text) > _SHOWN:
            near = list(wanted[max(0, at - 4) : at + 6])
            text = self.tokenizer.decode(near, clean_up_tokenization_spaces=False)
        ours, theirs = (
            self.tokenizer.convert_ids_to_tokens(list(ids[at : at + 4])) for ids in (wanted, found)
        )
        # A message keeps no runs of spaces.
        shown = repr(text).replace("  ", " \\x20")
        return f"{shown}: {ours} becomes {theirs}"


def steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a tokenizer.json's normalizer or pre_tokenizer, sequences taken apart."""
    if part:
        nested = part.get("normalizers") or part.get("pretokenizers")
        if nested is None:
            yield part
        else:
            for inner in nested:
                yield from steps(inner)


def _comparable(texts: list[str], spec: Mapping[str, Any]) -> Iterator[str]:
    """The texts on which llama.cpp can agree.

    It never normalizes, so a tokenizer that composes accents (NFC) is compared on
    composed text. Its SentencePiece puts a space before all text that begins or
    follows a special token, where Metaspace does not before a space, nor, with the
    scheme `first`, after a special token; its Unigram puts none before spaces only.
    """
    unigram = spec["model"]["type"] == "Unigram"
    composed = any(step.get("type") == "NFC" for step in steps(spec.get("normalizer")))
    spaces = [s for s in steps(spec.get("pre_tokenizer")) if s.get("type") == "Metaspace"]
    scheme = next((s.get("prepend_scheme", "always") for s in spaces), "never")
    added = [re.escape(token["content"]) for token in spec.get("added_tokens", []) if token["content"]]
    special = re.compile("|".join(sorted(added, key=len, reverse=True)) or r"(?!)")
    for text in texts:
        if composed:
            text = unicodedata.normalize("NFC", text)
        between = special.split(text)
        if scheme != "never" and any(part.startswith((" ", "▁")) for part in between):
            continue
        if scheme == "first" and any(between[1:]):
            continue
        if unigram and any(part and not part.strip(" ") for part in between):
            continue
        yield text
