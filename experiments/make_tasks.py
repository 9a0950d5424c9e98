"""Makes local lm-eval tasks from held-out text: `python -m experiments.make_tasks TASKS.jsonl OUT_DIR`.

Reads the corpus split `tasks` (JSON lines `{"source", "text"}`), which no
training, search or report text overlaps, and writes per task `NAME.jsonl` and
`NAME.yaml`:

- `local_cloze`: which of four continuations follows? The wrong ones come from
  other documents of the same source, have the same number of words and follow
  the same previous word, so neither topic, length nor bigrams give it away.
- `local_lastword`: the last word of a sentence, which the context already
  holds, so it can be found by attention over the context.

Items are in random order, so the first n are a fair subset.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from evaluators.texts import read_documents
from search.commands import run_command
from search.options import Parser

ITEMS = 500
_SEED = 0
_CONTEXT_WORDS = 60  # about 100 tokens of the reference model: context and answer fit its window
_ANSWER_WORDS = (6, 10)
_CHOICES = 4
_SENTENCE_END = re.compile(r"(?<!^Mr)(?<!^Dr)(?<!^St)(?<!^Mrs)(?<!^etc)[.!?][\"')]*$")
_PLAIN_WORD = re.compile(r"[\"'(]*[A-Za-z][A-Za-z'-]*[.,;:!?\"')]*$")

_YAML = """\
# Made by experiments.make_tasks from the held-out corpus split `tasks`.
# The sources and licences of the text are listed in README.md.
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
output_type: {output}
doc_to_text: ctx
{target}metric_list:
{metrics}metadata:
  version: 1.0
"""
_METRIC = "  - metric: {}\n    aggregation: {}\n    higher_is_better: {}\n"
_ACCURACY = _METRIC.format("acc", "mean", "true")


@dataclass(frozen=True)
class Sentence:
    """A sentence in its document.

    Attributes:
        document: Number of the document.
        source: Kind of text the document is.
        text: The whole document.
        words: (start, end) characters of every word of the document.
        starts: Word numbers at which the document's sentences start.
        first: Word number the sentence starts at.
        end: Word number after its last word.
    """

    document: int
    source: str
    text: str
    words: Sequence[tuple[int, int]]
    starts: Sequence[int]
    first: int
    end: int

    def span(self, first: int, end: int) -> str:
        """The text from word `first` to before word `end`, with its own white space."""
        return self.text[self.words[first][0] : self.words[end - 1][1]]

    def word(self, number: int) -> str:
        return self.span(number, number + 1)

    def context(self, cut: int) -> str:
        """What precedes word `cut`: whole sentences where possible, at most `_CONTEXT_WORDS` words."""
        least = max(0, cut - _CONTEXT_WORDS)
        return self.span(min((s for s in self.starts if least <= s < cut), default=least), cut)

    def is_prose(self) -> bool:
        """Almost only plain words: no tables, references or code."""
        plain = sum(bool(_PLAIN_WORD.match(self.word(i))) for i in range(self.first, self.end))
        return plain >= 0.9 * (self.end - self.first)


def sentences(documents: Iterable[tuple[str, str]]) -> Iterator[Sentence]:
    """Every sentence of prose in `(source, text)` documents; a line break ends a sentence too."""
    for number, (source, text) in enumerate(documents):
        words = [m.span() for m in re.finditer(r"\S+", text)]
        starts = [0]
        for i, ((start, end), (following, _)) in enumerate(pairwise(words), start=1):
            ended = _SENTENCE_END.search(text[start:end]) and not text[following].islower()
            if ended or "\n" in text[end:following]:
                starts.append(i)
        for first, end in zip(starts, [*starts[1:], len(words)], strict=True):
            sentence = Sentence(number, source, text, words, starts, first, end)
            if end - first >= 6 and sentence.is_prose():
                yield sentence


def cloze(pool: Sequence[Sentence], rng: random.Random) -> list[dict[str, Any]]:
    """At most one item per sentence: `ctx`, `endings` (4 strings), `label` (0 to 3), `source`."""
    shortest, longest = _ANSWER_WORDS
    after: dict[tuple[str, str], list[tuple[Sentence, int]]] = defaultdict(list)
    for sentence in pool:
        for cut in range(sentence.first + 3, sentence.end - shortest):
            after[sentence.source, sentence.word(cut - 1).lower()].append((sentence, cut))
    items: list[dict[str, Any]] = []
    labels: list[int] = []
    for sentence in rng.sample(pool, len(pool)):
        length = rng.randint(shortest, longest)
        cuts = range(max(sentence.first + 3, 12), sentence.end - length)
        for cut in rng.sample(cuts, len(cuts)):
            gold = sentence.span(cut, cut + length)
            rivals = {
                other.span(at, at + length)
                for other, at in after[sentence.source, sentence.word(cut - 1).lower()]
                if other.document != sentence.document and at + length < other.end
            } - {gold}
            if len(rivals) >= _CHOICES - 1:
                # Labels come in shuffled blocks of four, so that every prefix is balanced.
                labels = labels or rng.sample(range(_CHOICES), _CHOICES)
                label = labels.pop()
                endings = rng.sample(sorted(rivals), _CHOICES - 1)
                endings.insert(label, gold)
                items.append(
                    {
                        "ctx": sentence.context(cut),
                        "endings": endings,
                        "label": label,
                        "source": sentence.source,
                    }
                )
                break
    return items


def lastword(pool: Sequence[Sentence], rng: random.Random) -> list[dict[str, Any]]:
    """At most one item per sentence: `ctx`, `target` (a word without its space), `source`."""
    items = []
    for sentence in rng.sample(pool, len(pool)):
        last = sentence.end - 1
        target = re.sub(r"\W+$", "", sentence.word(last))
        context = sentence.context(last)
        seen = re.findall(r"[A-Za-z]+", context)
        if len(target) > 2 and target in seen and len(seen) >= 20:
            items.append({"ctx": context, "target": target, "source": sentence.source})
    return items


def write(out: Path, name: str, items: Sequence[dict[str, Any]], yaml: str) -> None:
    """Writes at most `ITEMS` items and the task's file."""
    with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for item in items[:ITEMS]:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")
    (out / f"{name}.yaml").write_text(yaml, encoding="utf-8")


def make(documents: Sequence[tuple[str, str]], out: Path) -> dict[str, int]:
    """Writes both tasks; returns how many items the text gives, before the cap of `ITEMS`."""
    out.mkdir(parents=True, exist_ok=True)
    pool = list(sentences(documents))
    choices, words = cloze(pool, random.Random(_SEED)), lastword(pool, random.Random(_SEED))
    metrics = _ACCURACY + _METRIC.format("acc_norm", "mean", "true")
    target = "doc_to_choice: endings\ndoc_to_target: label\n"
    yaml = _YAML.format(name="local_cloze", output="multiple_choice", target=target, metrics=metrics)
    write(out, "local_cloze", choices, yaml)
    # lm-eval puts no delimiter before the target of a `loglikelihood` task.
    target = "doc_to_target: \"{{' ' + target}}\"\n"
    metrics = _ACCURACY + _METRIC.format("perplexity", "perplexity", "false")
    yaml = _YAML.format(name="local_lastword", output="loglikelihood", target=target, metrics=metrics)
    write(out, "local_lastword", words, yaml)
    return {"local_cloze": len(choices), "local_lastword": len(words)}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("documents", type=Path, help="JSON lines with `source` and `text`")
    parser.add_argument("out", type=Path, help="folder for the task files")
    args = parser.parse_args()
    for name, found in make(read_documents(args.documents, "documents"), args.out).items():
        print(f"{name}: {found} found, {min(found, ITEMS)} written")


if __name__ == "__main__":
    run_command(main)
