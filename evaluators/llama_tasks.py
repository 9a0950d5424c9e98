"""lm-eval's tasks on a GGUF file run by llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from evaluators.llama_cpp import file_answers, file_loglikelihoods
from evaluators.shared_prefix import share

_STEP = 32  # tokens of an answer before it is looked at; doubled every time


class LlamaLM(HFLM):
    """Asks as `HFLM` does, with the tokens of the same tokenizer, but holds a file instead of a model.

    A child process computes a context once for all its continuations. Answers are greedy.
    """

    def __init__(self, path: Path, tokenizer: Any, *, max_length: int, threads: int = 1) -> None:
        """Remembers the file; it is loaded by each request.

        Args:
            path: GGUF file.
            tokenizer: The transformers tokenizer of the model that it was made of.
            max_length: Tokens the model sees.
            threads: CPU threads.
        """
        LM.__init__(self)  # HFLM's own makes a transformers model
        self.path, self.tokenizer, self._threads = path, tokenizer, threads
        self.backend, self._max_length = "causal", max_length
        # lm-eval hands over windows of long texts in batches: one, as each costs a loading of the file.
        self.batch_size_per_gpu = 2**62
        self.add_bos_token = self.custom_prefix_token_id = self.enable_thinking = None

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        items, places = share([(context, after) for _, context, after in requests], self.max_length)
        time = _patience(sum(item.length for item in items))
        found = file_loglikelihoods(self.path, items, threads=self._threads, timeout=time)
        return [found[item][branch] for item, branch in places]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        answers = []
        for request in requests:
            question, options = request.args
            settings = normalize_gen_kwargs(options, self.max_gen_toks)
            room = settings["max_gen_toks"]
            prompt = self.tok_encode(question, left_truncate_len=self.max_length - room)
            answers.append(_Answer(prompt, room, handle_stop_sequences(settings["until"], eos=end)))
        step = _STEP
        # llama.cpp knows nothing of stop sequences: what has none yet goes on from where it is.
        while pending := [a for a in answers if not a.done]:
            count = min(step, max(a.room for a in pending))
            prompts = [a.prompt + a.tokens for a in pending]
            parts = file_answers(
                self.path, prompts, count, end=self.eot_token_id, threads=self._threads,
                timeout=_patience(sum(map(len, prompts)) + count * len(prompts)),
            )  # fmt: skip
            for answer, part in zip(pending, parts, strict=True):
                answer.add(part, count, self.tok_decode)
            step *= 2
        return [postprocess_generated_text(a.text, a.until, None) for a in answers]


class _Answer:
    """One answer as it grows."""

    def __init__(self, prompt: list[int], room: int, until: list[str]) -> None:
        self.prompt, self.room, self.until = prompt, room, until
        self.tokens: list[int] = []
        self.text, self.done = "", False

    def add(self, tokens: list[int], asked: int, decode: Any) -> None:
        """Takes the next tokens, of `asked` that were asked for; fewer came where the text ends."""
        ended = len(tokens) < asked
        tokens = tokens[: self.room]
        self.tokens += tokens
        self.room -= len(tokens)
        self.text = decode(self.tokens)
        self.done = ended or not self.room or any(stop and stop in self.text for stop in self.until)


def _patience(tokens: int) -> float:
    """Seconds a child may take: a second for each token, and ten minutes to load the file."""
    return 600.0 + tokens
