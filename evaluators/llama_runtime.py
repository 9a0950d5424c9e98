"""A GGUF file run by llama.cpp in this process.

ggml aborts the whole process on some bad files, so code that must survive one
uses `evaluators.llama_cpp`, which runs this module in a child process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compression import llama_symbols as llama
from compression.llama_symbols import ffi

_UBATCH = 512  # tokens computed at once, llama.cpp's default


def most_likely(logits: np.ndarray) -> int:
    """The token of the largest of (vocabulary,) logits."""
    return int(logits.argmax())


class LlamaModel:
    """A GGUF file loaded by llama.cpp on the CPU; a context manager, not safe to share between threads.

    Attributes:
        context: Tokens the KV cache holds.
        vocabulary: Token ids, and the width of the logits.
        bytes: Size of the tensors, without the file's metadata and padding.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        threads: int = 1,
        exact: bool = True,
        top_k: int | None = None,
        sequences: int = 1,
    ) -> None:
        """Loads the file.

        Args:
            path: GGUF file.
            context: Tokens the KV cache holds.
            threads: CPU threads.
            exact: F32 KV cache, weights as they lie in the file and no flash attention, for comparing
                models; False takes llama.cpp's defaults, for measuring speed.
            top_k: Routed experts per token in every layer, instead of the file's.
            sequences: Sequences that share the context, see `packed_logits`.

        Raises:
            ValueError: `context`, `threads`, `top_k` or `sequences` is below 1.
            LlamaError: llama.cpp does not load the file.
            RuntimeError: The installed wheel is not the build declared in `llama_symbols`.
        """
        if min(context, threads, sequences, 1 if top_k is None else top_k) < 1:
            raise ValueError(
                f"context {context}, threads {threads}, top_k {top_k}, sequences {sequences}: "
                "each must be at least 1"
            )
        self._lib, self._model, self._context, self.context = llama.library(), ffi.NULL, ffi.NULL, context
        llama.forget_errors()
        name = os.fsencode(path)
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers, params.use_extra_bufts = 0, int(not exact)
        overrides = llama.top_k_override(name, top_k) if top_k is not None else ffi.NULL
        params.kv_overrides = overrides
        self._model = self._lib.llama_model_load_from_file(name, params)
        if self._model == ffi.NULL:
            raise llama.failure("the file does not load")

        settings = self._lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_outputs_max = max(context, sequences)  # it makes room for one of every sequence
        settings.n_ubatch = min(context, _UBATCH)
        settings.n_threads = settings.n_threads_batch = threads
        # In one cache, so that a token may be of several sequences.
        settings.n_seq_max, settings.kv_unified = sequences, int(sequences > 1)
        if exact:
            settings.type_k = settings.type_v = llama.F32
            settings.flash_attn_type = llama.FLASH_OFF
        self._context = self._lib.llama_init_from_model(self._model, settings)
        if self._context == ffi.NULL:
            self.close()
            raise llama.failure(f"no context of {context} tokens for this model")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.vocabulary: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.bytes: int = self._lib.llama_model_size(self._model)

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model, which cannot be used afterwards."""
        if self._context != ffi.NULL:
            self._lib.llama_free(self._context)
        if self._model != ffi.NULL:
            self._lib.llama_model_free(self._model)
        self._context = self._model = ffi.NULL

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text` by the file's tokenizer.

        Special tokens written out in the text are recognised; none is added.

        Raises:
            ValueError: The file has no tokenizer.
        """
        self._check_open()
        # llama.cpp aborts on this instead of reporting it.
        if self._lib.llama_vocab_type(self._vocab) == llama.VOCAB_NONE:
            raise ValueError("the file has no tokenizer")
        return llama.tokenize(self._vocab, text)

    def logits(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits of one window, from an empty KV cache.

        Args:
            tokens: (n,) token ids, at most `context` of them.

        Returns:
            (n, vocabulary) float32; row i scores token i + 1.

        Raises:
            ValueError: No tokens, more than the context holds, or ids outside the vocabulary.
            LlamaError: llama.cpp fails to compute them.
        """
        window = self._window(tokens, 0)
        self._clear()
        return self._decode(window, every=True).copy()

    def packed_logits(
        self,
        tokens: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        sequences: Sequence[Sequence[int]],
        rows: np.ndarray,
    ) -> np.ndarray:
        """Logits of some tokens of several sequences computed together, from an empty KV cache.

        Args:
            tokens: (n,) token ids, at most `context` of them.
            positions: (n,) place of each in its sequences.
            sequences: n lists of the sequences each is part of; it attends to what precedes it in them.
            rows: (u,) ascending: the tokens whose logits are wanted.

        Returns:
            (u, vocabulary) float32, valid until the next call.

        Raises what `logits` does.
        """
        window = self._window(tokens, 0)
        self._clear()
        marks, places = np.zeros(len(window), np.int8), np.ascontiguousarray(positions, np.int32)
        marks[rows] = 1
        counts = np.array([len(s) for s in sequences], np.int32)
        lists = [ffi.new("int32_t[]", list(s)) for s in sequences]
        batch = ffi.new("struct batch *")
        batch.n_tokens, batch.token = len(window), ffi.from_buffer("int32_t[]", window)
        batch.pos, batch.n_seq_id = (ffi.from_buffer("int32_t[]", a) for a in (places, counts))
        batch.seq_id = pointers = ffi.new("int32_t *[]", lists)
        batch.logits = ffi.from_buffer("int8_t[]", marks)
        found = self._run(batch, len(rows))
        del pointers  # kept until llama.cpp has read it
        return found

    def generate(
        self,
        tokens: Sequence[int] | np.ndarray,
        count: int,
        choose: Callable[[np.ndarray], int] = most_likely,
        end: int | None = None,
    ) -> list[int]:
        """Continues a prompt with `count` tokens, or with fewer where the end token comes first.

        Args:
            tokens: The prompt, (n,) ids with n + count at most `context`.
            count: Tokens to generate.
            choose: The next token of (vocabulary,) logits; the most likely one by default.
            end: The token that stops it and is not returned; None: nothing does.

        Raises what `logits` does.
        """
        window = self._window(tokens, count)
        self._clear()
        generated: list[int] = []
        while len(generated) < count:
            token = choose(self._decode(window)[-1])
            if token == end:
                break
            generated.append(token)
            window = np.array([token], np.int32)
        return generated

    def speed(self, prompt: int, generated: int) -> tuple[float, float]:
        """Tokens per second of a random prompt and of the tokens after it, by wall clock, after a warm-up.

        Args:
            prompt: Tokens computed together.
            generated: Tokens computed one by one after them, in the same context.

        Raises:
            ValueError: A count below 1, or more tokens in all than the context holds.
            LlamaError: llama.cpp fails to compute a token.
        """
        if min(prompt, generated) < 1:
            raise ValueError(f"speed over {prompt} + {generated} tokens: each must be at least 1")
        tokens = np.random.default_rng(0).integers(0, self.vocabulary, prompt + generated)
        window = self._window(tokens, 0)
        # The first pass reads the weights from disk and allocates the buffers.
        for steps in (1, generated):
            self._clear()
            started = time.perf_counter()
            self._decode(window[:prompt])
            prefilled = time.perf_counter()
            for i in range(prompt, prompt + steps):
                self._decode(window[i : i + 1])
            ended = time.perf_counter()
        return prompt / (prefilled - started), generated / (ended - prefilled)

    def _check_open(self) -> None:
        if self._context == ffi.NULL:
            raise RuntimeError("the model is closed")

    def _window(self, tokens: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
        """(n,) int32 token ids, checked: `count` more must fit into the context."""
        self._check_open()
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"tokens must be a non-empty row of ids, got {ids.dtype} of shape {ids.shape}")
        if ids.size + count > self.context:
            raise ValueError(f"{ids.size} + {count} tokens do not fit into a context of {self.context}")
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise ValueError(f"token ids {ids.min()}..{ids.max()} are not all in 0..{self.vocabulary - 1}")
        return np.ascontiguousarray(ids, np.int32)

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, window: np.ndarray, *, every: bool = False) -> np.ndarray:
        """Appends (n,) int32 ids to the KV cache; (1 or n, vocabulary) logits, valid until the next call."""
        # Where positions and sequence are NULL, llama.cpp continues sequence 0; without
        # marks it computes the last row only.
        batch = ffi.new("struct batch *")
        marks = np.ones(len(window), np.int8)
        batch.n_tokens, batch.token = len(window), ffi.from_buffer("int32_t[]", window)
        batch.logits = ffi.from_buffer("int8_t[]", marks) if every else ffi.NULL
        return self._run(batch, len(window) if every else 1)

    def _run(self, batch: Any, rows: int) -> np.ndarray:
        """Computes a batch of which `rows` tokens are marked; their (rows, vocabulary) logits."""
        llama.forget_errors()
        status = self._lib.llama_decode(self._context, batch[0])
        if status:
            raise llama.failure(f"llama_decode returned {status}")
        width = self.vocabulary
        values = ffi.buffer(self._lib.llama_get_logits(self._context), rows * width * 4)
        return np.frombuffer(values, np.float32).reshape(rows, width)
