"""A GGUF file holds a candidate to the byte, and llama.cpp computes the candidate from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from compression.calibrate import calibrate
from compression.calibration import Calibration
from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from compression.expert_pruning import rankings
from compression.gguf_export import export_gguf, tensor_data, with_tokenizer
from compression.variant_bank import VariantBank
from evaluators.llama_cpp import file_logits, probe_file
from evaluators.llama_runtime import LlamaModel
from evaluators.texts import WINDOW, TextSet, make_windows, read_documents
from spaces.candidate import Candidate, MoeLayer
from spaces.gguf_layout import ALIGNMENT, Value, header
from spaces.inventory import Inventory
from spaces.runtimes import RUNTIMES
from tests.compression.support import (
    candidate,
    kl,
    logits,
    mixed_types,
    perplexity,
    provide,
    refused,
)
from tests.conftest import REFERENCE

PRUNED = {1: (0, 2, 3, 6, 7), 2: (1, 2, 4, 5, 7)}
# F32 blocks are views of the bank's read-only file.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")


@pytest.fixture
def windows(tiny_texts: dict[str, TextSet]) -> np.ndarray:
    return tiny_texts["search"].windows


@pytest.fixture
def mixed(tiny_model: CandidateModel, tiny_calibration: Calibration) -> Candidate:
    """Portable, pruned, with many types."""
    wanted = candidate(tiny_model.inventory, PRUNED, None, mixed_types(tiny_model.inventory))
    return provide(tiny_model, wanted, tiny_calibration)


@pytest.fixture
def file(tiny_model: CandidateModel, mixed: Candidate, tmp_path: Path) -> Path:
    export_gguf(tiny_model, mixed, tmp_path / "out" / "mixed.gguf")
    return tmp_path / "out" / "mixed.gguf"


def value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def test_the_size_is_the_predicted_one(tiny_model: CandidateModel, mixed: Candidate, tmp_path: Path) -> None:
    seen: list[int] = []
    path = tmp_path / "mixed.gguf"
    size = export_gguf(tiny_model, mixed, path, seen.append)
    assert size == path.stat().st_size == tiny_model.inventory.file_bytes(mixed.plan)
    assert seen == sorted(set(seen))
    assert len(seen) == len(tiny_model.inventory.tensors)
    assert seen[-1] == size


def test_the_gguf_package_reads_every_tensor_as_the_banks_blocks(
    tiny_model: CandidateModel, mixed: Candidate, file: Path
) -> None:
    inventory, types = tiny_model.inventory, dict(mixed.types)
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    assert list(tensors) == [t.name for t in inventory.tensors]
    for tensor in inventory.tensors:
        found, kept = tensors[tensor.name], PRUNED.get(-1 if tensor.layer is None else tensor.layer)
        shape = tensor.kept_shape(None if kept is None else len(kept))
        assert found.shape.tolist() == list(shape[::-1]), tensor.name
        if tensor.quantizable:
            assert found.tensor_type.name == types[tensor.name]
            expected = tiny_model.bank.blocks(tensor, types[tensor.name])
        else:
            assert found.tensor_type.name == "F32"
            expected = tiny_model.plain(tensor.name)
        expected = expected[list(kept)] if tensor.per_expert and kept is not None else expected
        assert np.asarray(found.data).tobytes() == expected.tobytes(), tensor.name


def test_metadata_is_that_of_the_pruned_model(
    tiny: Checkpoint, tiny_model: CandidateModel, tmp_path: Path
) -> None:
    wanted = provide(tiny_model, candidate(tiny.inventory, PRUNED, {1: 1, 2: 1}))
    export_gguf(tiny_model, wanted, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    config = json.loads((tiny.path / "config.json").read_text())
    expected = {
        "general.architecture": "deepseek2",
        "deepseek2.expert_count": 5,
        "deepseek2.expert_used_count": 1,
        "deepseek2.block_count": config["num_hidden_layers"],
        "deepseek2.embedding_length": config["hidden_size"],
        "deepseek2.expert_weights_scale": config["routed_scaling_factor"],
        "deepseek2.expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
        "deepseek2.expert_weights_norm": True,
        "deepseek2.leading_dense_block_count": 1,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
    }
    assert {key: value(reader, key) for key in expected} == pytest.approx(expected)
    assert len(value(reader, "tokenizer.ggml.tokens")) == config["vocab_size"]
    assert reader.alignment == ALIGNMENT


def test_a_lossless_file_gives_transformers_logits(
    tiny_model: CandidateModel, windows: np.ndarray, tmp_path: Path
) -> None:
    base = logits(tiny_model, windows)
    export_gguf(
        tiny_model, provide(tiny_model, candidate(tiny_model.inventory, types="F32")), tmp_path / "a.gguf"
    )
    found = file_logits(tmp_path / "a.gguf", windows, tmp_path / "logits.npy")
    assert base.std() > 0.5
    assert np.abs(found - base).max() <= 1e-3


def test_bf16_loses_no_weight_and_little_in_llama_cpp(
    tiny_model: CandidateModel, windows: np.ndarray, tmp_path: Path
) -> None:
    """The checkpoint is BF16. llama.cpp rounds activations to BF16 too, which flips some experts."""
    base = logits(tiny_model, windows)
    wanted = provide(tiny_model, candidate(tiny_model.inventory, types="BF16"))
    tiny_model.apply(wanted)
    assert np.array_equal(logits(tiny_model, windows), base)
    export_gguf(tiny_model, wanted, tmp_path / "a.gguf")
    found = file_logits(tmp_path / "a.gguf", windows, tmp_path / "logits.npy")
    assert kl(base, found) < 5e-3
    assert np.median(np.abs(found - base).max(-1)) < 0.05


def test_llama_cpp_scores_a_pruned_mixed_file_as_the_evaluator_does(
    tiny_model: CandidateModel,
    mixed: Candidate,
    file: Path,
    tiny_texts: dict[str, TextSet],
    tmp_path: Path,
) -> None:
    windows = np.concatenate([text.windows for text in tiny_texts.values()])
    base = logits(tiny_model, windows)
    tiny_model.apply(mixed)
    own = logits(tiny_model, windows)
    found = file_logits(file, windows, tmp_path / "logits.npy")
    assert perplexity(found, windows) == pytest.approx(perplexity(own, windows), rel=5e-3)
    # llama.cpp rounds activations too; that must be little beside what compression does.
    assert kl(own, found) < 0.05 * kl(base, own)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_llama_cpp_scores_the_reference_model_as_the_evaluator_does(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(REFERENCE / "checkpoint")
    inventory, tokenizer = with_tokenizer(checkpoint), load_tokenizer(checkpoint.path)
    text = {
        name: make_windows(
            name, read_documents(REFERENCE / "texts" / f"{name}.jsonl", "--text"), tokenizer, tokens
        )
        for name, tokens in (("calibration", 16 * WINDOW), ("report", 8 * WINDOW))
    }
    compressed = CandidateModel(checkpoint, inventory, VariantBank(tmp_path / "bank"))
    calibration = calibrate(compressed, text["calibration"].windows, "calibration")
    ranking = rankings(calibration, inventory.moe_layers)["reap"]
    layers = tuple(MoeLayer(i, tuple(sorted(ranking[i][:12])), 3) for i in inventory.moe_layers)
    types = tuple(mixed_types(inventory).items())
    wanted = provide(compressed, Candidate(layers, types), calibration)
    windows = text["report"].windows
    base = logits(compressed, windows)
    compressed.apply(wanted)
    own = logits(compressed, windows)
    export_gguf(compressed, wanted, tmp_path / "a.gguf")
    found = file_logits(tmp_path / "a.gguf", windows, tmp_path / "logits.npy")
    assert perplexity(found, windows) == pytest.approx(perplexity(own, windows), rel=5e-3)
    assert kl(own, found) < 0.1 * kl(base, own)


@pytest.mark.parametrize("top_k", [1, 2])
def test_llama_cpp_runs_a_pruned_file_with_the_candidates_top_k(
    tiny_model: CandidateModel, windows: np.ndarray, tmp_path: Path, top_k: int
) -> None:
    wanted = candidate(tiny_model.inventory, PRUNED, dict.fromkeys(PRUNED, top_k), "F32")
    tiny_model.apply(provide(tiny_model, wanted))
    expected = logits(tiny_model, windows[:2])
    export_gguf(tiny_model, wanted, tmp_path / "a.gguf")
    found = file_logits(tmp_path / "a.gguf", windows[:2], tmp_path / "logits.npy")
    assert np.abs(found - expected).max() <= 1e-3


def test_llama_cpp_loads_and_generates_and_counts_the_same_bytes(
    tiny_model: CandidateModel, mixed: Candidate, file: Path
) -> None:
    probe = probe_file(file, [5, 6, 7], generate=4)
    assert probe.model_bytes == sum(i.size for i in tiny_model.inventory.infos(mixed.plan))
    assert probe.vocabulary == tiny_model.inventory.vocabulary
    assert len(probe.generated) == 4


def test_the_file_does_not_depend_on_what_the_model_is_meanwhile(
    tiny_model: CandidateModel, mixed: Candidate, file: Path, tmp_path: Path
) -> None:
    other = candidate(tiny_model.inventory, {1: (4, 5), 2: (0, 3, 6)}, {1: 1}, "Q8_0")
    tiny_model.apply(provide(tiny_model, other))
    export_gguf(tiny_model, mixed, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("experts", "top_k"), [({1: (0, 1, 2)}, None), (None, {2: 1})], ids=["experts", "top-k"]
)
def test_a_ragged_candidate_is_refused(
    tiny_model: CandidateModel, experts: Any, top_k: Any, tmp_path: Path
) -> None:
    path = tmp_path / "out" / "ragged.gguf"
    wanted = provide(tiny_model, candidate(tiny_model.inventory, experts, top_k))
    refused(lambda: export_gguf(tiny_model, wanted, path), path, "differ by layer", "folder")
    assert not path.parent.exists()


@pytest.mark.parametrize("older", [False, True], ids=["new", "older"])
def test_an_export_that_fails_midway_leaves_what_was_there(
    tiny_model: CandidateModel, mixed: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    path = tmp_path / "out" / "a.gguf"
    if older:
        path.parent.mkdir()
        path.write_bytes(b"an older file")

    def failing(model: CandidateModel, wanted: Candidate, name: str) -> Iterator[np.ndarray]:
        pieces = list(tensor_data(model, wanted, name))
        yield pieces[0]
        if name == "blk.1.ffn_up_exps.weight":
            raise OSError(28, "No space left on device")
        yield from pieces[1:]

    monkeypatch.setattr("compression.gguf_export.tensor_data", failing)
    with pytest.raises(OSError, match="No space"):
        export_gguf(tiny_model, mixed, path)
    assert [p.read_bytes() for p in path.parent.iterdir()] == ([b"an older file"] if older else [])


def test_what_a_killed_export_left_goes(tiny_model: CandidateModel, mixed: Candidate, tmp_path: Path) -> None:
    for name in (".a.gguf.1.2.part", ".b.gguf.1.2.part"):
        (tmp_path / name).write_bytes(b"half")
    export_gguf(tiny_model, mixed, tmp_path / "a.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.gguf.1.2.part", "a.gguf"]


def test_a_tensor_of_unpredicted_size_is_not_written(
    tiny_model: CandidateModel, mixed: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*args: Any) -> Iterator[np.ndarray]:
        yield next(tensor_data(*args))[:-1]

    monkeypatch.setattr("compression.gguf_export.tensor_data", short)
    with pytest.raises(RuntimeError, match=r"token_embd\.weight: .* were predicted"):
        export_gguf(tiny_model, mixed, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


STRINGS = (
    "", " ", "  ", "Hello world", " leading and trailing ", "two  spaces   three",
    "tab\tand\nnew\r\nlines\n\n\n", "don't they'll we've I'M", "x=1+2*(3/4); if(a<b){return 'c';}",
    "3.14159 1,000,000 007", "naïve café Ærøskøbing Straße", "Привет, мир", "日本語のテキスト",
    "emoji \U0001f642 \U0001f469\u200d\U0001f467 mix", "a\u0301 combining \u00a0nbsp", "zero\u200bwidth",
    "<|endoftext|>", "stop<|endoftext|> go <|pad|>", "<|endof", "ALLCAPS camelCase snake_case",
    "In the beginning God created the heaven and the earth.\nTo be, or not to be: that is the question.",
    "\u2028line\u2029paragraph", "a" * 300,
)  # fmt: skip


def test_llama_cpp_tokenizes_as_the_checkpoints_tokenizer(
    tiny: Checkpoint, file: Path, tiny_texts: dict[str, TextSet]
) -> None:
    tokenizer = load_tokenizer(tiny.path)
    text = tokenizer.decode(tiny_texts["search"].windows[:4].flatten().tolist())
    with LlamaModel(file, context=8) as runtime:
        for string in (*STRINGS, text):
            assert runtime.tokenize(string) == tokenizer(string, add_special_tokens=False)["input_ids"], (
                string
            )


def with_added_token(checkpoint: Path, folder: Path, *, special: bool) -> Checkpoint:
    """The checkpoint with a tokenizer that knows one token more than its merges make, id 4095."""
    path = Path(shutil.copytree(checkpoint, folder))
    spec = json.loads((path / "tokenizer.json").read_text())
    spec["model"]["vocab"] = {t: i for t, i in spec["model"]["vocab"].items() if i != 4095}
    last = "".join(spec["model"]["merges"][-1])
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if "".join(m) != last]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"].append({"id": 4095, "content": "<think>", "special": special, **flags})
    (path / "tokenizer.json").write_text(json.dumps(spec))
    return open_checkpoint(path)


@pytest.mark.parametrize(
    "special",
    [True, pytest.param(False)],
    ids=["special", "plain"],
)
def test_an_added_token_is_one_token_in_llama_cpp(
    tiny_model: CandidateModel, tiny_checkpoint: Path, tmp_path: Path, special: bool
) -> None:
    checkpoint = with_added_token(tiny_checkpoint, tmp_path / "model", special=special)
    other = CandidateModel.__new__(CandidateModel)
    vars(other).update({**vars(tiny_model), "inventory": with_tokenizer(checkpoint)})
    export_gguf(other, provide(tiny_model, candidate(other.inventory)), tmp_path / "a.gguf")
    tokenizer = load_tokenizer(checkpoint.path)
    text = "Hello<think>world"
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert 4095 in expected
    with LlamaModel(tmp_path / "a.gguf", context=8) as runtime:
        assert runtime.tokenize(text) == expected


# What spaces.runtimes says llama.cpp cannot do. When one of these fails, it can: change it there.


def write_unchecked(
    model: CandidateModel, wanted: Candidate, path: Path, changed: dict[str, Value] | None = None
) -> Path:
    """The file `export_gguf` refuses to write."""
    inventory: Inventory = model.inventory
    infos = inventory.infos(wanted.plan)
    metadata = {**inventory.plan_metadata(wanted.plan), **(changed or {})}
    with path.open("wb") as stream:
        stream.write(header(metadata, infos))
        for info in infos:
            for piece in tensor_data(model, wanted, info.name):
                stream.write(piece.tobytes())
            stream.write(b"\0" * (-info.size % ALIGNMENT))
    return path


@pytest.mark.parametrize("scalar", [False, True], ids=["array", "scalar"])
def test_llama_cpp_refuses_layers_with_different_expert_counts(
    tiny_model: CandidateModel, tmp_path: Path, scalar: bool
) -> None:
    ragged = provide(tiny_model, candidate(tiny_model.inventory, {1: (0, 1, 2, 3, 4)}, types="Q8_0"))
    changed = {tiny_model.inventory.expert_count_key: Value("u32", 8)} if scalar else {}
    path = write_unchecked(tiny_model, ragged, tmp_path / "ragged.gguf", changed)
    refused(lambda: probe_file(path, [1, 2], generate=1), path, "refuses" if scalar else "wrong type")
    assert not RUNTIMES["llama.cpp"].ragged


def test_llama_cpp_does_not_apply_each_layers_own_top_k(
    tiny_model: CandidateModel, windows: np.ndarray, tmp_path: Path
) -> None:
    inventory = tiny_model.inventory
    ragged = provide(tiny_model, candidate(inventory, top_k={1: 2, 2: 1}, types="F32"))
    tiny_model.apply(ragged)
    expected = logits(tiny_model, windows[:2])
    key = inventory.expert_used_key
    found = {}
    # Layer 0 is dense; its entry is what llama.cpp uses for all.
    for name, counts in (("own", (2, 2, 1)), ("same", (2, 2, 2))):
        path = write_unchecked(tiny_model, ragged, tmp_path / f"{name}.gguf", {key: Value("u32", counts)})
        found[name] = file_logits(path, windows[:2], tmp_path / f"{name}.npy")
    # The array is read, and equal entries are right ...
    tiny_model.apply(replace(ragged, layers=candidate(inventory).layers))
    assert np.abs(found["same"] - logits(tiny_model, windows[:2])).max() <= 1e-3
    # ... but different entries are not what they say.
    assert kl(expected, found["own"]) > 1e-3
    assert not RUNTIMES["llama.cpp"].ragged
