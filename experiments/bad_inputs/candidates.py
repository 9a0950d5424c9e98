"""search.export of a GGUF file: options, candidates and imatrices that do not fit it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from compression.gguf_file import GgufFile
from compression.gguf_inventory import describe_gguf
from experiments.bad_inputs.case import Case, Make, World, export
from experiments.bad_inputs.search_places import PNG, file, folder, loop
from spaces.candidate import Candidate

_APPLY = "--model model.gguf --candidate candidate.json --out out.gguf"
_STACK = "blk.0.ffn_up_exps.weight"
Data = dict[str, Any]


def candidate(change: Callable[[Data], object]) -> Make:
    """A candidate of `model.gguf` that keeps all experts in Q8_0, changed."""

    def make(world: World) -> None:
        inventory = describe_gguf(GgufFile.open(world.folder / "model.gguf"))
        data = json.loads(Candidate.uniform(inventory, "Q8_0").to_json())
        change(data)
        world.put("candidate.json", json.dumps(data))

    return make


def text(content: bytes | str, name: str = "candidate.json") -> Make:
    """A file of any content."""
    return lambda world: world.put(name, content)


def good(world: World) -> None:
    candidate(lambda data: None)(world)


def layers(**fields: object) -> Make:
    """All layers with other fields."""
    return candidate(lambda data: [m.update(fields) for m in data["layers"]])


def first(**fields: object) -> Make:
    """The first layer with other fields."""
    return candidate(lambda data: data["layers"][0].update(fields))


def types(**of: str) -> Make:
    """Other types by tensor; dots of names are written as two underscores."""
    return candidate(lambda data: data["types"].update({k.replace("__", "."): v for k, v in of.items()}))


def _bad(wrong: str, *says: str, make: Make) -> Case:
    return export(wrong, _APPLY, "candidate.json", *says, make=make)


OPTIONS: tuple[Case, ...] = (
    export("nothing to export", "", "give --study NAME", "--model FILE.gguf"),
    export("a study and a model at once", "--study a --model b", "--study NAME", "not both"),
    export("a study with a model's option", "--study a --uniform Q8_0", "--uniform does not go with --study"),
    export("a model with a study's option", "--model a --trial 1", "--trial does not go with --model"),
    export(
        "a model with nothing to make of it", "--model model.gguf --out o.gguf", "--candidate FILE",
        "--uniform TYPE",
    ),
    export(
        "a candidate and a uniform type at once",
        "--model model.gguf --out o.gguf --candidate c --uniform Q8_0",
        "--candidate FILE and --uniform TYPE",
    ),
    export("an export without a place", "--model model.gguf --uniform Q8_0", "--model needs --out FILE.gguf"),
    export(
        "an export to a text", "--model model.gguf --uniform Q8_0 --out o.txt",
        "--out o.txt: must end in .gguf",
    ),
    export(
        "an unknown uniform type", "--model model.gguf --uniform Q9 --out o.gguf", "unknown --uniform 'Q9'",
    ),
    export(
        "an empty uniform type", ["--model", "model.gguf", "--uniform", "", "--out", "o.gguf"],
        "--uniform ''",
    ),
    export(
        "no threads", "--model model.gguf --uniform Q8_0 --out o.gguf --threads 0",
        "--threads must be at least 1",
    ),
    export(
        "threads in words", "--model model.gguf --uniform Q8_0 --out o.gguf --threads all", "--threads",
        "'all'",
    ),
    export(
        "more threads than a machine has", "--model model.gguf --uniform Q8_0 --out o.gguf --threads 1000000",
        "--threads must be at most",
    ),
    export(
        "an export onto the model itself", "--model model.gguf --uniform Q8_0 --out model.gguf",
        "is the model itself",
    ),
    export(
        "an export onto a folder", "--model model.gguf --uniform Q8_0 --out f.gguf", "f.gguf",
        make=lambda w: (w.folder / "f.gguf").mkdir(),
    ),
    export(
        "an export below a file", "--model model.gguf --uniform Q8_0 --out file/o.gguf", "file", make=file,
    ),
    export(
        "an export where none can be", "--model model.gguf --uniform Q8_0 --out /proc/o.gguf", "/proc/o.gguf",
    ),
    export(
        "an export's name with a NUL", ["--model", "model.gguf", "--uniform", "Q8_0", "--out", "o\0.gguf"],
        "--out", "o\\x00.gguf",
    ),
    export(
        "an export's name of 300 letters",
        ["--model", "model.gguf", "--uniform", "Q8_0", "--out", "n" * 300 + ".gguf"], "nnn",
    ),
    export(
        "a start for a candidate below a file", "--model model.gguf --uniform Q8_0 --out file/o.json", "file",
        make=file,
    ),
    export(
        "a checkpoint folder to requantize", "--model model --uniform Q8_0 --out o.gguf", "model: not a file",
    ),
    export(
        "a model behind a loop of links to requantize", "--model loop --uniform Q8_0 --out o.gguf", "loop",
        make=loop,
    ),
)  # fmt: skip

CANDIDATES: tuple[Case, ...] = (
    _bad("a candidate that is not there", "cannot be read", make=lambda world: None),
    export(
        "a candidate that is a folder", "--model model.gguf --candidate folder --out o.gguf",
        "folder: cannot be read", make=folder,
    ),
    _bad("an empty candidate", "not a candidate", make=text("")),
    _bad("a picture as candidate", "cannot be read", make=text(PNG)),
    _bad("a candidate that is a list", "not a candidate", make=text("[]")),
    _bad("a candidate cut short", "not a candidate", make=text('{"version": 1, "layers": [')),
    _bad("a candidate nested 10^5 deep", "not a candidate", make=text("[" * 10**5)),
    _bad(
        "a candidate that says a thing twice", "'version' stands twice",
        make=text('{"version": 1, "version": 1}'),
    ),
    _bad("a candidate without a version", "'version'", make=candidate(lambda data: data.pop("version"))),
    _bad(
        "a candidate of a newer version", "version must be 1, got 2",
        make=candidate(lambda data: data.update(version=2)),
    ),
    _bad("a candidate without layers", "'layers'", make=candidate(lambda data: data.pop("layers"))),
    _bad("a candidate without types", "'types'", make=candidate(lambda data: data.pop("types"))),
    _bad(
        "a candidate of a shallower model", "layers must be the MoE layers [0, 1]",
        make=candidate(lambda data: data["layers"].pop()),
    ),
    _bad("a candidate with a layer in words", "not a candidate", make=first(layer="first")),
    _bad("a candidate with an expert out of range", "within 0..7", make=first(experts=[0, 1, 8])),
    _bad("a candidate with a negative expert", "within 0..7", make=first(experts=[-1, 0, 1])),
    _bad("a candidate with an expert twice", "distinct, ascending", make=first(experts=[0, 1, 1])),
    _bad("a candidate with experts out of order", "distinct, ascending", make=first(experts=[2, 1, 0])),
    _bad("a candidate with no experts", "experts must be distinct", make=first(experts=[])),
    _bad("a candidate with half an expert", "not a candidate", make=first(experts=[0.5, 1])),
    _bad(
        "a candidate with a top-k above its experts", "top_k must be within 1..1",
        make=first(experts=[0], top_k=2),
    ),
    _bad("a candidate with a top-k above the model's", "top_k must be within 1..2", make=layers(top_k=3)),
    _bad("a candidate with a top-k of 0", "top_k must be within", make=layers(top_k=0)),
    _bad("a candidate with a top-k of 10^400", "top_k", make=layers(top_k=10**400)),
    _bad("a ragged candidate for a GGUF file", "differ by layer", make=first(experts=[0, 1, 2, 3])),
    _bad(
        "a candidate with an unknown tensor", "unknown tensor", "'blk.0.attn_w.weight'",
        make=types(blk__0__attn_w__weight="Q8_0"),
    ),
    _bad("a candidate with an unknown type", _STACK, "'Q9'", make=types(blk__0__ffn_up_exps__weight="Q9")),
    _bad(
        "a candidate with a number as type", "not a candidate",
        make=candidate(lambda data: data["types"].update({_STACK: 8})),
    ),
    _bad(
        "a candidate that quantizes a norm", "output_norm.weight stays F32",
        make=types(output_norm__weight="Q8_0"),
    ),
    _bad(
        "a candidate whose type needs an imatrix", _STACK, "--imatrix FILE",
        make=types(blk__0__ffn_up_exps__weight="IQ1_S"),
    ),
)  # fmt: skip

_WITH = _APPLY + " --imatrix imatrix"


def imatrix(content: bytes | str) -> Make:
    """A good candidate, and a file as its imatrix."""

    def make(world: World) -> None:
        good(world)
        world.put("imatrix", content)

    return make


def model_as_imatrix(world: World) -> None:
    good(world)
    (world.folder / "imatrix").symlink_to("model.gguf")


IMATRICES: tuple[Case, ...] = (
    export("an imatrix that is not there", _WITH, "imatrix: cannot be read", make=good),
    export(
        "an imatrix in the old format",
        _WITH,
        "imatrix: not an imatrix in GGUF format",
        make=imatrix(bytes(99)),
    ),
    export("an empty imatrix", _WITH, "imatrix", make=imatrix("")),
    export("a model as imatrix", _WITH, "imatrix: not an imatrix (general.type)", make=model_as_imatrix),
)

CASES = (*OPTIONS, *CANDIDATES, *IMATRICES)
