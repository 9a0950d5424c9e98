"""Proof of an exported file: llama.cpp loads it, generates with it, and scores as the evaluator does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from evaluators.texts import TextSet
from search.pool import Pool
from spaces.candidate import Candidate

VERIFY_TOKENS = 4096
_GENERATE = 24


def verify_gguf(
    path: Path,
    pool: Pool,
    candidate: Candidate,
    text: TextSet,
    cache: Path,
    tokens: int = VERIFY_TOKENS,
    repaired: bool = False,
) -> dict[str, Any]:
    """Scores a GGUF file in llama.cpp beside the evaluator on the first report windows.

    Returns:
        `perplexity`, `evaluator_perplexity` and their `relative_difference`; `generated`
        token ids; `model_bytes` as llama.cpp counts them.

    Raises:
        UserError: llama.cpp does not load the file, or dies of it.
    """
    from evaluators.llama_cpp import file_logits, probe_file

    head = text.head(tokens)
    probe = probe_file(path, head.windows[0][:32].tolist(), generate=_GENERATE)
    logits = file_logits(path, head.windows, cache / "verify-logits.npy")
    nll = []
    for window, rows in zip(head.windows, logits, strict=True):
        x = np.asarray(rows[:-1], np.float64)
        log_z = x.max(-1) + np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1))
        nll.append(log_z - x[np.arange(len(x)), window[1:]])
    del logits
    (cache / "verify-logits.npy").unlink(missing_ok=True)
    if repaired:
        own = pool.run([("score_repaired", (candidate.to_json(), "report", tokens))])[0]
    else:
        own = pool.run([("score", ([candidate.to_json()], "report", tokens))])[0][0]
    theirs, ours = float(np.exp(np.mean(nll))), float(np.exp(np.mean(own["nll"])))
    return {
        "perplexity": theirs,
        "evaluator_perplexity": ours,
        "relative_difference": theirs / ours - 1,
        "tokens": int(head.windows.size),
        "model_bytes": probe.model_bytes,
        "generated": list(probe.generated),
    }
