"""Commands that make the figures of the docs, with options that cannot be."""

from __future__ import annotations

from experiments.bad_inputs.case import Case, Make
from experiments.bad_inputs.search_places import PNG, file


def measure(wrong: str, command: str, arguments: str, *says: str, make: Make | None = None) -> Case:
    """A command of `experiments`."""
    return Case(wrong, f"experiments.{command}", tuple(arguments.split()), says, make)


def _picture(name: str) -> Make:
    return lambda world: world.put(name, PNG)


CASES: tuple[Case, ...] = (
    measure("exports of no study to verify", "verify_exports", "", "required: --study"),
    measure(
        "exports of a study that is nowhere", "verify_exports", "--study none", "--study none: no study in",
    ),
    measure(
        "no exports to verify", "verify_exports", "--study none --count 0",
        "--count must be at least 1, got 0",
    ),
    measure("exports to verify in words", "verify_exports", "--study none --count all", "--count", "'all'"),
    measure(
        "a negative seed of exports", "verify_exports", "--study none --seed -1", "--seed must be within",
    ),
    measure(
        "families that are unknown", "verify_families", "--families mixtrel", "unknown --families 'mixtrel'",
        "mixtral",
    ),
    measure("an empty family", "verify_families", "--families mixtral,", "unknown --families ''"),
    measure("proxies of no study", "proxy_validity", "out --json a.json", "--study"),
    measure(
        "proxies on no configs", "proxy_validity", "out --study none --json a.json --count 0",
        "--count must be",
    ),
    measure(
        "proxies on a negative number of items", "proxy_validity",
        "out --study none --json a.json --limit -1", "--limit must be at least 0",
    ),
    measure("long texts of a run that is nowhere", "long_form", "nowhere --json a.json", "nowhere"),
    measure(
        "long texts on no threads", "long_form", "nowhere --json a.json --threads 0", "--threads must be",
    ),
    measure(
        "long texts in a short context", "long_form", "nowhere --json a.json --context 1",
        "--context must be",
    ),
    measure(
        "decoding speed of no layers", "decode_speed", "out --layers 0", "--layers must be at least 1, got 0",
    ),
    measure("decoding speed on threads in words", "decode_speed", "out --threads all", "--threads", "'all'"),
    measure("decoding speed below a file", "decode_speed", "file/out", "file/out", make=file),
    measure(
        "a checkpoint to stream of no size", "streaming.make_checkpoint", "out --size big", "--size", "'big'",
    ),
    measure(
        "a checkpoint to stream in a folder that is there", "streaming.make_checkpoint", "model --size 1KB",
        "model: exists",
    ),
    measure(
        "a model to stream that is nowhere", "streaming.measure", "nowhere out",
        "nowhere: no such model folder",
    ),
    measure(
        "a model to stream in unknown types", "streaming.measure", "model out --types Q9",
        "unknown --types 'Q9'",
    ),
    measure(
        "a model to stream on no workers", "streaming.measure", "model out --workers 0", "--workers must be",
    ),
    measure(
        "a model to stream on no tokens", "streaming.measure", "model out --tokens 0", "--tokens must be",
    ),
    measure(
        "tasks made of documents that are nowhere", "make_tasks", "nowhere out", "nowhere: cannot be read",
    ),
    measure(
        "tasks made of a picture", "make_tasks", "p.jsonl out", "p.jsonl: is not UTF-8",
        make=_picture("p.jsonl"),
    ),
    measure("a table of a result that is nowhere", "readme_table", "nowhere", "nowhere", "result.json"),
    measure(
        "a table of a picture", "readme_table", "p.json", "p.json", "result.json", make=_picture("p.json"),
    ),
    measure(
        "screenshots of a run that is nowhere", "screenshots", "nowhere out",
        "nowhere/mlflow.db: no such file",
    ),
)  # fmt: skip
