"""YaRN, which stretches rotary positions: transformers' settings in llama.cpp's terms.

transformers scales the rotated parts of queries and keys by an attention factor, and
DeepSeek's models all scores by `mscale_all_dim` besides. llama.cpp derives both from
`yarn_log_multiplier` and `attn_factor`, each graph in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compression.families.base import f32, shortest, u32
from spaces.errors import UserError
from spaces.gguf_layout import Value

_FAST, _SLOW = 32, 1  # what llama.cpp has where an architecture reads no others
_NEXT_TO_NOTHING = 1e-30


@dataclass(frozen=True)
class Yarn:
    """The settings of one model.

    Attributes:
        settings: `rope_parameters` of the transformers config.
        factor: How often the original context fits into the stretched one.
        original: Tokens of the original context.
        rotary: Columns that are rotated.
    """

    settings: Mapping[str, Any]
    factor: float
    original: int
    rotary: int

    def magnitude(self, weight: float) -> float:
        """YaRN's magnitude at the model's factor, the logarithm weighted."""
        return 1.0 if self.factor <= 1 else 1 + 0.1 * weight * math.log(self.factor)

    @property
    def attention(self) -> float:
        """What transformers multiplies the rotated parts of queries and keys with."""
        s = self.settings
        if s.get("attention_factor") is not None:
            return float(s["attention_factor"])
        if s.get("mscale") and s.get("mscale_all_dim"):
            return self.magnitude(s["mscale"]) / self.magnitude(s["mscale_all_dim"])
        return self.magnitude(1)

    def _entries(self) -> dict[str, Value]:
        return {
            "rope.scaling.type": Value("str", "yarn"),
            "rope.scaling.factor": f32(self.factor),
            "rope.scaling.original_context_length": u32(self.original),
        }

    def metadata(self) -> dict[str, Value]:
        """Entries for graphs that read no log multiplier, whose attention factor is `magnitude(1)`."""
        entries, more = self._entries(), self.attention / self.magnitude(1)
        return entries if math.isclose(more, 1) else entries | {"rope.scaling.attn_factor": f32(more)}

    def latent_metadata(self) -> dict[str, Value]:
        """Entries for `deepseek2`.

        Its graph scales the rotated parts by `attn_factor` and all scores by the square of
        `attn_factor * magnitude(multiplier)`, where transformers has `magnitude(mscale_all_dim)`
        squared. The file holds a tenth of the multiplier, and at exactly zero another rule holds.
        """
        more, wanted = self.attention, float(self.settings.get("mscale_all_dim") or 0)
        entries = self._entries()
        multiplier = wanted
        if not math.isclose(more, 1) and self.factor > 1:
            entries["rope.scaling.attn_factor"] = f32(more)
            multiplier = (self.magnitude(wanted) / more - 1) / (0.1 * math.log(self.factor))
        return entries | {"rope.scaling.yarn_log_multiplier": f32(0.1 * multiplier or _NEXT_TO_NOTHING)}

    def _edge(self, rotations: float, base: float) -> float:
        """The column pair that turns so often within the original context."""
        turns = self.original / (rotations * 2 * math.pi)
        return self.rotary * math.log(turns) / (2 * math.log(base))

    def refusals(self) -> Iterator[str]:
        """What llama.cpp would compute differently."""
        yield from self.fixed()
        yield from self.rounding()

    def fixed(self) -> Iterator[str]:
        """What llama.cpp takes from no file, where the model has it otherwise."""
        s = self.settings
        if self.factor <= 1:
            yield f"yarn with factor = {self.factor:g} (llama.cpp's stretches, so it must be above 1)"
        for name, fixed in (("beta_fast", _FAST), ("beta_slow", _SLOW)):
            if (s.get(name) or fixed) != fixed:
                yield f"yarn with {name} = {s[name]:g} (llama.cpp has {fixed} whatever the file says)"

    def rounding(self) -> Iterator[str]:
        """What llama.cpp rounds: the range of column pairs that are neither stretched nor left alone."""
        s = self.settings
        base = s["rope_theta"]
        low, high = max(self._edge(_FAST, base), 0), min(self._edge(_SLOW, base), self.rotary - 1)
        if not s.get("truncate", True) and (low != round(low) or high != round(high)):
            yield (
                f"yarn with truncate = False (llama.cpp rounds the range {low:.2f} to {high:.2f} "
                "of column pairs that it blends to whole ones)"
            )


def settings_of(metadata: Mapping[str, Any], latent: bool = False) -> dict[str, Any]:
    """`rope_parameters` that the entries of `metadata` (`latent_metadata`) stand for; {} without YaRN."""
    if metadata.get("rope.scaling.type") != "yarn":
        return {}
    factor = shortest(metadata["rope.scaling.factor"])
    original = metadata.get("rope.scaling.original_context_length", metadata["context_length"])
    settings = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    more, log = shortest(metadata.get("rope.scaling.attn_factor", 1.0)), math.log(factor)
    if not latent:
        return settings if more == 1 else settings | {"attention_factor": more * (1 + 0.1 * log)}
    tenth = shortest(metadata["rope.scaling.yarn_log_multiplier"])
    wanted = 10 * tenth if more == 1 else (more * (1 + tenth * log) - 1) / (0.1 * log)
    wanted = 0.0 if tenth <= 2 * _NEXT_TO_NOTHING and more == 1 else float(f"{wanted:.6g}")
    return settings | {"attention_factor": more, "mscale_all_dim": wanted}


def yarn(config: Any, rotary: int, name: str) -> Yarn | None:
    """The YaRN settings of a transformers config, None where it has another rope.

    Raises:
        UserError: Values that stretch nothing.
    """
    s = config.rope_parameters
    if s.get("rope_type") != "yarn":
        return None
    original = s.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = s.get("factor") or config.max_position_embeddings / original
    for field, value in (("original_max_position_embeddings", original), ("factor", factor)):
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{name}: config.json: yarn's {field} must be a positive number, got {value!r}")
    return Yarn(s, float(factor), int(original), rotary)
