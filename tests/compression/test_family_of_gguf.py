"""A GGUF's metadata and shapes lead to the family, and to the config, that the file was written from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from compression.families import family, family_of_gguf
from compression.families.base import Family
from experiments import zoo
from spaces.gguf_layout import Value
from tests.compression.support import refused
from tests.compression.test_family_options import EXPRESSIBLE

MODELS = [(name, {}) for name in sorted(zoo.FAMILIES)] + EXPRESSIBLE


def stored(metadata: dict[str, Value]) -> dict[str, Value]:
    """Metadata as a file gives it back."""
    return {
        k: Value(v.kind, float(np.float32(v.value))) if v.kind == "f32" else v for k, v in metadata.items()
    }  # fmt: skip


def contents(name: str, **over: Any) -> tuple[Family, dict[str, Value], dict[str, tuple[int, ...]]]:
    """A family, its GGUF's metadata and the shapes of its GGUF's tensors."""
    made = family(AutoConfig.for_model(**zoo.config(name, **over)).to_dict(), name)
    return made, stored(made.metadata()), {p.name: p.tensor.shape for p in made.parts}


@pytest.mark.parametrize(("name", "over"), MODELS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_a_gguf_says_what_the_config_said(name: str, over: dict[str, Any]) -> None:
    made, metadata, shapes = contents(name, **over)
    found = family_of_gguf(metadata, shapes, name)
    assert type(found) is type(made)
    assert [(p.tensor, p.path) for p in found.parts] == [(p.tensor, p.path) for p in made.parts]
    assert found.moe_layers == made.moe_layers
    assert stored(found.metadata()) == metadata


def test_plain_values_and_one_number_a_layer_are_read_too() -> None:
    made, metadata, shapes = contents("qwen3_moe")
    plain: dict[str, Any] = {k: v.value for k, v in metadata.items()}
    plain["qwen3moe.feed_forward_length"] = [512, 512, 512]
    plain["qwen3moe.attention.head_count_kv"] = (2, 2, 2)
    assert family_of_gguf(plain, shapes, "x").metadata().keys() == made.metadata().keys()


def test_an_axis_of_one_in_front_is_no_other_shape() -> None:
    made, metadata, shapes = contents("qwen2_moe")
    shapes |= {n: (1, *shape) for n, shape in shapes.items() if "gate_inp_shexp" in n}
    assert family_of_gguf(metadata, shapes, "x").parts[-1].tensor == made.parts[-1].tensor
    shapes |= {"blk.0.attn_q.weight": (1, 1, 256, 255)}
    refused(lambda: family_of_gguf(metadata, shapes, "x"), "blk.0.attn_q.weight")


def test_layers_that_predict_further_tokens_are_left_out() -> None:
    made, metadata, shapes = contents("glm4_moe")
    metadata["glm4moe.block_count"] = Value("u32", 4)
    metadata["glm4moe.nextn_predict_layers"] = Value("u32", 1)
    shapes["blk.3.nextn.enorm.weight"] = (256,)
    found = family_of_gguf(metadata, shapes, "x")
    assert [p.tensor for p in found.parts] == [p.tensor for p in made.parts]


def test_what_no_family_reads_is_refused() -> None:
    _, metadata, shapes = contents("mixtral")

    def refuse(*parts: str, **changed: Any) -> None:
        tensors = changed.pop("shapes", shapes)
        values = {k.replace("__", "."): v for k, v in changed.items()}
        entries = {k: v for k, v in (metadata | values).items() if v is not None}
        refused(lambda: family_of_gguf(entries, tensors, "the.gguf"), "the.gguf", *parts)

    refuse("'gemma'", "llama", "qwen2moe", general__architecture=Value("str", "gemma"))
    refuse("None", general__architecture=None)
    refuse("no Mixture-of-Experts like mixtral", llama__expert_count=None)
    refuse("lacks context_length", llama__context_length=None)
    refuse("'longrope'", llama__rope__scaling__type=Value("str", "longrope"))
    refuse("wrong kind", llama__feed_forward_length=Value("u32", (1, 2, 3)))
    refuse("rope_freqs.weight", shapes=shapes | {"rope_freqs.weight": (32,)})
    refuse("output_norm.weight", shapes=shapes | {"output_norm.weight": (255,)})
    refuse("lacks token_embd.weight", shapes={})
