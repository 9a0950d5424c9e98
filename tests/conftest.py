"""A small random DeepSeek-V3 checkpoint and what the tests make of it once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest_plugins = ("tests.finished_run",)

if TYPE_CHECKING:
    from compression.calibration import Calibration
    from compression.candidate_model import CandidateModel
    from compression.checkpoint import Checkpoint
    from evaluators.texts import TextSet

REFERENCE = Path(__file__).parents[1] / "experiments" / "reference_model"
WINDOW = 64


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint folder: 3 layers (1 dense), 8 experts of which 2 are used, vocabulary 4096.

    Rows of 256 in most tensors and of 32, 64 and 128 in some, so that every list of types is in use.
    """
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.set_num_threads(1)  # more would wait for each other longer than such small products take
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=4096, hidden_size=256, intermediate_size=256, moe_intermediate_size=256,
        num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
        n_shared_experts=1, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=0.5,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=128, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, max_position_embeddings=512,
        initializer_range=0.0625, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            value.data.normal_(0, 0.1)
        elif "norm" in name:
            value.data.add_(0.1 * torch.randn_like(value))
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    model.bfloat16().save_pretrained(folder)
    file = folder / "config.json"
    # transformers leaves out what it has no field for.
    file.write_text(json.dumps({**json.loads(file.read_text()), "scoring_func": "sigmoid"}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(REFERENCE / "checkpoint" / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path) -> Checkpoint:
    """The opened checkpoint, with its tokenizer in the inventory."""
    from dataclasses import replace

    from compression.checkpoint import open_checkpoint
    from compression.gguf_export import with_tokenizer

    checkpoint = open_checkpoint(tiny_checkpoint)
    return replace(checkpoint, inventory=with_tokenizer(checkpoint))


@pytest.fixture(scope="session")
def tiny_texts(tiny_checkpoint: Path) -> dict[str, TextSet]:
    """Real text in windows of 64 tokens: 16 to calibrate on, 8 to score on."""
    from compression.checkpoint import load_tokenizer
    from evaluators.texts import TextSet, make_windows, read_documents

    tokenizer, texts = load_tokenizer(tiny_checkpoint), {}
    for name, count in (("calibration", 16), ("search", 8)):
        documents = read_documents(REFERENCE / "texts" / f"{name}.jsonl", "--text")
        text = make_windows(name, documents, tokenizer, count * WINDOW)
        windows = text.windows.reshape(-1, WINDOW)[:count]
        texts[name] = TextSet(name, windows, ("mixed",) * count, text.bytes_per_token)
    return texts


@pytest.fixture(scope="session")
def tiny_calibration(tiny: Checkpoint, tiny_texts: dict[str, TextSet]) -> Calibration:
    from compression.calibrate import calibrate
    from compression.candidate_model import CandidateModel
    from compression.variant_bank import VariantBank

    text = tiny_texts["calibration"]
    model = CandidateModel(tiny, tiny.inventory, VariantBank(Path("unused")))
    return calibrate(model, text.windows, text.digest)


@pytest.fixture(scope="session")
def _shared_model(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> CandidateModel:
    from compression.candidate_model import CandidateModel
    from compression.variant_bank import VariantBank

    return CandidateModel(tiny, tiny.inventory, VariantBank(tmp_path_factory.mktemp("bank")))


@pytest.fixture
def tiny_model(_shared_model: CandidateModel) -> Iterator[CandidateModel]:
    """The checkpoint in memory, uncompressed before and after the test."""
    yield _shared_model
    _shared_model.reset()
