"""Texts and lm-eval tasks that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from experiments.bad_inputs.case import Case, Make, World, search
from experiments.bad_inputs.search_places import PNG, folder, loop


def text(content: bytes | str, name: str = "bad.txt") -> Make:
    """A text of its own."""
    return lambda world: world.put(name, content)


def lines(*items: object) -> Make:
    """JSON lines of its own."""
    return text("\n".join(json.dumps(i) for i in items), "bad.jsonl")


def task(**fields: object) -> Callable[[World], None]:
    """A folder of one task `mine`, right but for the fields given."""

    def make(world: World) -> None:
        about = {
            "task": "mine", "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": "mine.jsonl"}}, "test_split": "test",
            "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": ["a", "b"],
            "doc_to_target": 0, "metric_list": [{"metric": "acc"}],
        }  # fmt: skip
        # JSON is YAML, too.
        world.put("tasks/mine.yaml", json.dumps(about | fields))
        world.put("tasks/mine.jsonl", '{"q": "one"}\n{"q": "two"}\n')

    return make


def spoiled_task(name: str, content: bytes | str) -> Make:
    """The folder of `task`, with one file of another content."""

    def make(world: World) -> None:
        task()(world)
        world.put(f"tasks/{name}", content)

    return make


_MINE = "--tasks mine --tasks-path tasks"

TEXTS: tuple[Case, ...] = (
    search("a text that is not there", "--text nowhere.txt", "--text nowhere.txt: cannot be read"),
    search("a text that is a folder", "--text folder", "--text folder: cannot be read", make=folder),
    search("a text behind a loop of links", "--text loop", "--text loop", make=loop),
    search("a text's path with a NUL", ["--text", "te\0xt"], "--text te\\x00xt"),
    search("a text without end", "--text /dev/zero", "--text /dev/zero"),
    search("an empty text", "--text bad.txt", "--text bad.txt: holds no text", make=text("")),
    search("a text of blanks", "--text bad.txt", "--text bad.txt: holds no text", make=text(" \n\t\n" * 99)),
    search("a picture as text", "--text bad.txt", "--text bad.txt: is not UTF-8 text", make=text(PNG)),
    search("a text in UTF-16", "--text bad.txt", "is not UTF-8", make=text("some text\n".encode("utf-16"))),
    search(
        "a text in Latin-1", "--text bad.txt", "is not UTF-8 text", make=text("été".encode("latin-1") * 9),
    ),
    search(
        "JSON lines without text", "--text bad.jsonl", "--text bad.jsonl: line 2",
        make=lines({"text": "a"}, {}),
    ),
    search("JSON lines of numbers", "--text bad.jsonl", "--text bad.jsonl: line 1", make=lines(1, 2)),
    search(
        "JSON lines with a text that is a list", "--text bad.jsonl", "line 1", make=lines({"text": ["a"]}),
    ),
    search("JSON lines cut short", "--text bad.jsonl", "line 1", make=text('{"text": "a', "bad.jsonl")),
    search("JSON lines nested 10^5 deep", "--text bad.jsonl", "line 1", make=text("[" * 10**5, "bad.jsonl")),
    search(
        "JSON lines with half a character", "--text bad.jsonl", "line 1",
        make=text(r'{"text": "\ud800"}', "bad.jsonl"),
    ),
    search(
        "a text that is too short", "--text bad.txt", "--text: the", "must hold at least one window of",
        make=text("a few words"),
    ),
    search("a calibration text that is not there", "--calibration nowhere.txt", "--calibration nowhere.txt"),
    search(
        "an empty calibration text", "--calibration bad.txt", "--calibration bad.txt: holds", make=text(""),
    ),
    search("a picture as calibration text", "--calibration bad.txt", "--calibration bad.txt", make=text(PNG)),
    search(
        "a calibration text that is too short", "--calibration bad.txt",
        "--calibration: the calibration text must hold at least one window", make=text("a few words"),
    ),
    search(
        "a calibration text that is scored on", "--calibration text.jsonl",
        "--calibration text.jsonl: shares documents with the text",
    ),
)  # fmt: skip

TASKS: tuple[Case, ...] = (
    replace(
        search("an unknown task", "--tasks local_clozes", "unknown task 'local_clozes'", "local_cloze"),
        slow=True,
    ),
    search("tasks that are only commas", "--tasks ,,", "--tasks ',,' names no task"),
    replace(search("a task's name with a NUL", ["--tasks", "a\0b"], "task", "a\\x00b"), slow=True),
    search(
        "a folder of tasks that is not there", "--tasks-path nowhere", "--tasks-path nowhere: no such folder",
    ),
    search("a folder of tasks that is a file", "--tasks-path text.jsonl", "--tasks-path text.jsonl"),
    search("a folder of tasks behind a loop of links", "--tasks-path loop", "--tasks-path loop", make=loop),
    search("a folder of tasks with a NUL", ["--tasks-path", "a\0b"], "--tasks-path"),
    search(
        "a task file that is no YAML", _MINE, "mine.yaml", make=spoiled_task("mine.yaml", "task: [mine\n{"),
    ),
    search("a task file in another encoding", _MINE, "mine.yaml", make=spoiled_task("mine.yaml", PNG)),
    search("a task file nested 2000 deep", _MINE, "mine.yaml", make=spoiled_task("mine.yaml", "[" * 2000)),
    search("a task that the shipped ones have", _MINE, "also in", make=task(task="local_cloze")),
    search(
        "a task without its data", _MINE, "no.jsonl",
        make=task(dataset_kwargs={"data_files": {"test": "no.jsonl"}}),
    ),
    search(
        "a task whose data are no JSON", _MINE, "mine.jsonl", "JSON lines",
        make=spoiled_task("mine.jsonl", "{"),
    ),
    search("a task without items", _MINE, "mine", make=spoiled_task("mine.jsonl", "")),
    search("a task of an unknown kind", _MINE, "mine", make=task(output_type="telepathy")),
    search("a task with an unknown split", _MINE, "mine", make=task(test_split="exam")),
    search(
        "a task that samples its answers", _MINE, "mine", "samples its answers",
        make=task(output_type="generate_until", generation_kwargs={"do_sample": True, "until": ["\n"]}),
    ),
)  # fmt: skip

CASES = (*TEXTS, *TASKS)
