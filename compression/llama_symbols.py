"""The llama.cpp functions used here, as C symbols of the runtime's wheel.

The wheel promises no C interface, so its version is pinned and the parameters'
layout is checked before the first use.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from cffi import FFI

from compression.ggml import PACKAGE, version

F32, F16 = 0, 1  # ggml_type
FLASH_AUTO, FLASH_OFF = -1, 0  # llama_flash_attn_type
VOCAB_NONE = 0  # llama_vocab_type
_OVERRIDE_INT, _OVERRIDE_TEXT = 0, 3  # llama_model_kv_override_type
_GGUF_STRING = 8  # gguf_type
_ERROR, _CONTINUED = 4, 5  # ggml_log_level

ffi = FFI()
# Layouts of build 11549. The flags are bytes, so that a wrong one can be read and reported;
# the tails take the fields of a build with longer structs, which would otherwise be written
# past their end.
ffi.cdef("""
struct model_params {
  void *devices, *buffer_overrides;
  int n_gpu_layers, split_mode, load_mode, lazy_mode, main_gpu;
  void *tensor_split, *progress, *progress_data, *kv_overrides;
  uint8_t vocab_only, check_tensors, use_extra_bufts, no_host, no_alloc, load_mtp;
  char tail[128];
};
struct context_params {
  uint32_t n_ctx, n_batch, n_ubatch, n_seq_max, n_rs_seq, n_outputs_max, n_outputs_max_per_seq;
  int n_threads, n_threads_batch;
  int ctx_type, rope_scaling_type, pooling_type, attention_type, flash_attn_type;
  float rope_freq_base, rope_freq_scale, yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow;
  uint32_t yarn_orig_ctx;
  float defrag_thold;
  void *cb_eval, *cb_eval_data;
  int type_k, type_v;
  size_t moe_cache_size;
  void *abort_callback, *abort_data;
  uint8_t embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified;
  void *samplers;
  size_t n_samplers;
  void *ctx_other;
  char tail[128];
};
struct kv_override { int tag; char key[128]; union { int64_t integer; char text[128]; }; };
struct batch {
  int32_t n_tokens;
  int32_t *token; float *embd; int32_t *pos, *n_seq_id, **seq_id; int8_t *logits;
};
struct gguf_params { bool no_alloc; void *context; };
void llama_log_set(void (*callback)(int, const char *, void *), void *data);
void llama_backend_init(void);
struct model_params llama_model_default_params(void);
struct context_params llama_context_default_params(void);
void *llama_model_load_from_file(const char *path, struct model_params params);
void *llama_init_from_model(void *model, struct context_params params);
void llama_free(void *context);
void llama_model_free(void *model);
uint64_t llama_model_size(const void *model);
const void *llama_model_get_vocab(const void *model);
int32_t llama_vocab_n_tokens(const void *vocab);
int llama_vocab_type(const void *vocab);
int32_t llama_tokenize(const void *vocab, const char *text, int32_t length, int32_t *tokens, int32_t room,
  bool add_special, bool parse_special);
void *llama_get_memory(const void *context);
void llama_memory_clear(void *memory, bool data);
int32_t llama_decode(void *context, struct batch batch);
float *llama_get_logits(void *context);
void *gguf_init_from_file(const char *path, struct gguf_params params);
int64_t gguf_find_key(const void *file, const char *key);
int gguf_get_kv_type(const void *file, int64_t key);
const char *gguf_get_val_str(const void *file, int64_t key);
void gguf_free(void *file);
""")

_MODEL_DEFAULTS: Mapping[str, Any] = {
    "n_gpu_layers": -1, "split_mode": 1, "main_gpu": 0, "tensor_split": ffi.NULL, "kv_overrides": ffi.NULL,
    "vocab_only": 0, "check_tensors": 0, "use_extra_bufts": 1, "no_host": 0, "no_alloc": 0,
}  # fmt: skip
_CONTEXT_DEFAULTS: Mapping[str, Any] = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "flash_attn_type": FLASH_AUTO,
    "yarn_beta_slow": -1.0, "yarn_orig_ctx": 0, "defrag_thold": -1.0, "cb_eval": ffi.NULL, "type_k": F16,
    "type_v": F16, "abort_callback": ffi.NULL, "embeddings": 0, "offload_kqv": 1, "op_offload": 1,
    "samplers": ffi.NULL, "n_samplers": 0, "ctx_other": ffi.NULL,
}  # fmt: skip

_errors: list[str] = []


class LlamaError(RuntimeError):
    """llama.cpp refused a file or a batch; the message is its own error text."""


# Kept for the life of the process: llama.cpp holds the pointer.
@ffi.callback("void(int, const char *, void *)")
def _log(level: int, text: Any, data: Any) -> None:
    if level == _ERROR or (level == _CONTINUED and _errors):
        _errors.append(ffi.string(text).decode(errors="replace").strip())


def forget_errors() -> None:
    """Drops the error lines logged so far, before a call whose failure is to be explained."""
    _errors.clear()


def failure(fallback: str) -> LlamaError:
    """The error lines logged since `forget_errors`, as one exception."""
    return LlamaError(" | ".join(line for line in _errors if line) or fallback)


def check_layout(lib: Any) -> None:
    """Raises RuntimeError unless `lib`'s default parameters read as those of the build declared here."""
    found = ((lib.llama_model_default_params(), _MODEL_DEFAULTS),
             (lib.llama_context_default_params(), _CONTEXT_DEFAULTS))  # fmt: skip
    for params, defaults in found:
        for name, default in defaults.items():
            if (value := getattr(params, name)) != default:
                raise RuntimeError(
                    f"{version()} lays out its parameters differently than expected (default {name} reads as "
                    f"{value}, not {default}); install the {PACKAGE} that moefit's dependencies name"
                )


@cache
def library() -> Any:
    """The loaded library, logging to this module.

    Raises:
        RuntimeError: The wheel is missing, lacks a symbol or is another build.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"the package {PACKAGE} is missing; install moefit's dependencies")
    folder = Path(spec.submodule_search_locations[0])
    lib = ffi.dlopen(str(next(folder.glob(f"{PACKAGE}.abi3.*"))))
    try:
        for name in dir(lib):
            getattr(lib, name)  # symbols are resolved on first use
    except AttributeError as error:
        raise RuntimeError(
            f"{version()}: {error}; install the {PACKAGE} moefit's dependencies name"
        ) from error
    check_layout(lib)
    lib.llama_log_set(_log, ffi.NULL)
    lib.llama_backend_init()
    return lib


def _architecture(path: bytes) -> bytes:
    """The architecture a GGUF file names; LlamaError if it names none."""
    lib = library()
    file = lib.gguf_init_from_file(path, ffi.new("struct gguf_params *", [True, ffi.NULL])[0])
    if file == ffi.NULL:
        raise failure("not a GGUF file")
    try:
        key = lib.gguf_find_key(file, b"general.architecture")
        if key < 0 or lib.gguf_get_kv_type(file, key) != _GGUF_STRING:
            raise LlamaError("no general.architecture in the metadata")
        name: bytes = ffi.string(lib.gguf_get_val_str(file, key))
        return name
    finally:
        lib.gguf_free(file)


def top_k_override(path: bytes, top_k: int) -> Any:
    """Metadata overrides that replace a file's routed experts per token; LlamaError if it is not GGUF."""
    overrides = ffi.new("struct kv_override[2]")  # the second, empty key ends the list
    overrides[0].tag, overrides[0].integer = _OVERRIDE_INT, top_k
    overrides[0].key = _architecture(path) + b".expert_used_count"  # keys start with the architecture
    return overrides


def text_override(key: bytes, text: str) -> Any:
    """Metadata overrides that replace one string of a file, of at most 127 bytes."""
    overrides = ffi.new("struct kv_override[2]")  # the second, empty key ends the list
    overrides[0].tag, overrides[0].key, overrides[0].text = _OVERRIDE_TEXT, key, text.encode()
    return overrides


def tokenize(vocab: Any, text: str) -> list[int]:
    """Token ids of `text`; special tokens written out in it are recognised, none is added.

    `vocab` must be one with a tokenizer: llama.cpp aborts on any other.
    """
    raw = text.encode()
    tokens, room = ffi.NULL, 0
    # A negative answer is the room that is needed.
    while (count := library().llama_tokenize(vocab, raw, len(raw), tokens, room, False, True)) < 0:
        tokens, room = ffi.new("int32_t[]", -count), -count
    return [int(token) for token in tokens[0:count]] if count else []
