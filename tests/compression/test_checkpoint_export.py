"""The folder form holds a candidate bit for bit, and hostile folders are refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from compression import load
from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from compression.checkpoint_export import export_checkpoint
from evaluators.texts import TextSet
from spaces.candidate import Candidate, MoeLayer
from tests.compression.support import EVERY, candidate, log_softmax, logits, mixed_types, provide, refused

RAGGED, TOP_K = {1: (0, 2, 3, 6, 7), 2: (1, 4, 5)}, {2: 1}
NAME = "blk.1.attn_q_a.weight"


@pytest.fixture
def wanted(tiny_model: CandidateModel) -> Candidate:
    return provide(
        tiny_model, candidate(tiny_model.inventory, RAGGED, TOP_K, mixed_types(tiny_model.inventory))
    )


@pytest.fixture
def folder(tiny_model: CandidateModel, wanted: Candidate, tiny: Checkpoint, tmp_path: Path) -> Path:
    path = tmp_path / "new" / "ragged"
    export_checkpoint(tiny_model, wanted, tiny, path)
    return path


def test_the_folder_gives_the_candidates_logits(
    tiny_model: CandidateModel, wanted: Candidate, folder: Path, tiny_texts: dict[str, TextSet]
) -> None:
    windows = tiny_texts["search"].windows[:3]
    tiny_model.apply(wanted)
    model = load(str(folder))
    assert np.abs(logits(model, windows) - logits(tiny_model, windows)).max() <= 1e-5
    assert not model.training
    moe = [model.model.layers[i].mlp for i in (1, 2)]
    assert [m.experts.down_proj.shape[0] for m in moe] == [5, 3]
    assert [m.gate.top_k for m in moe] == [2, 1]


def test_the_folder_holds_the_banks_blocks_and_the_kept_experts_only(
    tiny_model: CandidateModel, wanted: Candidate, folder: Path, tiny: Checkpoint
) -> None:
    arrays = load_file(folder / "moefit.safetensors")
    assert set(arrays) == {t.name for t in tiny.inventory.tensors}
    for name, type_name in wanted.types:
        tensor = tiny.inventory.by_name[name]
        blocks = tiny_model.bank.blocks(tensor, type_name)
        if tensor.per_expert and tensor.layer is not None:
            blocks = blocks[list(RAGGED[tensor.layer])]
        assert arrays[name].dtype == np.uint8
        assert np.array_equal(arrays[name], blocks), name
    for layer, kept in RAGGED.items():
        router = arrays[f"blk.{layer}.ffn_gate_inp.weight"]
        assert np.array_equal(router, tiny_model.plain(f"blk.{layer}.ffn_gate_inp.weight")[list(kept)])
    plan = wanted.plan
    data = sum(info.size for info in tiny.inventory.infos(plan))
    assert sum(a.nbytes for a in arrays.values()) == data


def test_the_folder_is_complete_and_alone(folder: Path, tiny: Checkpoint, wanted: Candidate) -> None:
    names = ["config.json", "moefit.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert (folder / "tokenizer.json").read_bytes() == (tiny.path / "tokenizer.json").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert Candidate.from_json(json.dumps(config.pop("moefit")["candidate"])) == wanted
    assert config == json.loads((tiny.path / "config.json").read_text())


def test_every_file_of_the_tokenizer_comes_along(
    tiny_model: CandidateModel, wanted: Candidate, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    names = {"tokenizer.model", "chat_template.jinja"}
    for name in names:
        (source / name).write_text(name)
    export_checkpoint(tiny_model, wanted, open_checkpoint(source), tmp_path / "out")
    assert names <= {p.name for p in (tmp_path / "out").iterdir()}


def test_the_reported_size_is_the_weights_file(
    tiny_model: CandidateModel, wanted: Candidate, tiny: Checkpoint, tmp_path: Path
) -> None:
    size = export_checkpoint(tiny_model, wanted, tiny, tmp_path / "x")
    assert size == (tmp_path / "x" / "moefit.safetensors").stat().st_size


def test_an_export_replaces_an_older_one(
    tiny_model: CandidateModel, folder: Path, tiny: Checkpoint, tiny_texts: dict[str, TextSet]
) -> None:
    other = provide(tiny_model, candidate(tiny.inventory, {1: (0, 1, 2)}))
    export_checkpoint(tiny_model, other, tiny, folder)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    windows = tiny_texts["search"].windows[:1]
    tiny_model.apply(other)
    assert np.abs(logits(load(folder), windows) - logits(tiny_model, windows)).max() <= 1e-5


def test_an_export_that_fails_leaves_the_older_one(
    tiny_model: CandidateModel, folder: Path, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compression.checkpoint_export.shutil.copyfile", full)
    other = provide(tiny_model, candidate(tiny.inventory, {1: (0, 1, 2)}))
    with pytest.raises(OSError, match="No space"):
        export_checkpoint(tiny_model, other, tiny, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_an_export_whose_name_cannot_be_given_leaves_the_older_one(
    tiny_model: CandidateModel,
    wanted: Candidate,
    folder: Path,
    tiny: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    replace_one, failed = os.replace, []

    def failing(source: Path, target: Path) -> None:
        if target == folder and not failed:
            failed.append(source)
            raise OSError(5, "Input/output error")
        replace_one(source, target)

    monkeypatch.setattr("compression.checkpoint_export.os.replace", failing)
    with pytest.raises(OSError, match="Input/output"):
        export_checkpoint(tiny_model, wanted, tiny, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_what_a_killed_export_left_goes(
    tiny_model: CandidateModel, wanted: Candidate, folder: Path, tiny: Checkpoint
) -> None:
    left = folder.with_name(f".{folder.name}.abc.part")
    shutil.copytree(folder, left)
    export_checkpoint(tiny_model, wanted, tiny, folder)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_folder_that_is_no_export_is_not_removed(
    tiny_model: CandidateModel, wanted: Candidate, tiny: Checkpoint, tmp_path: Path
) -> None:
    theirs = tmp_path / "documents"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    refused(lambda: export_checkpoint(tiny_model, wanted, tiny, theirs), theirs)
    assert (theirs / "thesis.txt").read_text() == "years of work"


def test_the_searched_model_is_not_overwritten(
    tiny_model: CandidateModel, wanted: Candidate, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(Path(shutil.copytree(tiny_checkpoint, tmp_path / "model")))
    refused(lambda: export_checkpoint(tiny_model, wanted, source, source.path), source.path)
    assert open_checkpoint(source.path).fingerprint == source.fingerprint


def test_a_file_at_the_path_is_refused(
    tiny_model: CandidateModel, wanted: Candidate, tiny: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("text")
    refused(lambda: export_checkpoint(tiny_model, wanted, tiny, tmp_path / "file"), tmp_path / "file")


def test_a_link_to_an_older_export_is_replaced_or_refused(
    tiny_model: CandidateModel, wanted: Candidate, folder: Path, tiny: Checkpoint, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    export_checkpoint(tiny_model, wanted, tiny, link)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "new"]


def test_a_layer_of_one_expert_is_refused(
    tiny_model: CandidateModel, tiny: Checkpoint, tmp_path: Path
) -> None:
    """The router of the family ranks a group by its two best experts, so nothing could compute it."""
    two = candidate(tiny.inventory, {2: (4, 5)}, {2: 1})
    one = replace(two, layers=(two.layers[0], MoeLayer(2, (4,), 1)))
    provide(tiny_model, one)
    refused(lambda: export_checkpoint(tiny_model, one, tiny, tmp_path / "one"), "layer 2")
    assert not list(tmp_path.iterdir())


PAIRS = [("The king said to", " his men"), ("It was a dark and", " stormy night"), ("A", " b")]


def test_lm_eval_scores_the_loaded_model(folder: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load(folder), load_tokenizer(folder)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=64, batch_size=2)
    assert wrapped.model is model
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    found = wrapped.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(PAIRS, found, strict=True):
        start, end = (wrapped.tok_encode(text) for text in (context, continuation))
        assert start + end == tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        rows = log_softmax(logits(model, np.array([start + end]))[0])[len(start) - 1 : -1]
        assert score == pytest.approx(rows[np.arange(len(end)), end].sum(), rel=1e-4)
        assert greedy == (rows.argmax(-1) == end).all()
    rolling = Instance("loglikelihood_rolling", {}, ("Once upon a time there was a king.",), 0)
    assert -1e3 < wrapped.loglikelihood_rolling([rolling], disable_tqdm=True)[0] < -10


def test_the_loaded_model_generates_what_its_logits_say(folder: Path) -> None:
    model, tokenizer = load(folder), load_tokenizer(folder)
    tokens = tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    written = model.generate(torch.tensor([tokens]), **options)[0].tolist()
    assert len(written) == len(tokens) + 6
    for i in range(len(tokens), len(written)):
        row = logits(model, np.array([written[:i]]))[0, -1].copy()
        row[model.config.eos_token_id] = -np.inf  # min_new_tokens
        assert written[i] == row.argmax()


def edited(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        change(values)
        (folder / "config.json").write_text(json.dumps(values))

    return edit


def chosen(change: Callable[[Any], object]) -> Callable[[Path], object]:
    return edited(lambda config: change(config["moefit"]["candidate"]))


def layer(**changes: Any) -> Callable[[Path], object]:
    return chosen(lambda c: c["layers"][0].update(changes))


def typed(type_name: Any, name: str = NAME) -> Callable[[Path], object]:
    return chosen(lambda c: c["types"].update({name: type_name}))


def arrays(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        values = load_file(folder / "moefit.safetensors")
        change(values)
        save_file(values, folder / "moefit.safetensors")

    return edit


def raw(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        file = folder / "moefit.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return edit


def swapped(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    return arrays(lambda a: a.update({name: np.ascontiguousarray(change(a[name]))}))


HOSTILE: list[Any] = [
    ("not an export", edited(lambda c: c.pop("moefit"))),
    ("another version", edited(lambda c: c["moefit"].update(version=2))),
    ("no candidate", edited(lambda c: c["moefit"].pop("candidate") and c["moefit"].pop("version"))),
    ("candidate is text", edited(lambda c: c["moefit"].update(candidate="all"))),
    ("layers of another model", chosen(lambda c: c["layers"].pop())),
    ("an expert twice", layer(experts=[0, 0, 3, 6, 7])),
    ("an expert too many", layer(experts=[0, 2, 3, 6, 8])),
    ("a negative expert", layer(experts=[-1, 2, 3, 6, 7])),
    ("no experts", layer(experts=[])),
    ("top-k of zero", layer(top_k=0)),
    ("top-k beyond the model's", layer(top_k=3)),
    ("top-k missing", chosen(lambda c: c["layers"][0].pop("top_k"))),
    ("unknown type", typed("Q9")),
    ("a type that does not fit", typed("Q4_K", "blk.1.attn_k_b.weight")),
    ("a type missing", chosen(lambda c: c["types"].pop(NAME))),
    ("types as a list", chosen(lambda c: c.update(types=[]))),
    ("layers of another config", edited(lambda c: c.update(num_hidden_layers=2))),
    ("experts of another config", edited(lambda c: c.update(n_routed_experts=4))),
    ("width of another config", edited(lambda c: c.update(hidden_size=128))),
    ("config not JSON", lambda f: (f / "config.json").write_text("{")),
    ("no config", lambda f: (f / "config.json").unlink()),
    ("no weights", lambda f: (f / "moefit.safetensors").unlink()),
    ("truncated weights", raw(lambda b: b[:-5])),
    ("garbage weights", raw(lambda b: b"x" * 100)),
    ("empty weights", raw(lambda b: b"")),
    pytest.param("entry is a list", edited(lambda c: c.update(moefit=[]))),
    pytest.param("entry is null", edited(lambda c: c.update(moefit=None))),
    pytest.param("experts as text", layer(experts="02367")),
    pytest.param("top-k not whole", layer(top_k=1.9)),
    pytest.param("top-k infinite", layer(top_k=float("inf"))),
    pytest.param("no groups", edited(lambda c: c.update(n_group=0))),
    pytest.param("a type not for weights", typed("I8")),
    pytest.param("another type", typed("Q3_K")),
    pytest.param("other experts", layer(experts=[0, 2, 3, 6])),
    pytest.param("a tensor gone", arrays(lambda a: a.pop(NAME))),
    pytest.param("one row for all", swapped(NAME, lambda x: x[:1])),
    pytest.param("a column gone", swapped(NAME, lambda x: x[:, :-1])),
    pytest.param("numbers for blocks", swapped(NAME, lambda x: x.astype(np.float32))),
    pytest.param(
        "a norm of one", swapped("blk.1.attn_norm.weight", lambda x: x[:1])
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "edit"), HOSTILE, ids=lambda v: v.replace(" ", "-") if isinstance(v, str) else ""
)
def test_a_hostile_folder_is_refused(folder: Path, what: str, edit: Callable[[Path], object]) -> None:
    edit(folder)
    message = refused(lambda: load(folder))
    assert str(folder) in message or "Q9" in message


def test_a_folder_of_transformers_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    refused(lambda: load(tiny_checkpoint), tiny_checkpoint, "moefit")
    refused(lambda: load(tmp_path / "nowhere"), tmp_path / "nowhere", "no such model folder")


def test_nothing_pruned_is_a_folder_too(
    tiny_model: CandidateModel, tiny: Checkpoint, tiny_texts: dict[str, TextSet], tmp_path: Path
) -> None:
    everything = provide(tiny_model, candidate(tiny.inventory, {1: EVERY, 2: EVERY}, types="BF16"))
    export_checkpoint(tiny_model, everything, tiny, tmp_path / "all")
    windows = tiny_texts["search"].windows[:2]
    # The checkpoint's weights are BF16, so nothing is lost.
    assert np.array_equal(logits(load(tmp_path / "all"), windows), logits(tiny_model, windows))


@pytest.mark.parametrize(
    "type_name",
    ["Q4_K", "Q2_K", "Q5_K", "F32"],
)
def test_a_uniform_candidate_with_its_fallbacks_is_read_back(
    tiny_model: CandidateModel, tiny: Checkpoint, tmp_path: Path, type_name: str
) -> None:
    wanted = provide(tiny_model, Candidate.uniform(tiny.inventory, type_name))
    export_checkpoint(tiny_model, wanted, tiny, tmp_path / "uniform")
    model = load(tmp_path / "uniform")
    tiny_model.apply(wanted)
    for name, value in tiny_model.model.state_dict().items():
        assert np.array_equal(model.state_dict()[name], value), name


def test_transformers_alone_does_not_take_the_folder_for_a_model(folder: Path) -> None:
    """It would fill a model with random weights."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
