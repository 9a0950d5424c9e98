"""What sharing contexts saves when tasks are scored: `python -m experiments.benchmarks.task_time`.

Prints the seconds that lm-eval's own model and `PrefixLM` take for the same requests of the
shipped multiple-choice tasks on the reference model, one thread, and how far their
log-likelihoods are apart.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM

from compression.candidate_model import CandidateModel
from compression.checkpoint import load_tokenizer, open_checkpoint
from compression.expert_kernels import fastest_experts, use_experts
from compression.variant_bank import VariantBank
from evaluators.harness import Harness, task_context
from evaluators.prefix_lm import PrefixLM
from search.options import REFERENCE_MODEL

TASKS = ("local_cloze", "local_hellaswag100", "bb_agreement", "bb_hyperbaton")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--limit", type=int, default=100, help="items per task (default: 100)")
    limit = parser.parse_args().limit
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(REFERENCE_MODEL)
    held = CandidateModel(checkpoint, checkpoint.inventory, VariantBank(Path("unused")))
    use_experts(held, next(iter(fastest_experts(held))))
    tokenizer, length = load_tokenizer(REFERENCE_MODEL), task_context(checkpoint.family.config)
    own = HFLM(
        pretrained=held.model, tokenizer=tokenizer, backend="causal", max_length=length, batch_size=16,
        softmax_dtype="float32",
    )  # fmt: skip
    ours = PrefixLM(held.model, tokenizer, max_length=length)
    print(f"{'task':<20} {'requests':>8} {'lm-eval':>8} {'shared':>8} {'times':>6}  largest gap (nats)")
    for name in TASKS:
        requests = Harness(tokenizer, [name], limit=limit, max_length=length).requests()[name]
        seconds, scores = [], []
        for model in (own, ours):
            started = time.perf_counter()
            scores.append(model.loglikelihood(requests, disable_tqdm=True))
            seconds.append(time.perf_counter() - started)
        apart = max(abs(x - y) for (x, _), (y, _) in zip(*scores, strict=True))
        print(
            f"{name:<20} {len(requests):>8} {seconds[0]:>7.1f}s {seconds[1]:>7.1f}s "
            f"{seconds[0] / seconds[1]:>6.1f}  {apart:.1e}"
        )


if __name__ == "__main__":
    main()
