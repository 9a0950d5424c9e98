"""Documents become windows: sources in turn, sets disjoint, bad files one-line errors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression.checkpoint import load_tokenizer
from evaluators.texts import WINDOW, TextSet, make_windows, read_documents, split_documents
from search.runner import RUNGS
from tests.compression.support import refused
from tests.conftest import REFERENCE


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Any:
    return load_tokenizer(tiny_checkpoint)


def lines(path: Path, *items: Any) -> Path:
    path.write_text("".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items), "utf-8")
    return path


def test_json_lines_are_documents_with_their_source(tmp_path: Path) -> None:
    file = lines(tmp_path / "mine.jsonl", {"source": "a", "text": "één"}, {"text": "two\nlines", "more": 1})
    assert read_documents(file, "--text") == [("a", "één"), ("mine", "two\nlines")]


def test_form_feeds_part_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("one\n\nstill one\f two \f\f", "utf-8")
    assert read_documents(tmp_path / "mine.txt", "--text") == [("mine", "one\n\nstill one"), ("mine", "two")]


def test_a_long_text_file_is_cut_between_paragraphs_and_loses_none(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}: " + "word " * 60 for i in range(60)]
    (tmp_path / "mine.txt").write_text("\n\n".join(paragraphs), "utf-8")
    pieces = [text for _, text in read_documents(tmp_path / "mine.txt", "--text")]
    assert len(pieces) > 3
    assert all(4000 <= len(p) <= 4400 for p in pieces[:-1])
    found = [p.strip() for piece in pieces for p in piece.split("\n\n")]
    assert found == [p.strip() for p in paragraphs]


BAD: list[Any] = [
    ("missing", None, "cannot be read"),
    ("empty.jsonl", b"", "holds no text"),
    ("empty.txt", b"", "holds no text"),
    ("blank.txt", b" \n\n \t\n", "holds no text"),
    ("latin.txt", b"caf\xe9 au lait", "is not UTF-8 text"),
    ("latin.jsonl", b'{"text": "caf\xe9 au lait"}', "is not UTF-8 text"),
    ("cut.jsonl", b'{"text": "a"}\n{"text": "b', "line 2"),
    ("other.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2"),
    ("list.jsonl", b'["a"]\n', "line 1"),
    pytest.param("null.jsonl", b'{"text": null}\n', "line 1"),
    pytest.param("number.jsonl", b'{"text": 5}\n', "line 1"),
    pytest.param("deep.jsonl", b"[" * 100_000, "line 1"),
]


@pytest.mark.parametrize(("name", "content", "reason"), BAD)
def test_a_file_without_documents_is_refused(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    refused(lambda: read_documents(file, "--text"), f"--text {file}: ", reason)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    refused(lambda: read_documents(tmp_path, "--text"), f"--text {tmp_path}: cannot be read")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_line_separators_inside_a_text_stay(tmp_path: Path, mark: str) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": f"one{mark}two"})
    assert read_documents(file, "--text") == [("a", f"one{mark}two")]


def test_half_a_surrogate_pair_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "' + "\\ud800 word " * 600 + '"}')
    refused(lambda: make_windows("search", read_documents(tmp_path / "a.jsonl", "--text"), tokenizer, 256))


def document(source: str, word: str, count: int) -> tuple[str, str]:
    return source, f" {word}" * count


def test_sources_take_turns(tokenizer: Any) -> None:
    documents = [document("long", "the", 2000), document("short", "and", 300), document("middle", "of", 800)]
    text = make_windows("search", documents, tokenizer, 10**6)
    assert text.windows.shape == (11, WINDOW)
    assert text.windows.dtype == np.int32
    turns = ("long", "short", "middle", "long", "middle", "long", "middle", *["long"] * 4)
    assert text.sources == turns
    words = {"long": " the", "short": " and", "middle": " of"}
    for source, window in zip(text.sources, text.windows, strict=True):
        assert set(tokenizer.decode(window.tolist()).split()) == {words[source].strip()}


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (WINDOW, 1), (WINDOW + 1, 2), (5 * WINDOW, 5)])
def test_windows_stop_when_they_hold_enough(tokenizer: Any, tokens: int, count: int) -> None:
    documents = [document(s, "the", 2000) for s in "abc"]
    everything = make_windows("search", documents, tokenizer, 10**6)
    some = make_windows("search", documents, tokenizer, tokens)
    assert len(some.windows) == count
    # Fewer tokens are a beginning of more.
    assert np.array_equal(some.windows, everything.windows[:count])
    assert some.sources == everything.sources[:count]
    assert np.array_equal(everything.head(tokens).windows, some.windows)
    assert everything.head(tokens).sources == some.sources


def mixed(windows: int, kinds: int, length: int = WINDOW) -> TextSet:
    """Windows of so many sources in turn, every token another."""
    tokens = np.arange(windows * length, dtype=np.int32).reshape(windows, length)
    return TextSet("search", tokens, tuple(str(i % kinds) for i in range(windows)), 3.0)


TEXTS = st.builds(mixed, st.integers(1, 96), st.integers(1, 40))


@given(TEXTS, st.integers(1, 30_000))
def test_a_few_tokens_are_spread_over_every_source(text: TextSet, tokens: int) -> None:
    some = text.spread(tokens)
    count, length = some.windows.shape
    # Of every source, if that leaves each some text to attend to.
    assert len(set(some.sources)) >= min(len(set(text.sources)), max(8, tokens // 28))
    assert np.array_equal(some.windows, text.windows[:count, :length])
    assert some.sources == text.sources[:count]
    assert (some.name, some.bytes_per_token) == (text.name, text.bytes_per_token)
    assert 2 <= length <= WINDOW
    # No more than asked for, but for the start of every source and whole windows.
    assert some.windows.size <= max(tokens, 2 * count) or (length == WINDOW and tokens > (count - 1) * WINDOW)


@given(TEXTS, st.integers(0, 10_000))
def test_a_text_is_whole_from_some_size_on(text: TextSet, more: int) -> None:
    whole = text.spread(text.windows.size + more)
    assert np.array_equal(whole.windows, text.windows)
    assert whole.sources == text.sources


@given(TEXTS)
def test_what_a_trial_sees_holds_what_it_saw_before_and_is_found_by_its_size(text: TextSet) -> None:
    seen = [text.spread(tokens).windows for tokens in RUNGS]
    for smaller, larger in itertools.pairwise(seen):
        assert smaller.shape <= larger.shape
        count, length = smaller.shape
        assert np.array_equal(larger[:count, :length], smaller)
    for windows in seen:
        assert np.array_equal(text.spread(windows.size).windows, windows)


def test_the_shipped_text_is_as_long_as_the_rungs_say(tokenizer: Any) -> None:
    documents = read_documents(REFERENCE / "texts" / "search.jsonl", "--text")
    text = make_windows("search", documents, tokenizer, RUNGS[-1])
    sizes = [text.spread(tokens).windows.size for tokens in RUNGS]
    assert sizes == pytest.approx(list(RUNGS), rel=0.02)
    assert all(set(text.spread(tokens).sources) == {source for source, _ in documents} for tokens in RUNGS)


def test_documents_are_parted_by_the_end_token_and_kept_in_order(tokenizer: Any) -> None:
    documents = [("a", f"Document {i} says hello. " * 8) for i in range(12)]
    ids: list[int] = []
    for _, text in documents:
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    found = make_windows("search", documents, tokenizer, 10**6).windows.flatten()
    assert len(ids) - len(found) < WINDOW
    assert found.tolist() == ids[: len(found)]


def test_bytes_per_token_are_those_of_the_text(tokenizer: Any) -> None:
    documents = [("a", "naïve café " * 300), ("b", "plain words here " * 300)]
    tokens = sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for _, t in documents)
    size = sum(len(t.encode()) for _, t in documents)
    assert make_windows("x", documents, tokenizer, 256).bytes_per_token == pytest.approx(size / tokens)


@pytest.mark.parametrize("documents", [[], [("a", "")], [("a", "too short")], [("a", "x " * 60)] * 2])
def test_less_than_a_window_is_refused(tokenizer: Any, documents: list[tuple[str, str]]) -> None:
    message = refused(lambda: make_windows("selection", documents, tokenizer, 1000))
    assert f"selection text must hold at least one window of {WINDOW} tokens" in message


def test_the_digest_names_the_tokens() -> None:
    windows = np.arange(512, dtype=np.int32).reshape(2, 256)
    text = TextSet("search", windows, ("a", "b"), 3.0)
    assert TextSet("report", windows.copy(), ("c", "d"), 4.0).digest == text.digest
    changed = windows.copy()
    changed[1, 255] += 1
    assert TextSet("search", changed, ("a", "b"), 3.0).digest != text.digest
    assert text.head(256).digest != text.digest


def test_splits_are_disjoint_complete_and_independent_of_order() -> None:
    names = ("search", "selection", "report", "calibration")
    documents = [("a", f"document {i}") for i in range(400)]
    splits = split_documents(documents, names)
    assert tuple(splits) == names
    dealt = [d for part in splits.values() for d in part]
    assert sorted(dealt) == sorted(documents)
    assert len(set(dealt)) == len(documents)
    assert all(60 < len(part) < 140 for part in splits.values())
    backwards = split_documents(documents[::-1], names)
    assert all(set(backwards[n]) == set(splits[n]) for n in names)


def test_the_same_text_is_never_in_two_splits() -> None:
    documents = [(source, f"document {i}") for i in range(50) for source in "ab"]
    splits = split_documents(documents, ("search", "report"))
    assert not {t for _, t in splits["search"]} & {t for _, t in splits["report"]}


def test_the_shipped_texts_share_no_document() -> None:
    texts = {
        file.stem: {t for _, t in read_documents(file, "--text")}
        for file in (REFERENCE / "texts").glob("*.jsonl")
    }
    assert {"search", "selection", "report", "calibration"} <= set(texts)
    assert sum(map(len, texts.values())) == len(set().union(*texts.values()))
    assert len({source for source, _ in read_documents(REFERENCE / "texts" / "search.jsonl", "-")}) >= 5
